"""What has to happen though nobody asks: lost leases, expired jobs, old files."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

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
                await asyncio.to_thread(_drop, blobs, await broker.queue.sweep())
        except (RedisError, OSError) as error:
            log.warning("the sweep failed (%s); again soon", type(error).__name__)
        await asyncio.sleep(every)


def _drop(blobs: Blobs, gone: Mapping[str, Sequence[str]]) -> None:
    """Delete the results of jobs that are forgotten, and whatever else is past its time."""
    for ref, names in gone.items():
        drop(blobs, keys.split(ref)[0], names)
    blobs.sweep()
