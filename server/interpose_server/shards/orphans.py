"""Jobs of replicas that Ray knows are dead: queued again at once, where their leases would take a while to end."""

from __future__ import annotations

import asyncio
import logging

from interpose.errors import InternalError
from ray._private import state

from ..broker.connect import Broker
from ..broker.states import ModelState
from .naming import actor_of

log = logging.getLogger(__name__)


async def reap_orphans(broker: Broker) -> None:
    for hosted in await broker.models.list():
        for worker, own in hosted.copies.items():
            if not await asyncio.to_thread(_dead, worker):
                continue
            requeued = await broker.queue.reap(worker)
            log.warning("%s, a copy of %s, is dead; it held %d jobs", worker, hosted.name, len(requeued))
            if own is ModelState.LOADING:
                why = InternalError(f"{worker} died while it loaded {hosted.name}")
                await broker.models.announce(hosted.name, worker, ModelState.FAILED, why)
            await broker.models.announce(hosted.name, worker, ModelState.STOPPED)


def _dead(worker: str) -> bool:
    """Whether Ray knows that a worker's actor is no more; not of one it never knew, which isn't of this cluster."""
    actor = actor_of(worker)
    found = state.actors(actor_id=actor) if actor else {}
    return bool(found) and found["State"] == "DEAD"
