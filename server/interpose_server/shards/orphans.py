"""Replicas that Ray knows are dead, whose jobs are queued again before their leases end; those that hang; and those
that wait for a place that nobody wants for them any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache

import ray
from interpose.errors import ConfigError, InternalError
from ray.exceptions import RayError

from ..broker.connect import Broker
from ..broker.states import ModelState
from . import ray_internals
from .naming import actor_of, app_name, is_copy, is_replica
from .ray_internals import Death, Living, Stopping

log = logging.getLogger(__name__)

SERVE = "serve"
"""Ray's namespace of replicas."""

SPEAKING = frozenset({ModelState.READY, ModelState.DRAINING})
"""States in which a copy says every second that it lives."""

NOTICED_S = 10.0
"""A copy that Serve waits for is ended if its silence has lasted so long under the eyes of who ends it."""

CUT_OFF_S = 600.0
"""The same of one that Serve finds well: it may be cut off from the broker alone, and takes long to load."""


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

    Serve waits for one that it stops, as its health check failed or it is wanted no longer, as long as jobs may
    take, whether or not it does anything. One that loads, or stands by, isn't meant. Nothing is lost by waiting:
    the leases of one that is silent end, and others run its jobs.
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        """Worker -> when its silence was noticed: after the broker was away all have been silent for a moment."""

    async def end(self, broker: Broker) -> None:
        now = time.monotonic()
        before, self._since = self._since, {}  # it begins anew if the broker doesn't answer
        lost = [one for one in await broker.models.lost() if one.state in SPEAKING and actor_of(one.worker)]
        self._since = {one.worker: before.get(one.worker, now) for one in lost}
        noticed = [one for one in lost if now - self._since[one.worker] >= NOTICED_S]
        stopping = await asyncio.to_thread(_stopping) if noticed else Stopping()
        for one in noticed:
            found = await asyncio.to_thread(_living, one.worker)
            if found is not None:
                told_to = app_name(one.model) in stopping.apps or actor_of(one.worker) in stopping.actors
                going = told_to or one.state is ModelState.DRAINING
                if not going and now - self._since[one.worker] < CUT_OFF_S:
                    continue
                await asyncio.to_thread(_kill, found.name)
                log.warning("%s, a copy of %s, hung for %.0f s; it is ended", one.worker, one.model, one.silent_s)
            await broker.models.announce(one.model, one.worker, ModelState.STOPPED)


async def end_unplaced() -> frozenset[str]:
    """End replicas that Serve has told to stop, and that have no process yet. Returns the actors that still wait.

    Serve waits for their answer as for that of one that has jobs, and it can't come while there is no room. The
    replica would count as pending, and take the devices of a node that is added. Serve then gives up its place.
    """
    waiting = await asyncio.to_thread(_waiting)
    ended = unplaced(await asyncio.to_thread(_stopping), waiting) if waiting else []
    for name in ended:
        await asyncio.to_thread(_kill, name)
        log.warning("%s, which is wanted no longer, had no place yet; it is ended", name)
    return frozenset(waiting.difference(ended))


def unplaced(stopping: Stopping, waiting: Iterable[str]) -> list[str]:
    """Those of the actors that wait for a place that are copies of a model and are to stop, by name."""
    copies = filter(is_copy, waiting)
    return [
        name for name in copies if name in stopping.names or any(is_replica(name, app) for app in stopping.apps)
    ]


def _waiting() -> set[str]:
    try:
        return ray_internals.waiting()
    except (ConfigError, RayError) as error:
        _untold("copies that find no place, and are wanted no longer, wait on", str(error))
        return set()


def _living(worker: str) -> Living | None:
    actor = actor_of(worker)
    return ray_internals.living(actor) if actor else None


def _kill(name: str) -> None:
    with suppress(ValueError):  # it has just gone
        ray.kill(ray.get_actor(name, namespace=SERVE))


def _stopping() -> Stopping:
    """What Serve waits for; nothing where this Ray doesn't tell."""
    try:
        return ray_internals.stopping()
    except (ConfigError, RayError) as error:  # its controller may just be away, and the rest has to go on
        _untold(f"copies that hang are ended after {CUT_OFF_S:g} s", str(error))
        return Stopping()


def _death(worker: str) -> Death | None:
    """How a worker's actor died; None while it lives, of one that Ray never knew, and where Ray doesn't tell."""
    actor = actor_of(worker)
    try:
        return ray_internals.death(actor) if actor else None
    except ConfigError as error:
        _untold("jobs of replicas that die wait until their leases end", str(error))
        return None


@cache
def _untold(what: str, why: str) -> None:
    """Said once."""
    log.error("%s: %s", what, why)
