"""Answers that are asked for once for all who want to know within a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """`await recent()`: what `ask` last gave, asked again when that is older than `fresh_s`.

    However many want to know, one asks at a time. What it raises is raised to who asked alone.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], fresh_s: float) -> None:
        self._ask = ask
        self._fresh_s = fresh_s
        self._found: tuple[float, T] | None = None
        self._lock = asyncio.Lock()

    async def __call__(self) -> T:
        async with self._lock:
            if self._found is None or time.monotonic() - self._found[0] > self._fresh_s:
                found = await self._ask()
                self._found = time.monotonic(), found
            return self._found[1]
