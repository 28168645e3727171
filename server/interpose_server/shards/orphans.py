"""Jobs of replicas that Ray knows are dead: queued again at once, where their leases would take a while to end."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from interpose.errors import InternalError
from ray._private import state
from ray.core.generated import common_pb2

from ..broker.connect import Broker
from ..broker.states import ModelState
from .naming import actor_of

_messages: Any = common_pb2  # which has what is in it at run time only
KILLED: int = _messages.ActorDiedErrorContext.Reason.Value("RAY_KILL")
"""Serve ended it, as it does one that is wanted no longer before it's ready."""

log = logging.getLogger(__name__)


async def reap_orphans(broker: Broker) -> None:
    for hosted in await broker.models.list():
        for worker, own in hosted.copies.items():
            death = await asyncio.to_thread(_death, worker)
            if death is None:
                continue
            requeued = await broker.queue.reap(worker)
            log.warning("%s, a copy of %s, is dead; it held %d jobs", worker, hosted.name, len(requeued))
            if own is ModelState.LOADING and death != KILLED:
                why = InternalError(f"{worker} died while it loaded {hosted.name}")
                await broker.models.announce(hosted.name, worker, ModelState.FAILED, why)
            await broker.models.announce(hosted.name, worker, ModelState.STOPPED)


def _death(worker: str) -> int | None:
    """Why a worker's actor is no more, by Ray's numbers; None while it lives, and of one that Ray never knew."""
    actor = actor_of(worker)
    found = state.actors(actor_id=actor) if actor else {}
    if not found or found["State"] != "DEAD":
        return None
    return int(found["DeathCause"].actor_died_error_context.reason)
