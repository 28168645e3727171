"""Background tasks: waiting beside them, ending them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they are over.

    Cancelled once isn't enough: the Redis client loses a cancellation that comes while it connects.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=0.1)
        for task in done:
            if not task.cancelled():
                # Asked for, or the loop complains that nobody did.
                task.exception()


async def either(bell: asyncio.Task[None], event: asyncio.Event, timeout_s: float | None) -> bool:
    """Return when the bell has rung, the event is set, or time is up: whether it rang. Raises what the bell raised.
    An unrung bell stays."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([bell, waiting], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if bell.done():
            bell.result()
        return bell.done()
    finally:
        await end([waiting])
