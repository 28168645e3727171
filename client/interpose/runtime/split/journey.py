"""A journey by the shards as one step of home's graph of gradients."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .mapping import Swapped, readdressed
from .route import Landing, Mail, Nest, Route, Waves
from .station import tracked


class Trip:
    """A forward whose graph shards keep, as long as home's graph holds this.

    Attributes:
        came: what came home requiring gradients.
    """

    def __init__(self, route: Route, number: int, sites: tuple[int, ...], waves: Waves | None) -> None:
        self.route = route
        self.number = number
        self.sites = sites
        self.waves = waves
        self.came: Sequence[Tensor] = ()
        end = weakref.finalize(self, route.drop, [number])
        end.atexit = False

    def back(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Go back by the shards."""
        work: dict[int, Nest] = {}
        mail: list[Mail] = []
        for site in self.sites if self.waves is not None else ():
            assert self.waves is not None
            work[site], letters = self.waves.wave(site)
            mail += letters
        found, landing = self.route.backward(self.number, gradients, work, mail)
        if self.waves is not None:
            self.waves.ebbed(landing)
        return found


class _Journey(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, _: Tensor, *sent: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        ctx.devices = [tensor.device for tensor in sent]
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in trip.came)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        found = zip(ctx.trip.back(gradients), ctx.devices, strict=True)
        return None, None, *(None if part is None else part.to(device) for part, device in found)


def differentiable(trip: Trip, sent: tuple[Tensor, Sequence[Mail]], landing: Landing) -> Landing:
    """The landing with what requires gradients tied to what was sent, so that a backward goes by the shards.

    Values that shards themselves watch have their gradients so even where nothing that was sent requires any.
    """
    trip.came = tracked(landing.hidden, landing.mail)
    if not trip.came:
        return landing
    anchor = torch.empty((), requires_grad=True)
    tied = _Journey.apply(trip, anchor, *tracked(*sent))  # type: ignore[no-untyped-call]
    by_id = {id(raw): tensor for raw, tensor in zip(trip.came, tied, strict=True)}
    swap = Swapped(lambda tensor: by_id.get(id(tensor), tensor))
    return replace(landing, hidden=swap(landing.hidden), mail=tuple(readdressed(landing.mail, swap)))
