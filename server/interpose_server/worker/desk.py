"""What the engine does now and next. The event loop puts jobs here, the engine's thread takes them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence

from ..broker.waiting import Waiting
from .company import Company, Ready
from .scheduler import Budget, Place, batches


class Desk:
    """One worker's. Every method may be called from any thread."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._came = threading.Condition(self._lock)
        self._company: Company | None = None
        self._working = False
        self._first: deque[list[Ready]] = deque()
        """Batches that go before whatever else is claimed: they were meant to run already."""
        self._ahead: list[Ready] = []

    @property
    def working(self) -> bool:
        """Whether the engine has something to do."""
        return self._working

    @property
    def company(self) -> Company | None:
        """Of the batch under way; None between batches."""
        return self._company

    @property
    def ahead(self) -> list[Ready]:
        """The batch that is next."""
        with self._lock:
            return [*self._ahead]

    def begin(self) -> None:
        """The engine is given something to do."""
        with self._lock:
            self._working = True

    def enter(self, company: Company) -> None:
        """A batch begins."""
        with self._lock:
            self._company = company

    def put(self, ready: Sequence[Ready], place: Place, company: Company | None) -> list[Ready]:
        """Jobs that come while `company` runs. Returns those the engine has to be given, as it's at rest by now."""
        with self._lock:
            if place is not Place.NEXT and company is not None and company.offer(ready, joins=place is Place.JOINS):
                return []
            if not self._working:
                return [*ready]
            if place is Place.NEXT:
                self._ahead += ready
                self._came.notify()
            else:
                self._first.extend(self._batches(ready))
            return []

    def gather(self, jobs: int, seconds: float) -> int:
        """Wait until the next batch has so many jobs, but no longer than so many seconds. Returns how many came."""
        with self._came:
            before = len(self._ahead)
            self._came.wait_for(lambda: len(self._ahead) >= jobs, seconds)
            return len(self._ahead) - before

    def leave(self, company: Company | None) -> list[Ready]:
        """A batch is over. Returns the next; nothing if there is none."""
        with self._lock:
            self._company = None
            if company is not None:
                self._first.extend(self._batches(company.close()))
            if self._first:
                return self._first.popleft()
            ready, self._ahead = self._ahead, []
            self._working = bool(ready)
            return ready

    def aside(self) -> bool:
        """Have the next batch come between two forwards of the one under way. Whether it did."""
        with self._lock:
            if not self._ahead or self._company is None:
                return False
            if any(sink.claim.alone or not self._budget.small(sink.claim.footprint) for sink, _ in self._ahead):
                return False
            if not self._company.offer(self._ahead, joins=False):
                return False
            self._ahead = []
            return True

    def give_back(self) -> list[Ready]:
        """The next batch, which won't be run."""
        with self._lock:
            ready, self._ahead = self._ahead, []
            return ready

    def retract(self) -> list[Ready]:
        """The next batch, and who was to come while one is under way, which won't be run."""
        with self._lock:
            ready, self._ahead = self._ahead, []
            return ready if self._company is None else [*ready, *self._company.retract()]

    def _batches(self, ready: Collection[Ready]) -> list[list[Ready]]:
        """Jobs in batches, each within the budget; one that must have its own has its own."""
        known = {sink.claim.ref: (sink, job) for sink, job in ready}
        waiting = [
            Waiting(sink.claim.ref, sink.claim.footprint, sink.claim.alone or job.exclusive, 0)
            for sink, job in ready
        ]
        return [[known[ref] for ref in refs] for refs in batches(waiting, self._budget)]
