"""How many websockets each user has open."""

from __future__ import annotations

from collections import Counter

from interpose.errors import QueueFull
from prometheus_client import Gauge


class OpenStreams:
    """Args: most: of one user, on this gateway process."""

    def __init__(self, most: int, gauge: Gauge) -> None:
        self._most = most
        self._gauge = gauge
        self._open: Counter[str] = Counter()

    def enter(self, user: str) -> None:
        """Raises QueueFull."""
        if self._open[user] >= self._most:
            raise QueueFull(f"{self._most} streams are open, the most allowed; one carries any number of jobs")
        self._open[user] += 1
        self._gauge.inc()

    def leave(self, user: str) -> None:
        self._open[user] -= 1
        if not self._open[user]:
            del self._open[user]
        self._gauge.dec()
