"""Ending background tasks."""

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
