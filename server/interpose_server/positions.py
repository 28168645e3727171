"""Places in the queue, read once for all who wait for one model."""

from __future__ import annotations

import asyncio
import time

from .broker.queue import Queue


class Positions:
    """The order of a model's queue, at most `fresh_s` old."""

    def __init__(self, queue: Queue, fresh_s: float) -> None:
        self._queue = queue
        self._fresh_s = fresh_s
        self._orders: dict[str, tuple[float, dict[str, int]]] = {}
        self._lock = asyncio.Lock()

    async def place(self, model: str, ref: str) -> int | None:
        """1 for the next; None for a job that isn't among the first few hundred."""
        async with self._lock:
            at, order = self._orders.get(model, (0.0, {}))
            if time.monotonic() - at > self._fresh_s:
                refs = await self._queue.order(model)
                order = {other: place for place, other in enumerate(refs, 1)}
                self._orders[model] = time.monotonic(), order
        return order.get(ref)
