"""Jobs of replicas that Ray knows are dead: queued again at once, where their leases would take a while to end."""

from __future__ import annotations

import asyncio
import logging
from functools import cache

from interpose.errors import ConfigError, InternalError

from ..broker.connect import Broker
from ..broker.states import ModelState
from . import ray_internals
from .naming import actor_of
from .ray_internals import Death

log = logging.getLogger(__name__)


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
