"""Whether the blob store answers, asked once for all who want to know within a few seconds."""

from __future__ import annotations

import asyncio
import time

from interpose.errors import StorageUnavailable

from .blobs import Blobs


class Reaching:
    """Args: fresh_s: how old an answer may be."""

    def __init__(self, blobs: Blobs, fresh_s: float = 2.0) -> None:
        self._blobs = blobs
        self._fresh_s = fresh_s
        self._asked: tuple[float, bool] = (-fresh_s, False)
        self._lock = asyncio.Lock()

    async def __call__(self) -> bool:
        async with self._lock:
            if time.monotonic() - self._asked[0] > self._fresh_s:
                try:
                    await self._blobs.ask(self._blobs.reach)
                    found = True
                except (StorageUnavailable, OSError):
                    found = False
                self._asked = time.monotonic(), found
            return self._asked[1]
