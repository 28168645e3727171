"""Home's side of a split model: stubs where its blocks were.

A stub takes what its block would be given and returns a placeholder. As long as nobody touches that but the next
stub, calls pile up; then one journey by all the shards concerned makes what was asked for.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...errors import InternalError
from ..hooks import CURRENT, Visitor
from . import home_caches
from .journey import Trip, differentiable
from .mapping import Swapped, leaf, moved, readdressed
from .packing import Call, Packing, Place, leg, taken
from .piles import How, Pile
from .placeholders import Placeholder, Withheld, settled
from .route import Carrier, Landing, Mail, Nest, Route, Visit
from .shard import BACK, OUTPUTS, first_parameter, hidden_dtype
from .trial import uncollected


class Dispatcher:
    """Takes the calls of a model's stubs, and has its shards make what somebody looks at.

    Args:
        blocks: path -> the block for which each stub stands, or what is left of it without weights.

    Attributes:
        outputs: path -> what the block returns, as `shard.output_kind` says; measured once all blocks were called.
    """

    def __init__(self, route: Route, blocks: Mapping[str, nn.Module]) -> None:
        self.route = route
        self.blocks = blocks
        self.outputs: dict[str, Nest] = {}
        self._numbers = itertools.count(1)
        self._caches = home_caches.HomeCaches(lambda number: route.drop(caches=[number]))

    def call(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A stub is called."""
        uncollected()
        hidden, call = taken(place, args, kwargs)
        pile = hidden.source if isinstance(hidden, Placeholder) else None
        how = How.now()
        if not isinstance(pile, Pile) or not pile.takes(hidden.turn, how):
            pile = Pile(self._go, settled(hidden), how)
        kind = self.outputs.get(place.path)
        if kind is None:
            # Before it was measured every block is called at once, as nobody knows what it returns.
            made: Tensor = Pile(self._go, settled(hidden), how).first(call)
            self.outputs.update(self.route.errand(place.site, OUTPUTS, None))
            kind = self.outputs[place.path]
        else:
            made = pile.add(call, hidden_dtype(kind))
        if isinstance(kind, str):
            return made
        return (made, *(None if part is None else Withheld(place.path) for part in kind[1:]))

    # -- journeys ------------------------------------------------------------------------------------------------

    def _go(self, hidden: Tensor, calls: Sequence[Call], wanted: Collection[int], how: How) -> Mapping[int, Tensor]:
        """Make what those of some calls return that are wanted, the last among them."""
        visitor = _visitor()
        carrier = visitor if isinstance(visitor, Carrier) else None
        found: dict[int, Tensor] = {}
        begun, stayed = 0, False
        while begun < len(calls):
            reach = calls[-1].place.number if carrier is None else carrier.reach()
            part = leg(calls[begun:], reach)
            if carrier is not None and not part:
                if stayed:
                    raise InternalError("a forward goes no further, and doesn't end")
                carrier.landed(Landing(hidden))
            else:
                asked = {index - begun for index in wanted if begun <= index < begun + len(part)}
                hidden, between = self._leg(hidden, part, asked, carrier, how)
                found |= {begun + index: value for index, value in between.items()}
                begun += len(part)
                found[begun - 1] = hidden
            stayed = not part
        return {index: value for index, value in found.items() if index in wanted}

    def _packed(
        self, calls: Sequence[Call], wanted: Collection[int], carrier: Carrier | None, how: How
    ) -> tuple[list[Visit], list[Mail], Sequence[Any]]:
        """What the shards of one journey are asked, the mail that goes along, and the caches that they use."""
        packing, visitor = Packing(self._caches), _visitor()
        attention = visitor is not None and visitor.attention
        visits, mail = [], list[Mail]()
        earlier = {*wanted} - {len(calls) - 1}
        for site, group in itertools.groupby(enumerate(calls), key=lambda item: item[1].place.site):
            numbered = [*group]
            work, letters = (None, ()) if carrier is None else carrier.load(site)
            packed = tuple(packing.call(call, site) for _, call in numbered)
            visits.append(Visit(site, packed, work, attention, how.grad, how.adapter))
            mail += letters
            if back := [[place, index] for place, (index, _) in enumerate(numbered) if index in earlier]:
                mail.append(Mail(site, (BACK,), back))
        mail += [*packing.mail, *self._caches.mail(packing.caches, [visit.site for visit in visits])]
        return visits, mail, packing.caches

    def _leg(
        self, hidden: Tensor, calls: Sequence[Call], wanted: Collection[int], carrier: Carrier | None, how: How
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        """One journey by shards in ascending order: what the last call returns, and what is wanted of others."""
        visits, mail, caches = self._packed(calls, wanted, carrier, how)
        number = next(self._numbers)
        waves = None if carrier is None else carrier.waves
        trip = Trip(self.route, number, tuple(visit.site for visit in visits), waves) if how.grad else None
        border = Swapped(leaf if how.grad else Tensor.detach)
        try:
            landing = self.route.forward(number, border(hidden), visits, readdressed(mail, border))
            self._caches.landed(caches, landing.mail, hidden.device)
        except BaseException:
            self._caches.spoiled(caches)
            raise
        home = Swapped(lambda tensor: moved(tensor, hidden.device))
        letters = [letter for letter in landing.mail if letter.address[0] != home_caches.ADDRESS]
        landing = replace(landing, hidden=home(landing.hidden), mail=tuple(readdressed(letters, home)))
        if trip is not None:
            landing = differentiable(trip, (hidden, mail), landing)
        between = {letter.address[1]: letter.value for letter in landing.mail if letter.address[0] == BACK}
        landing = replace(landing, mail=tuple(letter for letter in landing.mail if letter.address[0] != BACK))
        if carrier is not None:
            carrier.landed(landing)
        if landing.hidden is None:
            raise InternalError("a forward ended on a shard, and its visitor goes on")
        return landing.hidden, between


def _visitor() -> Visitor | None:
    """Whose forward this is."""
    scope = CURRENT.get()
    return None if scope is None else scope.visitor


# -- making stubs ------------------------------------------------------------------------------------------------


def stub(block: nn.Module, dispatcher: Dispatcher, place: Place) -> nn.Module:
    """What stands for a block: of a class of its own kind, with its plain attributes and none of its parts."""
    kind: Any = type(block)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return dispatcher.call(place, args, kwargs)

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
    """Where each block lies, and by which name it takes its hidden states."""
    numbers = {path: number for number, path in enumerate(route.sites, 1)}
    return {
        path: Place(path, route.sites[path], numbers[path], first_parameter(block))
        for path, block in blocks.items()
    }
