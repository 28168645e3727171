"""What has to happen though nobody asks: lost leases, expired jobs, old files."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import partial

from interpose.errors import StorageUnavailable
from redis.exceptions import RedisError

from .blobs import Blobs
from .broker import keys
from .broker.connect import Broker
from .results import drop
from .settings import Settings

log = logging.getLogger(__name__)


async def sweep_forever(settings: Settings, broker: Broker, blobs: Blobs) -> None:
    """Reap leases every second, sweep jobs and blobs every `sweep_s`. Any number of processes may do so."""
    every = min(1.0, settings.lease_s / 3)
    due = 0.0
    while True:
        try:
            for ref, status in await broker.queue.reap():
                log.warning("job %s lost its worker; now %s", ref.partition("/")[2], status)
            due -= every
            if due <= 0:
                due = settings.sweep_s
                for worker in await broker.models.bury():
                    log.warning("%s died while it loaded its model", worker)
                for name in await retire(broker):
                    log.info("%s is gone from the catalogue", name)
                gone = await broker.queue.sweep()
                await blobs.run(partial(_drop, blobs, gone))
        except (RedisError, OSError, StorageUnavailable) as error:
            log.warning("the sweep failed (%s); again soon", type(error).__name__)
        await asyncio.sleep(every)


async def retire(broker: Broker) -> list[str]:
    """Drop from the catalogue what was removed and has nothing more to do. Returns the names."""
    gone = []
    for entry in await broker.specs.entries():
        if not entry.removed:
            continue
        hosted, demand = await broker.models.get(entry.spec.name), await broker.queue.demand(entry.spec.name)
        if not (hosted.copies or demand.waiting or demand.running):
            await broker.models.forget(hosted.name)
            gone.append(hosted.name)
    return gone


def _drop(blobs: Blobs, gone: Mapping[str, Sequence[str]]) -> None:
    """Delete the results of jobs that are forgotten, and whatever else is past its time."""
    for ref, names in gone.items():
        drop(blobs, keys.split(ref)[0], names)
    blobs.sweep()
