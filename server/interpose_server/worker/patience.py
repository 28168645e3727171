"""How long the engine waits between two batches for those whose jobs have just ended.

Clients that send one job after another fall into two groups, one of which always runs while the other waits, and
each forward does half of what it could. Whoever was just answered is back within a round trip: waiting for that
makes one forward of two, and saves what a forward costs however few its tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence

from interpose.graph.footprint import Footprint

from .scheduler import Budget, like_each_other

SHARE = 0.5
"""So much of what a forward costs beside its tokens is risked to save one."""

MOST_S = 0.05
"""A round trip takes no longer, or isn't worth waiting for."""

STEPS = 6
"""After waiting in vain the next 1, 3, 7, ... batches begin at once."""


class Patience:
    """One worker's: it learns whether those who were answered come again."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._vain = 0
        self._pass = 0

    @property
    def most_s(self) -> float:
        """Longest wait, in seconds; 0 where nothing was measured."""
        return min(SHARE * self._budget.cost.forward_s, MOST_S)

    def asked(self, ended: Sequence[Footprint], ahead: Sequence[Footprint]) -> tuple[int, float]:
        """How many jobs the next batch should have, and how many seconds to wait for them at most."""
        ended = [job for job in ended if like_each_other(job, (*ahead, job)[0]) and not job.exclusive]
        if not ended or any(job.exclusive for job in ahead):
            return len(ahead), 0.0
        longest = max(job.longest for job in (*ended, *ahead))
        rows = max(max(job.rows, 1) for job in (*ended, *ahead))
        room = min(self._budget.jobs, self._budget.rows // rows, self._budget.most // (rows * max(longest, 1)))
        expected = min(len(ended) + len(ahead), room)
        if expected < 2 or len(ahead) >= expected:
            return len(ahead), 0.0
        if self._pass:
            self._pass -= 1
            return len(ahead), 0.0
        return expected, self.most_s

    def told(self, came: int) -> None:
        """How many came while the engine waited."""
        self._vain = 0 if came else min(self._vain + 1, STEPS)
        self._pass = 2**self._vain - 1
