"""Who joins a generation that is under way, and who has a forward between two of its steps.

The event loop offers jobs, the engine's thread takes them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeAlias

from interpose.errors import InterposeError, JobTimeout
from interpose.graph.footprint import Footprint
from interpose.runtime.engine import EngineJob

from .meter import Meter
from .sink import JobSink

Ready: TypeAlias = tuple[JobSink, EngineJob]


class Company:
    """The jobs of one generation, and those that come while it runs. Make it on the event loop.

    Args:
        begun: the jobs it begins with.
        aside: runs jobs to their end, on the engine's thread.
        check: raises if the device is broken, so that no job's failure is told which may be another's.
    """

    def __init__(
        self,
        begun: Sequence[Ready],
        aside: Callable[[Sequence[Ready]], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._aside = aside
        self._check = check
        self._meter = Meter()
        self._sinks: dict[int, JobSink] = {}
        self._lock = threading.Lock()
        self._joining: deque[Ready] = deque()
        self._others: deque[Sequence[Ready]] = deque()
        self._over = False
        self._shared = False
        self._again: list[Ready] = []
        self._next_aside = 0.0
        """When others may come between two steps once more."""
        self.joinable = True
        """Whether more can join: not where the model's cache has no room for other rows."""
        self.stepped_at = time.monotonic()
        """When the engine last came to the end of a step."""
        self._loop = asyncio.get_running_loop()
        self.changed = asyncio.Event()
        """Set whenever there may be room, or something that was offered has been taken."""
        for ready in begun:
            self._enter(ready)

    # -- the event loop's side ---------------------------------------------------------------------------------

    def offer(self, ready: Sequence[Ready], *, joins: bool) -> bool:
        """False if the generation is over already: nothing was taken."""
        with self._lock:
            if self._over:
                return False
            if joins:
                self._joining.extend(ready)
            else:
                self._others.append(ready)
            return True

    @property
    def busy(self) -> bool:
        """Whether something that was offered still waits: one thing at a time comes between two steps."""
        with self._lock:
            return bool(self._joining or self._others)

    @property
    def sinks(self) -> Collection[JobSink]:
        """The jobs on it, as they come and go."""
        return self._sinks.values()

    @property
    def footprints(self) -> list[Footprint]:
        """Of the jobs on it."""
        with self._lock:
            return [sink.claim.footprint for sink in self._sinks.values()]

    def close(self) -> list[Ready]:
        """The generation is over: what was offered and not taken, still to be run."""
        with self._lock:
            self._over = True
            left = [*self._again, *self._joining, *(ready for batch in self._others for ready in batch)]
            self._joining.clear()
            self._others.clear()
        return left

    # -- the engine's thread -----------------------------------------------------------------------------------

    def arrivals(self) -> list[EngineJob]:
        """Jobs that join now. None once some wait for the end to run again, or it might never come."""
        if self._again:
            return []
        with self._lock:
            came = [self._joining.popleft() for _ in range(len(self._joining))]
        for ready in came:
            ready[0].start()
            self._enter(ready)
        if came:
            self._tell()
        return [job for _, job in came]

    def pause(self, *, joinable: bool) -> None:
        """Run what came between two steps, if these had their share of the time."""
        self.stepped_at = began = time.monotonic()
        self.joinable = joinable and not self._again
        if began < self._next_aside:
            return
        with self._lock:
            batch = self._others.popleft() if self._others else ()
        if batch:
            self._meter.mark()
            self._aside(batch)
            self._meter.skip()
            self.stepped_at = time.monotonic()
            took, waited = self.stepped_at - began, list(self.sinks)
            for sink in waited:
                sink.extend(took)
            # Every user has as much: who sends forwards without end doesn't stop a generation.
            self._next_aside = self.stepped_at + took * _users(waited) / _users([sink for sink, _ in batch])
            self._tell()

    def ended(self, job: EngineJob, error: InterposeError | None) -> None:
        """A job is over; the others go on."""
        if error is not None:
            self._check()
        with self._lock:
            sink = self._sinks.pop(id(job))
        seconds = self._meter.leave(id(job))
        if self._shared and isinstance(sink.stopped, JobTimeout):
            # Who took the time isn't known: it has its own, alone.
            self._again.append((sink, replace(job, exclusive=True)))
        else:
            sink.end(error, seconds)
        self._tell()

    def give_up(self, error: InterposeError) -> None:
        """End whatever the engine left without a word."""
        with self._lock:
            left = list(self._sinks.values())
            self._sinks.clear()
        for sink in left:
            sink.end(error, 0)

    def _enter(self, ready: Ready) -> None:
        sink, job = ready
        with self._lock:
            self._sinks[id(job)] = sink
            self._shared |= len(self._sinks) > 1
        self._meter.enter(id(job), sink.claim.footprint.rows)

    def _tell(self) -> None:
        self._loop.call_soon_threadsafe(self.changed.set)


def _users(sinks: Sequence[JobSink]) -> int:
    return len({sink.claim.user for sink in sinks}) or 1
