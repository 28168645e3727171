"""What has to happen though nobody asks: lost leases, expired jobs, old files."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial

from interpose.errors import ConfigError, StorageUnavailable
from redis.exceptions import RedisError

from .blobs import Blobs
from .broker import keys
from .broker.connect import Broker
from .results import drop
from .settings import Settings

log = logging.getLogger(__name__)

CALM_S = 5.0
"""So long after the broker was away, at least, nobody is taken for dead: calls are retried for three seconds."""

LATE_S = 2.0
"""A sweep that comes so much too late shows a machine that is too busy to tell who lives."""


async def sweep_forever(settings: Settings, broker: Broker, blobs: Blobs) -> None:
    """Reap leases every second, sweep jobs and blobs every `sweep_s`. Any number of processes may do so."""
    every = min(1.0, settings.lease_s / 3)
    due = calm = 0.0
    while True:
        try:
            # While the broker was away nobody could say that they live: first they are given time to.
            trusted = time.monotonic() > calm
            await (_reap(broker) if trusted else broker.reach())
            due -= every
            if due <= 0:
                due = settings.sweep_s
                if trusted:
                    await _bury(broker)
                gone = await broker.queue.sweep()
                await blobs.run(partial(_drop, blobs, gone))
        except (RedisError, OSError, ConfigError) as error:
            calm = time.monotonic() + max(settings.lease_s, CALM_S)
            log.warning("the sweep failed (%s); again soon", type(error).__name__)
        except StorageUnavailable:
            log.warning("the blob store can't be swept; again soon")
        asleep = time.monotonic()
        await asyncio.sleep(every)
        if time.monotonic() - asleep > every + LATE_S:
            # Whoever else runs on this machine may have been held up as long.
            calm = time.monotonic() + max(settings.lease_s, CALM_S)


async def _reap(broker: Broker) -> None:
    for ref, status in await broker.queue.reap():
        log.warning("job %s lost its worker; now %s", ref.partition("/")[2], status)


async def _bury(broker: Broker) -> None:
    for worker in await broker.models.bury():
        log.warning("%s fell silent while it loaded its model; it counts as lost", worker)
    for name in await retire(broker):
        log.info("%s is gone from the catalogue", name)


async def retire(broker: Broker) -> list[str]:
    """Drop from the catalogue what was removed and has nothing more to do. Returns the names."""
    return [name for name in await broker.specs.removed() if await broker.models.retire(name)]


def _drop(blobs: Blobs, gone: Mapping[str, Sequence[str]]) -> None:
    """Delete the results of jobs that are forgotten, and whatever else is past its time."""
    for ref, names in gone.items():
        drop(blobs, keys.split(ref)[0], names)
    blobs.sweep()
