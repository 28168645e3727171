"""What has to happen though nobody asks: lost leases, expired jobs, old files."""

from __future__ import annotations

import asyncio
import logging

from redis.exceptions import RedisError

from .blobs import Blobs
from .broker.connect import Broker
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
                await broker.queue.sweep()
                await asyncio.to_thread(blobs.sweep)
        except (RedisError, OSError) as error:
            log.warning("the sweep failed (%s); again soon", type(error).__name__)
        await asyncio.sleep(every)
