"""Home's side of a split model: stubs where its blocks were.

A stub takes what its block would be given and returns a placeholder. As long as nobody touches that but the next
stub, calls pile up; then one journey by all the shards concerned makes what was asked for.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InternalError
from ..hooks import CURRENT
from . import caches
from .journey import Trip, differentiable
from .parcels import Swapped, leaf, mapped, moved, readdressed
from .placeholders import Placeholder, Withheld, settled
from .route import ArgumentRef, BlockCall, CacheRef, Carrier, Landing, Mail, Nest, Route, Visit
from .shard import ARGUMENT, OUTPUTS, first_parameter
from .trial import uncollected

_SCALARS = (bool, int, float, str, bytes, type(None))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stub's block is.

    Attributes:
        first: the name by which it takes its hidden states.
    """

    path: str
    site: int
    first: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a stub: its block's arguments without the hidden states, tensors and caches still home's own."""

    place: Place
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Home:
    """What the stubs of one model share.

    Attributes:
        outputs: path -> what the block returns, as `shard.output_kind` says; measured once all blocks were called.
    """

    def __init__(self, route: Route) -> None:
        self.route = route
        self.outputs: dict[str, Nest] = {}
        self._numbers = itertools.count(1)
        self._caches = caches.HomeCaches(lambda number: route.drop(caches=[number]))

    def call(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A stub is called."""
        uncollected()
        hidden, call = _taken(place, args, kwargs)
        pile = hidden.source if isinstance(hidden, Placeholder) else None
        # A placeholder beside the hidden states is a value that must be there first.
        call = replace(call, args=settled(call.args), kwargs={name: settled(v) for name, v in call.kwargs.items()})
        grad = torch.is_grad_enabled()
        if not isinstance(pile, Pile) or not pile.takes(hidden.turn, grad):
            pile = Pile(self, settled(hidden), grad)
        return self._returned(place, pile.add(call))

    def _returned(self, place: Place, hidden: Placeholder) -> Any:
        kind = self.outputs.get(place.path)
        if kind is None:
            # Before it was measured every block is called at once, as nobody knows what it returns.
            hidden.settled()
            self.outputs.update(self.route.errand(place.site, OUTPUTS, None))
            kind = self.outputs[place.path]
        if isinstance(kind, str):
            return hidden
        return (hidden, *(None if part is None else Withheld(place.path) for part in kind[1:]))

    # -- journeys ------------------------------------------------------------------------------------------------

    def go(self, hidden: Tensor, calls: Sequence[Call], *, grad: bool) -> Tensor:
        """Make what the last of some calls returns."""
        scope = CURRENT.get()
        visitor = None if scope is None else scope.visitor
        carrier = visitor if isinstance(visitor, Carrier) else None
        attention = visitor is not None and visitor.attention
        left = [*calls]
        stayed = False
        while left:
            reach = left[-1].place.site if carrier is None else carrier.reach()
            leg = _leg(left, reach)
            if carrier is not None and not leg:
                if stayed:
                    raise InternalError("a forward goes no further, and doesn't end")
                carrier.landed(Landing(hidden))
                stayed = True
                continue
            stayed = False
            hidden = self._leg(hidden, leg, carrier, attention=attention, grad=grad)
            left = left[len(leg) :]
        return hidden

    def _leg(
        self, hidden: Tensor, calls: Sequence[Call], carrier: Carrier | None, *, attention: bool, grad: bool
    ) -> Tensor:
        """One journey by shards in ascending order."""
        packed = _Packed(self._caches)
        visits, mail = [], list[Mail]()
        for site, group in itertools.groupby(calls, key=lambda call: call.place.site):
            block_calls = tuple(packed.call(call, site) for call in group)
            work, letters = (None, ()) if carrier is None else carrier.load(site)
            mail += letters
            visits.append(Visit(site, block_calls, work, attention, grad))
        sites = [visit.site for visit in visits]
        number = next(self._numbers)
        mail += [*packed.mail, *self._caches.mail(packed.caches, sites)]
        border = Swapped(leaf if grad else Tensor.detach)
        sent = (border(hidden), readdressed(mail, border))
        landing = self.route.forward(number, sent[0], visits, sent[1])
        words = [letter for letter in landing.mail if letter.address[0] == caches.ADDRESS]
        self._caches.landed(packed.caches, words, hidden.device)
        home = Swapped(lambda tensor: moved(tensor, hidden.device))
        letters = [letter for letter in landing.mail if letter.address[0] != caches.ADDRESS]
        landing = replace(landing, hidden=home(landing.hidden), mail=tuple(readdressed(letters, home)))
        if grad:
            trip = Trip(self.route, number, tuple(sites), carrier)
            landing = differentiable(trip, (hidden, mail), landing)
        if carrier is not None:
            carrier.landed(landing)
        if landing.hidden is None:
            raise InternalError("a forward ended on a shard, and its visitor goes on")
        return landing.hidden


def _taken(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Call]:
    """A call's hidden states, and the rest."""
    if args:
        return args[0], Call(place, (None, *args[1:]), kwargs)
    if place.first not in kwargs:
        raise InternalError(f"{place.path} was called without {place.first}")
    return kwargs[place.first], Call(place, (), {**kwargs, place.first: None})


def _leg(calls: Sequence[Call], reach: int) -> list[Call]:
    """The first of some calls whose sites ascend, up to one site."""
    found: list[Call] = []
    for call in calls:
        if call.place.site > reach or (found and call.place.site < found[-1].place.site):
            break
        found.append(call)
    return found


class _Packed:
    """Calls made ready to travel, with what must come beside them."""

    def __init__(self, known: caches.HomeCaches) -> None:
        self._known = known
        self.caches: list[Any] = []
        self._refs: dict[int, CacheRef] = {}
        self.mail: list[Mail] = []
        self._numbers: dict[tuple[int, int], int] = {}
        self._bare = Swapped(Tensor.detach)

    def call(self, call: Call, site: int) -> BlockCall:
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
        if caches.is_cache(value):
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


class Pile:
    """Calls of stubs that follow one another, each given just what the one before returned."""

    def __init__(self, home: Home, hidden: Tensor, grad: bool) -> None:
        self._home = home
        self._hidden = hidden
        self._grad = grad
        self._calls: list[Call] = []
        self._made: list[weakref.ref[Placeholder]] = []
        self._values: dict[int, Tensor] = {}
        self._error: BaseException | None = None
        self._done = False

    def takes(self, turn: int, grad: bool) -> bool:
        """Whether a call on what the call of that turn returned can join."""
        return not self._done and grad == self._grad and turn == len(self._calls) - 1

    def add(self, call: Call) -> Placeholder:
        made = Placeholder(self._hidden, self, len(self._calls))
        self._calls.append(call)
        self._made.append(weakref.ref(made))
        return made

    def value(self, turn: int) -> Tensor:
        """What a call returned; the first time, all calls are made. Raises again what that raised."""
        if not self._done:
            self._done = True
            try:
                self._flush(turn)
            except BaseException as error:
                self._error = error
                raise
            finally:
                self._calls.clear()
        if self._error is not None:
            raise self._error
        return self._values[turn]

    def _flush(self, asked: int) -> None:
        hidden = self._hidden
        with _apart(), torch.set_grad_enabled(self._grad):
            for start, end in self._stretches(asked):
                hidden = self._home.go(hidden, self._calls[start:end], grad=self._grad)
                self._values[end - 1] = hidden
                if (made := self._made[end - 1]()) is not None and (
                    hidden.shape != made.shape or hidden.dtype != made.dtype
                ):
                    path = self._calls[end - 1].place.path
                    raise InternalError(
                        f"{path} makes {tuple(hidden.shape)} {hidden.dtype} of {tuple(made.shape)} {made.dtype}"
                    )

    def _stretches(self, asked: int) -> Iterator[tuple[int, int]]:
        """Calls between values that somebody still has, or asks for."""
        start = 0
        last = len(self._calls) - 1
        for index, made in enumerate(self._made):
            if index in (asked, last) or made() is not None:
                yield start, index + 1
                start = index + 1


@contextmanager
def _apart() -> Iterator[None]:
    """What is done inside is nobody's function call."""
    scope = CURRENT.get()
    if scope is not None:
        scope.running.append(None)
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        if scope is not None:
            scope.running.pop()


# -- making stubs ------------------------------------------------------------------------------------------------


def stub(block: nn.Module, home: Home, place: Place) -> nn.Module:
    """What stands for a block: of a class of its own kind, with its plain attributes and none of its parts."""
    kind: Any = type(block)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return home.call(place, args, kwargs)

    cls: Any = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    made: nn.Module = cls.__new__(cls)
    nn.Module.__init__(made)
    own = set(vars(made))
    for name, value in vars(block).items():
        if name not in own and name not in ("forward", "_hf_hook", "_old_forward"):
            made.__dict__[name] = value
    _library_hooks(block, made)
    return made.eval()


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def _library_hooks(block: nn.Module, made: nn.Module) -> None:
    """The library's own hooks on a block's output, by which it collects hidden states, are the stub's as well."""
    kept = {key for key, hook in block._forward_hooks.items() if _of_library(hook)}
    for name in _HOOKS:
        hooks = getattr(block, name)
        getattr(made, name).update(OrderedDict((key, hook) for key, hook in hooks.items() if key in kept))


def _of_library(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def settle_exit(model: nn.Module) -> None:
    """What a model returns holds no placeholders."""

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        found = settled(output)
        return None if found is output else found

    model.register_forward_hook(leave)


def places(route: Route, blocks: Mapping[str, nn.Module]) -> dict[str, Place]:
    return {path: Place(path, route.sites[path], first_parameter(block)) for path, block in blocks.items()}
