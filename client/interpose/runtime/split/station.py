"""One shard as a route sees it, and the way of mail past it.

What crosses a border arrives as new leaves that require gradients where what was sent did, so each site's part of
the graph ends there; a backward goes from border to border.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...errors import InternalError
from .. import nests
from .route import Ask, Mail, Nest, Visit


class Station(Protocol):
    """What a shard does when a forward or a backward comes by. All but errands on its one compute thread."""

    def visit(
        self, number: int, hidden: Tensor, visit: Visit, mail: Sequence[Mail]
    ) -> tuple[Tensor | None, Nest, Sequence[Mail]]:
        """Serve one forward. `mail` is what is addressed here. With `visit.grad` its graph stays until dropped.

        Returns hidden states (None: no later shard is needed), the guest's reply, and new mail. One that raises
        leaves nothing behind: neither its graph, nor jobs that began with it, nor the caches that it was to use,
        which may hold a part of it.
        """

    def wave(
        self, number: int, gradients: Sequence[Tensor | None], work: Nest, mail: Sequence[Mail]
    ) -> tuple[Sequence[Tensor | None], Nest, Sequence[Mail]]:
        """Serve one backward: gradients of what `visit` returned, in the order of `tracked`.

        Returns those of what it had been given, likewise, the guest's reply, and new mail.
        """

    def errand(self, name: str, request: Nest) -> Nest:
        """Anything beside; on another thread, while forwards are under way."""

    def drop(self, numbers: Collection[int], caches: Collection[int]) -> None:
        """Forget forwards and caches; unknown ones are none of its business."""


def tracked(hidden: Tensor | None, mail: Sequence[Mail]) -> list[Tensor]:
    """What of a parcel requires gradients: hidden states first, then the mail's tensors, each once."""
    found = [] if hidden is None else [hidden]
    found += [tensor for letter in mail for _, tensor in nests.tensors(letter.value)]
    return list({id(tensor): tensor for tensor in found if tensor.requires_grad}.values())


def sort_out(site: int, mail: Sequence[Mail]) -> tuple[list[Mail], list[Mail]]:
    """What of the mail is for a site, and what goes on."""
    return [letter for letter in mail if letter.to == site], [letter for letter in mail if letter.to != site]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What of one forward requires gradients: what came, what of it was given to the station and what went on; what
    the station returned, and what left for the next site."""

    came: Sequence[Tensor]
    given: Sequence[Tensor]
    passed: Sequence[Tensor]
    returned: Sequence[Tensor]
    left: Sequence[Tensor]


_ASK: ContextVar[Ask | None] = ContextVar("interpose_ask", default=None)


@contextmanager
def asking(ask: Ask | None) -> Iterator[None]:
    """Inside, a forward or a backward is served, and others are asked by this way; by none, nobody is.

    Whoever does an errand asks nobody: so whoever waits for one waits for nobody who waits, and no circle closes.
    """
    token = _ASK.set(ask)
    try:
        yield
    finally:
        _ASK.reset(token)


def way() -> Ask:
    """How others are asked. Raises InternalError where that isn't allowed."""
    ask = _ASK.get()
    if ask is None:
        raise InternalError("other sites are asked only while a forward or a backward is served")
    return ask


class Stop:
    """A station on the way: mail for other sites goes past it, and so do that mail's gradients on the way back."""

    def __init__(self, site: int, station: Station) -> None:
        self.site = site
        self.station = station
        self._entries: dict[int, _Entry] = {}

    def forward(
        self, number: int, hidden: Tensor, visit: Visit, mail: Sequence[Mail]
    ) -> tuple[Tensor | None, Nest, list[Mail]]:
        """Serve a forward. Returns hidden states (None: no later shard is needed), the reply, mail that goes on."""
        own, passing = sort_out(self.site, mail)
        result, reply, new = self.station.visit(number, hidden, visit, own)
        leaving = [*passing, *new]
        if visit.grad:
            self._entries[number] = _Entry(
                came=tracked(hidden, mail),
                given=tracked(hidden, own),
                passed=tracked(None, passing),
                returned=tracked(result, new),
                left=tracked(result, leaving),
            )
        return result, reply, leaving

    def backward(
        self, number: int, gradients: Sequence[Tensor | None], work: Nest, mail: Sequence[Mail]
    ) -> tuple[list[Tensor | None], Nest, list[Mail]]:
        """Serve a backward. `gradients` and what is returned are those of what left, and of what came."""
        entry = self._entries[number]
        own, passing = sort_out(self.site, mail)
        at_exit = {id(tensor): gradient for tensor, gradient in zip(entry.left, gradients, strict=True)}
        past = {id(tensor): at_exit[id(tensor)] for tensor in entry.passed}
        asked = [None if id(tensor) in past else at_exit[id(tensor)] for tensor in entry.returned]
        found, reply, new = self.station.wave(number, asked, work, own)
        here = {id(tensor): gradient for tensor, gradient in zip(entry.given, found, strict=True)}
        back = [_sum(here.get(id(tensor)), past.get(id(tensor))) for tensor in entry.came]
        return back, reply, [*passing, *new]

    def drop(self, numbers: Collection[int], caches: Collection[int]) -> None:
        for number in numbers:
            self._entries.pop(number, None)
        self.station.drop(numbers, caches)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other
