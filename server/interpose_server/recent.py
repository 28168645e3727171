"""Answers that are asked for once for all who want to know within a moment."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """`await recent()`: what `ask` last gave, asked again when that is older than `fresh_s`.

    However many want to know, it is asked once at a time. What it raises is raised to all who wait for it then.

    Args:
        within_s: TimeoutError is raised to who would wait for longer than that since it was asked; it isn't asked
            again before it has answered.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], fresh_s: float, within_s: float = math.inf) -> None:
        self._ask = ask
        self._fresh_s = fresh_s
        self._within_s = within_s
        self._found: tuple[float, T] | None = None
        self._asking: asyncio.Task[T] | None = None
        self._since = 0.0
        """When it was asked."""

    async def __call__(self, fresh_s: float | None = None) -> T:
        """Args: fresh_s: how old an answer may be, where that isn't as usual."""
        old = self._fresh_s if fresh_s is None else fresh_s
        if self._found is not None and time.monotonic() - self._found[0] <= old:
            return self._found[1]
        if self._asking is None:
            self._asking, self._since = asyncio.create_task(self._asked()), time.monotonic()
            # Of what is raised once nobody waits any more.
            self._asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        asking, left_s = self._asking, self._since + self._within_s - time.monotonic()
        await asyncio.wait([asking], timeout=None if left_s == math.inf else max(left_s, 0))
        if not asking.done():
            raise TimeoutError
        return asking.result()

    async def _asked(self) -> T:
        try:
            found = await self._ask()
            self._found = time.monotonic(), found
            return found
        finally:
            self._asking = None
