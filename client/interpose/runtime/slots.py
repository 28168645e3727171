"""The versions of one hook point's values while its hook runs.

Writes are functional: a write makes a new version and never changes a tensor that anyone, the model included, may
still hold. Memory is copied once a point and forward at most, and not at all where nobody writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import BadArgument, NotReached, ShapeMismatch
from ..graph.manifest import Layout, Leaf, walk
from ..graph.model import Key
from . import kernels, nests
from .rows import Span, View

Path = tuple[Key, ...]


@dataclass
class Touched:
    """What a module takes or returns at one moment of a shared forward, and what it becomes.

    `rewritten`: the model writes over it later, in place; then jobs and model each have their own memory.
    `in_place`: writes go into its memory, where all who hold it see them; then jobs have memory of their own.
    """

    nest: Any
    layout: Layout
    whole: Span
    rewritten: bool = False
    in_place: bool = False
    owned: dict[Path, torch.Tensor] = field(default_factory=dict)
    _copies: dict[Path, torch.Tensor] = field(default_factory=dict)

    def tensor(self, path: Path) -> torch.Tensor:
        found = self.owned.get(path)
        if found is None:
            try:
                found = nests.at(self.nest, path)
            except LookupError:
                found = None
        if not isinstance(found, torch.Tensor):
            raise NotReached("this forward made no tensor here")
        if not self.rewritten or path in self.owned:
            return found
        if path not in self._copies:
            self._copies[path] = found.clone()
        return self._copies[path]

    def own(self, path: Path) -> torch.Tensor:
        """A copy of the whole tensor that may be written: one for all jobs of the forward."""
        if path not in self.owned:
            self.owned[path] = self.tensor(path).clone()
        return self.owned[path]

    def result(self) -> Any:
        nest = self.nest
        for path, tensor in self.owned.items():
            nest = nests.put(nest, path, tensor.clone() if self.rewritten else tensor)
        return nest


@dataclass
class Slot:
    """One tensor of a point, for one run: its newest version."""

    leaf: Leaf
    view: View
    current: torch.Tensor
    written: bool = False
    private: bool = False
    """Whether `current` is our own copy and nobody was handed it: then the next write needs no copy."""
    apart: bool = False
    """Whether gradients of `current` are of what is computed from this point on, and of nothing else."""

    def read(self, view: View) -> torch.Tensor:
        self.private = False
        return view.cut(self.current)

    def watch(self) -> torch.Tensor:
        """The newest version as one that gradients flow to; where none did yet, they are cut off behind it.

        Its gradient is that of a write here, whatever else the model computes from the same tensor (a norm's input
        is also the residual), and whoever else, earlier in the forward, asks for gradients.
        """
        if not self.apart:
            tracked = self.current.requires_grad
            self.current = self.current.view_as(self.current) if tracked else self.current.detach().requires_grad_()
            self.written = self.apart = True
        self.private = False
        return self.current

    def write(self, view: View, chain: Sequence[Any], index: Any, value: Any) -> None:
        self.written = True
        if index is None and not chain and view.whole:
            self.current, self.private, self.apart = fitted(value, self.current), False, False
            return
        if not self.private:
            self.current, self.private = self.current.clone(), True
        if view.whole:
            assign(self.current, chain, index, value)
            return
        local = view.cut(self.current)
        assign(local, chain, index, value)
        if local.data_ptr() != view.open(self.current).data_ptr():
            view.paste(self.current, local)


class RunValues:
    """The slots of one job's run at one moment."""

    def __init__(self, touched: Touched, span: Span) -> None:
        self.touched = touched
        self.span = span
        self.itself = span.itself
        self.slots: dict[Path, Slot] = {}

    def layout(self, path: Path) -> Layout:
        return walk(self.touched.layout, path)

    def read(self, path: Path, invoke: Span) -> Any:
        """The value at a path as one invoke sees it; nests in plain tuples and dicts."""
        return self._read(walk(self.touched.layout, path), path, invoke)

    def _read(self, layout: Layout, path: Path, invoke: Span) -> Any:
        if isinstance(layout, Leaf):
            return self._slot(layout, path).read(self._within(layout, invoke))
        if isinstance(layout, tuple):
            return tuple(self._read(item, (*path, index), invoke) for index, item in enumerate(layout))
        if isinstance(layout, dict):
            return {name: self._read(item, (*path, name), invoke) for name, item in layout.items()}
        return None

    def write(self, path: Path, invoke: Span, chain: Sequence[Any], index: Any, value: Any) -> None:
        leaf = walk(self.touched.layout, path)
        if not isinstance(leaf, Leaf):
            raise BadArgument("a nest can't be written as one")
        self._slot(leaf, path).write(self._within(leaf, invoke), chain, index, value)

    def watch(self, path: Path, invoke: Span) -> tuple[torch.Tensor, View, bool]:
        """The run's whole tensor at a path, ready for gradients, how an invoke's part is cut out of it, and whether
        it is itself a part of what several runs share."""
        leaf = walk(self.touched.layout, path)
        if not isinstance(leaf, Leaf):
            raise BadArgument("a nest has no gradient; take one of its tensors")
        slot = self._slot(leaf, path)
        # Else the model would go on with memory of its own, past which no gradient comes.
        slot.written |= self.touched.in_place or self.touched.rewritten
        return slot.watch(), self._within(leaf, invoke), not slot.view.whole

    def finish(self) -> None:
        """Hand the newest versions to the model."""
        for path, slot in self.slots.items():
            if not slot.written:
                continue
            if self.touched.in_place:
                slot.view.paste(self.touched.tensor(path), slot.current)
            elif slot.view.whole:
                self.touched.owned[path] = slot.current
            else:
                slot.view.paste(self.touched.own(path), slot.current)

    def _slot(self, leaf: Leaf, path: Path) -> Slot:
        slot = self.slots.get(path)
        if slot is None:
            view = View(leaf, self.span, self.touched.whole)
            current = view.cut(self.touched.tensor(path))
            # What this run reads is handed out, and `finish` may write where it lies.
            copied = self.touched.in_place or path in self.touched.owned
            # Alone it would lie closely packed, and `view`, also within modules called on it, goes by that.
            copied = copied or not (view.whole or current.is_contiguous())
            slot = self.slots[path] = Slot(leaf, view, current.clone() if copied else current, private=copied)
        return slot

    def _within(self, leaf: Leaf, invoke: Span) -> View:
        return View(leaf, invoke, self.itself)


def fitted(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A replacement in the dtype and on the device of what it replaces. Raises ShapeMismatch."""
    if not isinstance(value, torch.Tensor):
        raise BadArgument("a value is replaced by a tensor")
    if value.shape != like.shape:
        raise ShapeMismatch(f"replaced with shape {list(value.shape)}, where {list(like.shape)} is expected")
    return value.to(device=like.device, dtype=like.dtype)


def assign(target: torch.Tensor, chain: Sequence[Any], index: Any, value: Any) -> None:
    """`target[chain of views][index] = value`, in place. Raises BadArgument where a step made a copy."""
    memory = target.untyped_storage().data_ptr()
    part: Any = target
    for name, *args in chain:
        part = kernels.execute(name, (part, *args), {})
        if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() != memory:
            raise BadArgument(f"{name} makes a copy here, so what is written into it would be lost")
    if index is None:
        part.copy_(fitted(value, part))
    else:
        kernels.assign(part, index, value)
