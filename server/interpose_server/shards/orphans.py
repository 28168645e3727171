"""Replicas that Ray knows are dead, whose jobs are queued again before their leases end; and those that hang."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from functools import cache

import ray
from interpose.errors import ConfigError, InternalError

from ..broker.connect import Broker
from ..broker.states import ModelState
from . import ray_internals
from .naming import actor_of
from .ray_internals import Death

log = logging.getLogger(__name__)

SERVE = "serve"
"""Ray's namespace of replicas."""

NOTICED_S = 10.0
"""A copy is ended if its silence has lasted so long under the eyes of who ends it."""


async def reap_orphans(broker: Broker) -> None:
    for hosted in await broker.models.list():
        for worker, own in hosted.copies.items():
            death = await asyncio.to_thread(_death, worker)
            if death is None:
                continue
            requeued = await broker.queue.reap(worker)
            log.warning("%s, a copy of %s, is dead; it held %d jobs", worker, hosted.name, len(requeued))
            # Serve kills one that is wanted no longer before it's ready, which is no failure.
            if own is ModelState.LOADING and death is not Death.KILLED:
                why = InternalError(f"{worker} died while it loaded {hosted.name}")
                await broker.models.announce(hosted.name, worker, ModelState.FAILED, why)
            await broker.models.announce(hosted.name, worker, ModelState.STOPPED)


class Hanging:
    """Ends replicas that say nothing for long, though they should.

    Serve waits for one that it stops as long as jobs may take, whether or not it does anything. One that loads, or
    stands by, isn't meant.
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        """Worker -> when its silence was noticed: after the broker was away all have been silent for a moment."""

    async def end(self, broker: Broker) -> None:
        now = time.monotonic()
        lost = [one for one in await broker.models.lost() if one.state in (ModelState.READY, ModelState.DRAINING)]
        self._since = {one.worker: self._since.get(one.worker, now) for one in lost}
        for one in lost:
            if now - self._since[one.worker] < NOTICED_S:
                continue
            if await asyncio.to_thread(_kill, one.worker):
                log.warning("%s, a copy of %s, hung for %.0f s; it is ended", one.worker, one.model, one.silent_s)
            await broker.models.announce(one.model, one.worker, ModelState.STOPPED)


def _kill(worker: str) -> bool:
    """Whether a replica lived until now."""
    actor = actor_of(worker)
    found = ray_internals.living(actor) if actor else None
    if found is None:
        return False
    with suppress(ValueError):  # it has just gone
        ray.kill(ray.get_actor(found.name, namespace=SERVE))
    return True


def _death(worker: str) -> Death | None:
    """How a worker's actor died; None while it lives, of one that Ray never knew, and where Ray doesn't tell."""
    actor = actor_of(worker)
    try:
        return ray_internals.death(actor) if actor else None
    except ConfigError as error:
        _untold(str(error))
        return None


@cache
def _untold(why: str) -> None:
    """Said once."""
    log.error("jobs of replicas that die wait until their leases end: %s", why)
