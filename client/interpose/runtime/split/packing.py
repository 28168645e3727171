"""Calls of stubs, made ready to travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InternalError
from . import home_caches
from .mapping import Swapped, mapped
from .placeholders import Withheld, settled
from .route import ArgumentRef, BlockCall, CacheRef, Mail
from .shard import ARGUMENT

_SCALARS = (bool, int, float, str, bytes, type(None))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stub's block is.

    Attributes:
        number: of the block among all, from 1 on.
        first: the name by which it takes its hidden states.
    """

    path: str
    site: int
    number: int
    first: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a stub: its block's arguments without the hidden states, tensors and caches still home's own."""

    place: Place
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def taken(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Call]:
    """A call's hidden states, and the rest. A placeholder among that is a value that must be there first."""
    rest = {name: settled(value) for name, value in kwargs.items() if args or name != place.first}
    if args:
        return args[0], Call(place, (None, *map(settled, args[1:])), rest)
    if place.first not in kwargs:
        raise InternalError(f"{place.path} was called without {place.first}")
    return kwargs[place.first], Call(place, (), {place.first: None, **rest})


def leg(calls: Sequence[Call], reach: int) -> list[Call]:
    """The first of some calls whose sites ascend, up to one block by its number."""
    found: list[Call] = []
    for call in calls:
        if call.place.number > reach or (found and call.place.site < found[-1].place.site):
            break
        found.append(call)
    return found


class Packing:
    """The calls of one journey, with what must come beside them.

    Attributes:
        caches: those that are among the arguments.
        mail: arguments whose gradients go back.
    """

    def __init__(self, known: home_caches.HomeCaches) -> None:
        self._known = known
        self.caches: list[Any] = []
        self.mail: list[Mail] = []
        self._refs: dict[int, CacheRef] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._bare = Swapped(Tensor.detach)

    def call(self, call: Call, site: int) -> BlockCall:
        """Raises InternalError for an argument that can't travel."""

        def pack(name: str) -> Callable[[Any], Any]:
            return lambda value: self._value(value, site, f"{call.place.path} is given {name}")

        args = tuple(mapped(value, pack(f"argument {index}")) for index, value in enumerate(call.args))
        kwargs = {name: mapped(value, pack(name)) for name, value in call.kwargs.items()}
        return BlockCall(call.place.path, args, kwargs)

    def _value(self, value: Any, site: int, where: str) -> Any:
        if type(value) in _SCALARS:
            return value
        if isinstance(value, Withheld):
            raise InternalError(f"{where}, which {value.path} returned beside its hidden states and stays there")
        if isinstance(value, Tensor):
            tracked = value.requires_grad and torch.is_grad_enabled()
            return self._argument(value, site) if tracked else self._bare(value)
        if home_caches.is_cache(value):
            if id(value) not in self._refs:
                self._refs[id(value)] = self._known.ref(value)
                self.caches.append(value)
            return self._refs[id(value)]
        raise InternalError(f"{where}, a {type(value).__name__}, which can't be sent to a shard")

    def _argument(self, value: Tensor, site: int) -> ArgumentRef:
        number = self._numbers.get((id(value), site))
        if number is None:
            number = self._numbers[id(value), site] = len(self._numbers)
            self.mail.append(Mail(site, (ARGUMENT, number), value))
        return ArgumentRef(number)
