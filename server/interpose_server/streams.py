"""How much each user has open at once, on this gateway process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from interpose.errors import QueueFull
from prometheus_client import Gauge


class Open:
    """Args:
    most: of one user.
    told: what to say to who asks for more; "{most}" stands for the number.
    """

    def __init__(self, most: int, gauge: Gauge, told: str) -> None:
        self._most = most
        self._gauge = gauge
        self._told = told.format(most=most)
        self._open: Counter[str] = Counter()

    @contextmanager
    def counted(self, user: str) -> Iterator[None]:
        """One more while in the block. Raises QueueFull."""
        if self._open[user] >= self._most:
            raise QueueFull(self._told, details={"retry_after_s": 1})
        self._open[user] += 1
        self._gauge.inc()
        try:
            yield
        finally:
            self._gauge.dec()
            self._open[user] -= 1
            if not self._open[user]:
                del self._open[user]
