"""What an engine has done, and who used how much of its time while several jobs are on it, and come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ran:
    """What an engine has done so far. Only its thread adds to it, once a batch has ended.

    Args:
        jobs: over all batches; one that is run again counts again.
        busy_s: how long it has worked on them.
    """

    batches: int = 0
    jobs: int = 0
    busy_s: float = 0.0

    def and_batch(self, jobs: int, busy_s: float = 0.0) -> Ran:
        return Ran(self.batches + 1, self.jobs + jobs, self.busy_s + busy_s)


class Meter:
    """Shares every second among the jobs of that moment, by their rows.

    Args:
        clock: seconds from anywhere.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows: dict[Hashable, int] = {}
        self._since: dict[Hashable, float] = {}
        self._total = 0
        self._at = clock()
        self._per_row = 0.0
        """Seconds that one row has had since the beginning."""

    def enter(self, job: Hashable, rows: int) -> None:
        self._advance()
        self._rows[job], self._since[job] = max(rows, 1), self._per_row
        self._total += self._rows[job]

    def leave(self, job: Hashable) -> float:
        """The job's seconds."""
        self._advance()
        rows = self._rows.pop(job)
        self._total -= rows
        return (self._per_row - self._since.pop(job)) * rows

    def skip(self) -> None:
        """The time since the last change was nobody's of these."""
        self._at = self._clock()

    def mark(self) -> None:
        """What comes next may be skipped."""
        self._advance()

    def _advance(self) -> None:
        now = self._clock()
        if self._total:
            self._per_row += (now - self._at) / self._total
        self._at = now
