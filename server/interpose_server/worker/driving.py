"""The engine's thread: it runs one batch after another, each made ready beforehand, and goes on by itself."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from interpose.errors import InternalError, InterposeError, JobTimeout, ReplicaLost
from interpose.graph.manifest import Manifest
from interpose.runtime.engine import Breaks, EngineJob

from ..settings import Settings
from .company import Company, Ready
from .desk import Desk
from .meter import Ran
from .patience import Patience
from .prepare import Preparer
from .scheduler import Budget
from .sink import JobSink

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What the worker asks of an engine."""

    manifest: Manifest

    def run(self, jobs: Sequence[EngineJob], breaks: Breaks | None = None) -> list[InterposeError | None]: ...

    def host(self, jobs: Sequence[EngineJob], company: Company) -> None: ...


class Driver:
    """Runs what lies on a worker's desk. What its thread raises is raised by what `begin` returns.

    Args:
        preparer: makes the first jobs ready, which nobody could beforehand.
        budget: what may run together.
        check: called after each batch; raises if the device is broken.
        waiting: whether jobs may be waiting that nobody has looked at.
        tell: called where other jobs may be claimed than before.

    Attributes:
        ran: what it has run so far.
        running: since when, and which jobs, while the engine runs.
    """

    def __init__(
        self,
        runner: Runner,
        desk: Desk,
        preparer: Preparer,
        budget: Budget,
        settings: Settings,
        check: Callable[[], None],
        waiting: Callable[[], bool],
        tell: Callable[[], None],
    ) -> None:
        self.ran = Ran()
        self.running: tuple[float, Collection[JobSink]] | None = None
        self._runner = runner
        self._desk = desk
        self._preparer = preparer
        self._budget = budget
        self._aside_s = settings.aside_s
        self._check = check
        self._waiting = waiting
        self._tell = tell
        self._patience = Patience(budget)
        self._pace = 1.0
        """How many times what was foreseen batches take."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    # -- the event loop's side ---------------------------------------------------------------------------------

    def begin(self, sinks: list[JobSink], ready: list[Ready]) -> asyncio.Future[None]:
        """Run jobs, and then whatever is next, until there is nothing: then the future is done."""
        return asyncio.get_running_loop().run_in_executor(self._thread, self._drive, sinks, ready)

    @property
    def operation_s(self) -> float:
        """How long the operation under way has taken; 0 while there is none."""
        running, company = self.running, self._desk.company
        if running is None:
            return 0.0
        return time.monotonic() - (running[0] if company is None else max(running[0], company.stepped_at))

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    # -- its own thread ----------------------------------------------------------------------------------------

    def _drive(self, sinks: list[JobSink], ready: list[Ready]) -> None:
        ready = ready + self._preparer.ready(sinks)
        company: Company | None = None
        while ready or (ready := self._next(company)):
            company = Company(ready, self._budget, self._aside_s, self._pace, self._aside, self._check, self._tell)
            self._desk.enter(company)
            if self._waiting():
                self._tell()
            began = time.monotonic()
            if company.hosting:
                self._generate(ready, company)
            else:
                self._run(ready, company)
            self.ran = self.ran.and_batch(company.came, time.monotonic() - began)
            self._pace = company.pace(self._pace)
            ready = []

    def _next(self, company: Company | None) -> list[Ready]:
        """The next batch, with those who come again as soon as the last one's jobs have ended."""
        if company is not None and company.plain:
            company.done = True
            if self._waiting() and not self._desk.ahead:  # it ended before the next batch was due to be claimed
                self._tell()
                self._desk.gather(1, self._patience.most_s)
            ahead = [sink.claim.footprint for sink, _ in self._desk.ahead]
            jobs, wait_s = self._patience.asked(company.footprints, ahead)
            if wait_s:
                self._tell()
                self._patience.told(self._desk.gather(jobs, wait_s))
        return self._desk.leave(company)

    def _run(self, ready: Sequence[Ready], company: Company | None = None) -> None:
        """Run jobs to their end. Ends are published from here, in one round with the last saves."""
        outcomes, seconds = self._attempt(ready, company)
        rows = sum(max(sink.claim.footprint.rows, 1) for sink, _ in ready)
        for (sink, job), outcome in zip(ready, outcomes, strict=True):
            share = seconds * max(sink.claim.footprint.rows, 1) / rows
            if len(ready) > 1 and isinstance(sink.stopped, JobTimeout):
                # Who took the time isn't known: each that ran out of it has its own, alone.
                (outcome,), alone_s = self._attempt([(sink, job)], company)
                share += alone_s
            sink.end(outcome, share)

    def _generate(self, ready: Sequence[Ready], company: Company) -> None:
        """A generation that others join. Each job's end is told as it comes."""
        for sink, _ in ready:
            sink.start()
        self.running = time.monotonic(), company.sinks
        try:
            self._runner.host([job for _, job in ready], company)
        except ReplicaLost:
            raise  # all of them are run again by another
        except Exception:
            log.exception("the engine failed")
        self._check()
        company.give_up(InternalError("the server failed while running this job"))
        self.running = None

    def _aside(self, ready: Sequence[Ready]) -> None:
        """Run jobs between two forwards of others."""
        before = self.running
        self._run(ready)
        self.running = before
        self.ran = self.ran.and_batch(len(ready))

    def _attempt(
        self, ready: Sequence[Ready], company: Company | None
    ) -> tuple[list[InterposeError | None], float]:
        """Run jobs together. Returns how each ended, and the seconds it took, without those of who came in between.

        Args:
            company: who that may be; None for nobody.
        """
        start, others_s = time.monotonic(), company.aside_s if company else 0.0
        for sink, _ in ready:
            sink.start()
        self.running = start, [sink for sink, _ in ready]
        try:
            outcomes = self._runner.run([job for _, job in ready], company)
        except ReplicaLost:
            raise
        except Exception:
            log.exception("the engine failed")
            outcomes = [InternalError("the server failed while running this job") for _ in ready]
        self._check()
        self.running = None
        others_s = (company.aside_s if company else 0.0) - others_s
        return outcomes, time.monotonic() - start - others_s
