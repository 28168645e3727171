"""A shard: a range of a model's blocks, their part of the caches, and of the graphs that gradients go back by."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InternalError
from .. import nests
from ..adapters import Adapter, chosen
from ..hooks import Looking, hooked, no_hooks
from ..independence import Buffers, remembers
from . import home_caches
from .mapping import Swapped, mapped, moved, readdressed
from .route import HOME, ArgumentRef, BlockCall, CacheRef, Guest, Mail, Nest, Visit
from .shard_caches import ShardCaches
from .station import tracked

ARGUMENT = "argument"
"""First part of the address of mail that stands for an argument of blocks."""

BACK = "back"
"""Address of mail that says which calls' hidden states home wants too, `[place in the visit, number]` each; and of
what then comes home, the number behind it."""

HIDDEN = "hidden"
"""In the description of what a block returns: the hidden states; `hidden:float32` where it changes their dtype."""

_OURS = (home_caches.ADDRESS, ARGUMENT, BACK)

OUTPUTS = "blocks.outputs"
"""Errand that a shard does itself: what its blocks return."""

HOLD, RESTORE, FORGET = "blocks.hold", "blocks.restore", "blocks.forget"
"""Errands for what blocks remember from one forward to the next: note it, which gives a number, None if there is
nothing; put it back as it was under that number; never mind the number. Done while no forward is under way."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """Of one forward: what came and what left requiring gradients."""

    came: Sequence[Tensor]
    left: Sequence[Tensor]


class Shard:
    """A `Station` that runs blocks.

    Args:
        site: its number.
        blocks: path -> block, in eval mode.
        guest: what of the jobs' graphs runs here.

    Attributes:
        adapters: what forwards may choose, by name.
    """

    def __init__(
        self, site: int, blocks: Mapping[str, nn.Module], device: torch.device, guest: Guest | None = None
    ) -> None:
        self.site = site
        self.guest = guest
        self.adapters: Mapping[str, Adapter] = {}
        self._blocks = blocks
        self._device = device
        self._first = {path: first_parameter(block) for path, block in blocks.items()}
        self._outputs: dict[str, Nest] = {}
        self._caches = ShardCaches(site, device)
        self._kept: dict[int, _Kept] = {}
        self._remembering = any(map(remembers, blocks.values()))
        self._held: dict[int, list[Buffers]] = {}
        self._numbers = itertools.count(1)

    # -- forwards ------------------------------------------------------------------------------------------------

    def visit(
        self, number: int, hidden: Tensor, visit: Visit, mail: Sequence[Mail]
    ) -> tuple[Tensor | None, Nest, Sequence[Mail]]:
        """Serve one forward; `mail` is what is addressed here."""
        words = [letter for letter in mail if letter.address[0] == home_caches.ADDRESS]
        with self._caches.taken(words):
            return self._visit(number, hidden, visit, mail)

    def _visit(
        self, number: int, hidden: Tensor, visit: Visit, mail: Sequence[Mail]
    ) -> tuple[Tensor | None, Nest, Sequence[Mail]]:
        arrived = Swapped(lambda tensor: moved(tensor, self._device))
        hidden, mail = arrived(hidden), readdressed(mail, arrived)
        of_caches = [letter for letter in mail if letter.address[0] == home_caches.ADDRESS]
        arguments = {letter.address[1]: letter.value for letter in mail if letter.address[0] == ARGUMENT}
        for_guest = [letter for letter in mail if letter.address[0] not in _OURS]
        asked = {place: back for letter in mail if letter.address[0] == BACK for place, back in letter.value}
        between: dict[int, Mail] = {}

        def resolve(value: Any) -> Any:
            if isinstance(value, CacheRef):
                return self._caches.get(value)
            return arguments[value.number] if isinstance(value, ArgumentRef) else arrived(value)

        def run() -> Tensor:
            # A block may write over what it is given, which a leaf that requires gradients doesn't allow.
            result = hidden.clone() if hidden.requires_grad else hidden
            for place, call in enumerate(visit.calls):
                result = self._call(call, result, resolve)
                if place in asked:
                    # The next block may write over it.
                    between[place] = Mail(HOME, (BACK, asked[place]), result.clone())
            return result

        # The run of the context isn't this one's: a thread may serve many.
        with torch.set_grad_enabled(visit.grad), no_hooks(), chosen(self.adapters, visit.adapter):
            result, reply, new = self._serve(visit, for_guest, run)
        new = [*new, *between.values()]
        kept = _Kept(tracked(hidden, mail), tracked(result, new))
        border = Swapped(_border)
        leaving = [*self._caches.tell(of_caches), *readdressed(new, border)]
        if visit.grad:
            self._kept[number] = kept
        return border(result), reply, leaving

    def _serve(
        self, visit: Visit, mail: Sequence[Mail], run: Callable[[], Tensor]
    ) -> tuple[Tensor | None, Nest, Sequence[Mail]]:
        if visit.work is None and not mail:
            with self._attention(visit):
                return run(), None, ()
        if self.guest is None:
            raise InternalError(f"site {self.site} serves no graphs")
        with self._attention(visit) if visit.work is None else nullcontext():
            return self.guest.visit(visit.work, mail, run)

    @staticmethod
    def _attention(visit: Visit) -> AbstractContextManager[Any]:
        return hooked({}, {}, Looking()) if visit.attention else nullcontext()

    def _call(self, call: BlockCall, hidden: Tensor, resolve: Callable[[Any], Any]) -> Tensor:
        block = self._blocks.get(call.path)
        if block is None:
            raise InternalError(f"{call.path} isn't at site {self.site}")
        args, kwargs = mapped((tuple(call.args), dict(call.kwargs)), resolve)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs[self._first[call.path]] = hidden
        output = block(*args, **kwargs)
        self._note(call.path, output_kind(call.path, hidden, output))
        return output if isinstance(output, Tensor) else output[0]

    def _note(self, path: str, kind: Nest) -> None:
        if self._outputs.setdefault(path, kind) != kind:
            raise InternalError(f"{path} returned {kind} and had returned {self._outputs[path]}")

    # -- backwards -----------------------------------------------------------------------------------------------

    def wave(
        self, number: int, gradients: Sequence[Tensor | None], work: Nest, mail: Sequence[Mail]
    ) -> tuple[Sequence[Tensor | None], Nest, Sequence[Mail]]:
        """Serve one backward: `gradients` are those of what `visit` returned, in the order of `tracked`."""
        kept = self._kept.get(number)
        if kept is None:
            raise InternalError(f"site {self.site} keeps no graph of forward {number}")

        back: list[Tensor | None] = [None] * len(kept.came)

        def run() -> None:
            pairs = [
                (out, gradient) for out, gradient in zip(kept.left, gradients, strict=True) if gradient is not None
            ]
            if pairs:
                torch.autograd.backward(
                    [out for out, _ in pairs], [gradient for _, gradient in pairs], retain_graph=True
                )
            # Before the guest clears those of the values it watches, which may be what came.
            back[:] = [tensor.grad for tensor in kept.came]

        reply: Nest = None
        new: Sequence[Mail] = ()
        try:
            with no_hooks():
                if self.guest is not None and (work is not None or mail):
                    reply, new = self.guest.wave(work, mail, run)
                else:
                    run()
        finally:
            # What was handed out may be this very memory, and the next backward would add to it in place.
            for tensor in kept.came:
                tensor.grad = None
        return back, reply, readdressed(new, Swapped(_border))

    # -- all else ------------------------------------------------------------------------------------------------

    def errand(self, name: str, request: Nest) -> Nest:
        """Answer for the blocks, or have the guest do it."""
        if name == OUTPUTS:
            return dict(self._outputs)
        if name == HOLD:
            return self._hold()
        if name == RESTORE:
            for buffers in self._held[request]:
                buffers.restore()
            return None
        if name == FORGET:
            self._held.pop(request, None)
            return None
        if self.guest is None:
            raise InternalError(f"site {self.site} serves no graphs")
        return self.guest.errand(name, request)

    def _hold(self) -> int | None:
        if not self._remembering:
            return None
        number = next(self._numbers)
        self._held[number] = [Buffers(block) for block in self._blocks.values()]
        return number

    def drop(self, numbers: Collection[int], caches: Collection[int]) -> None:
        """Forget forwards and caches."""
        for number in numbers:
            self._kept.pop(number, None)
        self._caches.drop(caches)


def first_parameter(block: nn.Module) -> str:
    """The name by which a block takes its hidden states."""
    return next(iter(inspect.signature(block.forward).parameters))


def output_kind(path: str, hidden: Tensor, output: Any) -> Nest:
    """What a block returns of some hidden states: `HIDDEN`, or a list of that first, then None and "tensor".

    Raises InternalError for anything else.
    """
    if isinstance(output, Tensor):
        return HIDDEN if output.dtype == hidden.dtype else f"{HIDDEN}:{str(output.dtype).removeprefix('torch.')}"
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return [output_kind(path, hidden, output[0]), *(_further(path, item) for item in output[1:])]
    raise InternalError(f"{path} returns a {type(output).__name__}, not hidden states or a tuple of them first")


def hidden_dtype(kind: Nest) -> torch.dtype | None:
    """Of the hidden states that a block returns, None for that of those it is given."""
    _, _, name = (kind if isinstance(kind, str) else kind[0]).partition(":")
    dtype: torch.dtype | None = getattr(torch, name) if name else None
    return dtype


def _further(path: str, item: Any) -> Nest:
    if item is None:
        return None
    if nests.tensors(item):
        return "tensor"
    raise InternalError(f"{path} returns a {type(item).__name__} beside its hidden states")


def _border(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
