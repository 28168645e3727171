"""Who comes while a batch is under way: to join its generation, or to have a forward between two of its.

The event loop offers jobs, the engine's thread takes them.
"""

from __future__ import annotations

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
from .scheduler import Budget, UnderWay
from .sink import JobSink

Ready: TypeAlias = tuple[JobSink, EngineJob]

LEAD = 0.4
"""The last part of a batch's time, in which the next is claimed: earlier, who comes later would be passed over."""

LEAD_S = 0.02
"""The same for short ones."""

_LEAST, _MOST, _NEW = 0.05, 5.0, 0.3
"""Between what the pace is sought, and what the last batch counts for. Forwards that end early take less than was
foreseen, those of a busy machine more."""


class Company:
    """The jobs of one batch, and those that come while it runs.

    Args:
        begun: the jobs it begins with.
        budget: what may run together.
        patience_s: how long others that could come wait at most, after some came.
        pace: of late, batches took so many times what was foreseen.
        aside: runs jobs to their end, on the engine's thread.
        check: raises if the device is broken, so that no job's failure is told which may be another's.
        tell: called when there may be room, or something that was offered has been taken.
    """

    def __init__(
        self,
        begun: Sequence[Ready],
        budget: Budget,
        patience_s: float,
        pace: float,
        aside: Callable[[Sequence[Ready]], None],
        check: Callable[[], None] = lambda: None,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        self._budget = budget
        self._patience_s = patience_s
        self._aside = aside
        self._check = check
        self._tell = tell
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
        self._served: dict[str, float] = {}
        """User -> until when the batch's own users have their share, after one of that user's jobs came between."""
        self.hosting = _open(begun)
        """Whether it is a generation that others can join."""
        self._suspect = any(sink.claim.alone for sink, _ in begun)
        self.joinable = self.hosting
        """Whether more can join: not where the model's cache has no room for other rows."""
        self.came = 0
        """Jobs it has had, those that joined included."""
        self.aside_s = 0.0
        """Time that others had."""
        self.done = False
        """Whether the engine has done with it, and waits for who may come to the next batch."""
        self._began = time.monotonic()
        footprints = [sink.claim.footprint for sink, _ in begun]
        self._short = not self.hosting and budget.short(footprints)
        self._foreseen_s = budget.takes(footprints)
        self._takes_s = self._foreseen_s * pace
        self.stepped_at = self._began
        """When the engine last came to the end of a step."""
        for ready in begun:
            self._enter(ready)

    # -- the event loop's side ---------------------------------------------------------------------------------

    def offer(self, ready: Sequence[Ready], *, joins: bool) -> bool:
        """False if the batch is over already: nothing was taken."""
        with self._lock:
            if self._over:
                return False
            if joins:
                self._joining.extend(ready)
            else:
                self._others.append([*ready])
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

    def state(self, ahead: Sequence[Ready]) -> UnderWay:
        """For the scheduler. `ahead`: what is to run next."""
        now = time.monotonic()
        return UnderWay(
            self.footprints,
            joinable=self.joinable,
            served={user for user, until in self._served.items() if until > now},
            ending=self._ending(now),
            ahead=[sink.claim.footprint for sink, _ in ahead],
        )

    @property
    def open(self) -> bool:
        """Whether anybody can come: not to a job under suspicion, and not before a short batch's last part."""
        return not self._suspect and (self.done or not (self._short and time.monotonic() < self._ends_from()))

    @property
    def plain(self) -> bool:
        """Whether it is done at one go: nobody comes in between, and no job is under suspicion."""
        return self._short and not self._suspect

    @property
    def overdue(self) -> bool:
        """Whether a batch that was to be short isn't: who waits for its end has a forward in between."""
        return self._short and not self.done and time.monotonic() > self._due_s()

    def look_in(self) -> float:
        """Seconds after which the scheduler may decide otherwise, though nobody comes or goes."""
        now = time.monotonic()
        moments = [until for until in self._served.values() if until > now]
        if self._short:
            moments += [at for at in (self._ends_from(), self._due_s()) if at > now]
        return max(min(moments, default=now + 60) - now, 0.001)

    def pace(self, before: float) -> float:
        """Now that it is over, how many times what was foreseen batches take; `before`: what that was so far."""
        took_s = time.monotonic() - self._began - self.aside_s
        if self.hosting or not self._short or not self._foreseen_s:
            return before
        return before + (min(max(took_s / self._foreseen_s, _LEAST), _MOST) - before) * _NEW

    def close(self) -> list[Ready]:
        """The batch is over: what was offered and not taken, still to be run."""
        with self._lock:
            self._over = True
            left = [*self._again, *self._untaken()]
            self._again.clear()
        return left

    def retract(self) -> list[Ready]:
        """What was offered and not taken, which nobody will take now."""
        with self._lock:
            return self._untaken()

    def _untaken(self) -> list[Ready]:
        left = [*self._joining, *(ready for batch in self._others for ready in batch)]
        self._joining.clear()
        self._others.clear()
        return left

    def _ending(self, now: float) -> bool:
        return self.done or (self._short and self._ends_from() <= now <= self._due_s())

    def _ends_from(self) -> float:
        return self._began + self._takes_s - max(LEAD * self._takes_s, LEAD_S)

    def _due_s(self) -> float:
        """By when a short batch is over, if it takes no more than twice what was foreseen."""
        return self._began + 2 * min(self._budget.seconds, 60)

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

    def due(self) -> bool:
        """Whether somebody comes at the next pause."""
        return bool(self._others) and time.monotonic() >= self._next_aside

    def pause(self, *, joinable: bool) -> None:
        """Run what came between two steps, if these had their share of the time."""
        self.stepped_at = began = time.monotonic()
        self.joinable = self.hosting and joinable and not self._again
        if began < self._next_aside:
            return
        with self._lock:
            batch = self._others.popleft() if self._others else ()
        if batch:
            self._meter.mark()
            self._aside(batch)
            self._meter.skip()
            self._came(batch, began)
            self._tell()

    def _came(self, batch: Sequence[Ready], began: float) -> None:
        """Others had a turn, which isn't the time of those that waited for it."""
        self.stepped_at = time.monotonic()
        took, waited = self.stepped_at - began, list(self.sinks)
        self.aside_s += took
        for sink in waited:
            sink.extend(took)
        # Every user has as much: who sends forwards without end doesn't stop a generation. Others than those who
        # just had their turn wait for less.
        users = {sink.claim.user for sink, _ in batch}
        share = took * _users(waited) / len(users)
        self._next_aside = self.stepped_at + min(share, self._patience_s)
        self._served = {**self._served, **dict.fromkeys(users, self.stepped_at + share)}

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
        self.came += 1
        with self._lock:
            self._sinks[id(job)] = sink
            self._shared |= len(self._sinks) > 1
        self._meter.enter(id(job), sink.claim.footprint.rows)


def _open(ready: Sequence[Ready]) -> bool:
    """Whether jobs are a generation that others can join."""
    return all(
        sink.claim.footprint.kind == "generate" and sink.claim.footprint.runs == 1 and not job.exclusive
        for sink, job in ready
    )


def _users(sinks: Sequence[JobSink]) -> int:
    return len({sink.claim.user for sink in sinks}) or 1
