"""Background tasks: waiting for them within a time, beside them, ending them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


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


async def within(seconds: float, work: Awaitable[T]) -> T:
    """What some work gives, if it does so in time. Raises TimeoutError.

    What is late is cancelled, and not waited for: the Redis client may lose a cancellation, see `end`.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
        if not done:
            raise TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            # Asked for, or the loop complains that nobody did.
            task.add_done_callback(lambda late: late.cancelled() or late.exception())
