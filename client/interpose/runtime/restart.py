"""Beginning a model's forward in the middle: at one of its blocks, from what the block before it made.

Whether that gives what the whole forward gives is tried on a short batch before a block is first begun at. Models
whose blocks need more than what the last one made (keys and values of an earlier block, a bias that the first one
makes) fail it, and run whole.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.manifest import BATCH, BATCH_SEQ, KEY, SEQ, Layout, Leaf, leaves, walk
from ..graph.model import Key
from . import nests
from .feeding import examples
from .hooks import CURRENT, Onlooker, hooked, others
from .inputs import principal
from .loading import Loaded
from .pieces import Piece, joined
from .plan import Place
from .rows import Span
from .tail import CLOSE

log = logging.getLogger(__name__)

_TRIAL = 64
"""Most tokens of the longer of the two forwards that tell what one costs beside its tokens."""


@dataclass(frozen=True)
class Made:
    """What a block made for some rows: its nest, and those rows' part of each tensor in it."""

    nest: Any
    parts: Mapping[tuple[Key, ...], Tensor]

    @classmethod
    def of(cls, nest: Any, layout: Layout, span: Span) -> Made:
        """A copy of a span's part of what was made for a batch."""
        parts = {}
        for path, tensor in nests.tensors(nest):
            leaf = walk(layout, path)
            assert isinstance(leaf, Leaf)
            parts[path] = part_of(tensor, leaf, span).clone()
        return cls(nest, parts)

    @staticmethod
    def joined(several: Sequence[Made], layout: Layout, spans: Sequence[Span], whole: Span) -> Any:
        """The nest of a batch that holds, at each span, what was made for it; zeros where the batch is padded."""
        nest = several[0].nest
        for path in several[0].parts:
            leaf = walk(layout, path)
            assert isinstance(leaf, Leaf)
            nest = nests.put(nest, path, batched([made.parts[path] for made in several], leaf, spans, whole))
        return nest


def plain(leaf: Leaf) -> bool:
    """Whether a value belongs to rows, in a dimension of their own, and to positions at most, in one of theirs."""
    once = leaf.dims.count(BATCH) == 1 and leaf.dims.count(SEQ) <= 1
    return leaf.shared and once and not {KEY, BATCH_SEQ} & set(leaf.dims)


def part_of(tensor: Tensor, leaf: Leaf, span: Span) -> Tensor:
    """A span's part of a batch, sharing its memory."""
    for dim, start, length in ((BATCH, span.row, span.rows), (SEQ, span.start, span.length)):
        if dim in leaf.dims:
            tensor = tensor.narrow(leaf.dims.index(dim), start, length)
    return tensor


def batched(parts: Sequence[Tensor], leaf: Leaf, spans: Sequence[Span], whole: Span) -> Tensor:
    """A batch that holds these parts at their spans, and zeros elsewhere."""
    sizes = {BATCH: whole.rows, SEQ: whole.length}
    batch = parts[0].new_zeros([dim if isinstance(dim, int) else sizes[dim] for dim in leaf.dims])
    for part, span in zip(parts, spans, strict=True):
        part_of(batch, leaf, span).copy_(part)
    return batch


@dataclass
class Restart:
    """Where the forward of one model can be begun."""

    loaded: Loaded
    _works: dict[int, bool] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)
    _bound: Mapping[nn.Module, Sequence[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self._bound = {module: others(module) for module in self.loaded.model.modules()}

    def unaltered(self, modules: Iterable[nn.Module]) -> bool:
        """Whether modules call what they called when the model was loaded: neither hooks nor forwards came since.

        What is tried here holds for that alone; someone's own hook would act twice, or on other positions.
        """
        return all(others(module) == self._bound.get(module) for module in modules)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The moment of each block's output; () where blocks aren't called once each, in order."""
        found: list[int] = []
        for path in self.loaded.manifest.blocks:
            events = self.loaded.manifest.modules[path].events
            if len(events.get("enter", ())) != 1 or len(events.get("exit", ())) != 1:
                return ()
            found.append(2 * events["exit"][0])  # as `Manifest.moment` counts
        return tuple(found) if found == sorted(found) else ()

    @cached_property
    def bare_tokens(self) -> float:
        """How many tokens cost as much as what any forward costs, mostly for reading the weights.

        Infinite where that can't be told: then runs aren't divided.
        """
        longest = min(_TRIAL, self.loaded.manifest.positions or _TRIAL)
        try:
            one, many = (min(self._seconds(length) for _ in range(3)) for length in (1, longest))
        except Exception as error:  # noqa: BLE001 - a model that takes no such prompt may raise anything; it runs whole
            log.info("what a forward of %s costs can't be told: %s", self.loaded.manifest.model, error)
            return math.inf
        return max(one * (longest - 1) / max(many - one, one / 10) - 1, 0.0)

    def depth(self, moment: int) -> int:
        """How many blocks have ended by a moment, their outputs' own included."""
        return sum(end <= moment for end in self.ends)

    def steady(self, module: str) -> bool:
        """Whether a module's calls lie in one block, if in any: then none is missed wherever a forward begins."""
        first = self.loaded.manifest.modules[self.loaded.manifest.blocks[0]].events["enter"][0]
        moments = self.loaded.manifest.modules[module].events.get("enter", ())
        return len({self.depth(2 * moment) for moment in moments if moment >= first}) <= 1

    def exit_of(self, block: int) -> Place:
        """Where what the block before one made is seen; one more block than there are is what follows them."""
        return self.loaded.manifest.blocks[block - 1], "exit", 0

    def layout(self, block: int) -> Layout:
        """Of what the block before one makes."""
        return self.loaded.manifest.modules[self.exit_of(block)[0]].points.get("output")

    def works(self, block: int) -> bool:
        """Whether a forward can be begun at a block, or after the last."""
        if block not in self._works:
            self._works[block] = bool(self.ends) and self._carried(block) and self._tried(block)
        return self._works[block]

    @contextmanager
    def begun(self, block: int, made: Any) -> Iterator[None]:
        """In this context the blocks before one compute nothing: they return, and show hooks, what the last made.

        To be entered with the forward's hooks set: modules called on values by a graph compute what they do.
        """
        scope = CURRENT.get()
        assert scope is not None

        def instead(forward: Any) -> Any:
            return lambda *args, **kwargs: made if CURRENT.get() is scope else forward(*args, **kwargs)

        modules = [self.loaded.modules[path] for path in self.loaded.manifest.blocks[:block]]
        with self._lock:
            before = [vars(module).get("forward") for module in modules]
            try:
                for module in modules:
                    module.forward = instead(module.forward)
                yield
            finally:
                for module, forward in zip(modules, before, strict=True):
                    _restore(module, forward)

    def _carried(self, block: int) -> bool:
        """Whether all that is carried into a block belongs to rows, and to positions at most."""
        found = leaves(self.layout(block))
        return bool(found) and all(map(plain, found))

    @cached_property
    def _trial(self) -> _Trial:
        runs = [examples(self.loaded.model, self.loaded.feeding, lengths) for lengths in ([6, 4], [3])]
        kwargs, spans = self._batch(runs)
        seen = _Seen({self.exit_of(block + 1) for block in range(len(self.ends))})
        modules = {module: self.loaded.modules[module] for module, _, _ in seen.places}
        with hooked(modules, self.loaded.names, seen):
            self.loaded.model(**kwargs)
        others, placed = self._batch([runs[1], runs[0], runs[1]])
        return _Trial(seen.values, spans, others, placed, principal(self.loaded.model(**others)))

    def _tried(self, block: int) -> bool:
        """Whether a batch comes out the same that is begun from what was made in another batch, of other rows."""
        try:
            trial, layout = self._trial, self.layout(block)
            one, two = (Made.of(trial.seen[self.exit_of(block)], layout, span) for span in trial.spans)
            rows, longest = sum(span.rows for span in trial.placed), max(span.length for span in trial.placed)
            nest = Made.joined([two, one, two], layout, trial.placed, Span.whole(rows, longest, longest))
            with hooked({}, self.loaded.names, _Seen(set())), self.begun(block, nest):
                found = principal(self.loaded.model(**trial.kwargs))
        except Exception as error:  # noqa: BLE001 - a model that can't may raise anything; it runs whole
            log.info("%s can't be begun at block %d: %s", self.loaded.manifest.model, block, error)
            return False
        expected = trial.expected
        if found.shape != expected.shape:
            return False
        # What stands in padded places is nobody's.
        pairs = [(found, expected)]
        if expected.dim() > 2:
            pairs = [(found[own], expected[own]) for own in map(_real, trial.placed)]
        tolerance = CLOSE.get(expected.dtype, 3e-2)
        return all(float((one - two).abs().max()) <= tolerance * float(two.abs().max()) for one, two in pairs)

    def _batch(self, runs: Sequence[Sequence[Piece]]) -> tuple[dict[str, Any], list[Span]]:
        inputs = joined(runs, self.loaded.feeding.inputs, self.loaded.device)
        firsts = accumulate(inputs.rows, initial=0)
        spans = [
            Span(first, rows, 0, width, 0, width)
            for first, rows, width in zip(firsts, inputs.rows, inputs.widths, strict=False)
        ]
        return self.loaded.feeding.kwargs(inputs), spans

    def _seconds(self, length: int) -> float:
        kwargs, _ = self._batch([examples(self.loaded.model, self.loaded.feeding, [length])])
        _finish(self.loaded.device)
        start = time.perf_counter()
        self.loaded.model(**kwargs)
        _finish(self.loaded.device)
        return time.perf_counter() - start


def _real(span: Span) -> tuple[slice, slice]:
    return slice(span.row, span.row + span.rows), slice(span.start, span.start + span.length)


@dataclass(frozen=True)
class _Trial:
    """What blocks made in one batch, and the outcome of another that has the same runs elsewhere."""

    seen: Mapping[Place, Any]
    spans: Sequence[Span]
    kwargs: Mapping[str, Any]
    placed: Sequence[Span]
    expected: Tensor


@dataclass
class _Seen(Onlooker):
    """Keeps what some places show."""

    places: Collection[Place]
    values: dict[Place, Any] = field(default_factory=dict)
    attention = False

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        if (module, event, call) in self.places:
            self.values[module, event, call] = value
        return value


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is None:
        vars(module).pop("forward", None)
    else:
        module.forward = forward


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
