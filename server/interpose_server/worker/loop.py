"""A worker's life: claim the fairest jobs, have them run, publish what they save, keep their leases."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import torch
from interpose.errors import JobTimeout
from interpose.runtime.engine import EngineJob
from redis.exceptions import RedisError

from ..blobs import Blobs
from ..broker.connect import Broker
from ..broker.jobs import Claim
from ..broker.waiting import Waiting
from ..settings import Settings
from ..tasks import either, end
from .budget import unmeasured
from .company import Company, Ready
from .desk import Desk
from .driving import Driver, Runner
from .meter import Ran
from .prepare import Preparer
from .publisher import Publisher
from .scheduler import Budget, between, choose
from .shelf import Shelf
from .sink import JobSink

log = logging.getLogger(__name__)

STUCK_S = 60.0
"""An operation under way can't be stopped. One that overruns the wall time by so long costs the process."""

AWAY_S = 2.0
"""How long a job is put off that can't be read, as the blob store is away."""

STALLED_S = 1.0
"""Where the engine has waited so long for saves to leave, as the blob store is slow or away, others get what was
claimed to run after them."""

IDLE_S = 1.0
"""How long to wait for the bell before looking at the queue all the same."""


class Worker:
    """Runs jobs of one model until told to stop. Make it inside a running event loop.

    The event loop claims and publishes; one thread runs the engine, and goes from one batch to the next by itself;
    another makes claimed jobs ready meanwhile.

    Args:
        name: under which its jobs are leased.
        place: brings a tensor to the device of the engine's model.
        check: called after each batch, on the engine's thread; raises if the device is broken.
        give_up: ends the process, where an operation doesn't end.
        budget: what may run together; by default what the settings say, with nothing measured.
        prepare: does beforehand what the engine would do first.
        copy: under which name the copy of the model is known that it works for; its own by default.
        lanes: how many workers work for that copy.
    """

    def __init__(
        self,
        model: str,
        name: str,
        runner: Runner,
        broker: Broker,
        blobs: Blobs,
        settings: Settings,
        place: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        check: Callable[[], None] = lambda: None,
        give_up: Callable[[], None] = lambda: os._exit(70),
        budget: Budget | None = None,
        prepare: Callable[[EngineJob], EngineJob] = lambda job: job,
        copy: str = "",
        lanes: int = 1,
    ) -> None:
        self._model = model
        self._name = name
        self._copy = copy or name
        self._lanes = lanes
        self._broker = broker
        self._settings = settings
        self._give_up = give_up
        self._budget = budget or unmeasured(settings, shared=runner.manifest.row_independent)
        self._desk = Desk(self._budget)
        shelf = Shelf(blobs, settings.shelf_bytes, place)
        self._preparer = Preparer(model, runner.manifest, blobs, shelf, settings, prepare, self._unread)
        self._publisher = Publisher(name, broker.queue, blobs, settings, self._forget)
        self._held: dict[JobSink, None] = {}
        self._told = Ran()
        """What the broker knows of what was run."""
        self._empty = asyncio.Event()
        self._waiting = True
        """Whether jobs may be waiting that nobody has looked at, or that couldn't be taken yet."""
        self._changed = asyncio.Event()
        """Set whenever other jobs may be claimed than before."""
        self._driver = Driver(
            runner, self._desk, self._preparer, self._budget, settings, check, lambda: self._waiting, self._tell
        )
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._tasks: list[asyncio.Task[None]] = []
        self._returning: set[asyncio.Task[None]] = set()
        self._driving: asyncio.Future[None] | None = None
        self._ringing: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`, then finish the running batch and publish its last word; no other stays claimed."""
        works = self._publisher.run(), self._beat(), self._hear(stop)
        self._tasks = [asyncio.create_task(work) for work in works]
        for task in self._tasks:
            task.add_done_callback(self._stopped)
        try:
            while not stop.is_set():
                await self._turn(stop)
            await self._give_back()
            while self._held:
                self._sound()
                self._empty.clear()
                await self._empty.wait()
            if self._driving is not None:
                await self._driving  # which counts a batch after its jobs have ended
        except Exception:
            await self._give_back()
            raise
        finally:
            await end([*self._tasks, *self._returning, *([self._ringing] if self._ringing else [])])
            with suppress(RedisError, OSError):
                await self._count()
            self._driver.close()
            self._beside.shutdown(wait=False)

    async def _hear(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._changed.set()

    def _sound(self) -> None:
        """Raises what the engine's thread or a task beside raised: without either no job ends any more."""
        for task in self._tasks:
            if task.done():
                task.result()
        if self._driving is not None and self._driving.done():
            self._driving.result()

    def _bell(self) -> asyncio.Task[None]:
        """Done when a job may be waiting. The same until it is: one that is given up in between may have rung."""
        if self._ringing is not None and self._ringing.done() and not self._ringing.cancelled():
            self._ringing.exception()  # asked for, or the loop complains that nobody did
        if self._ringing is None or self._ringing.done():
            self._ringing = asyncio.create_task(self._broker.queue.wait(self._model, IDLE_S))
        return self._ringing

    # -- claiming ----------------------------------------------------------------------------------------------

    async def _turn(self, stop: asyncio.Event) -> None:
        """Claim what can run now, or next; then wait until that may be more."""
        self._sound()
        self._changed.clear()
        try:
            if not await self._look() and not stop.is_set():
                company = self._desk.company
                wait_s = company.look_in() if company else None
                self._waiting |= await either(self._bell(), self._changed, wait_s)
        except (RedisError, OSError) as error:
            log.warning("the broker doesn't answer (%s); trying again", type(error).__name__)
            await asyncio.sleep(0.2)

    async def _look(self) -> bool:
        """Whether it claimed jobs and there may be more to claim."""
        if not self._desk.working:
            return await self._start()
        if self._publisher.backlog.waited_s > STALLED_S:
            await self._release(self._desk.retract())
            return False
        company = self._desk.company
        if company is None or not self._has_room(company) or not self._waiting:
            return False
        waiting = await self._broker.queue.peek(self._model, self._copy)
        turn = between(waiting, company.state(self._desk.ahead), self._budget)
        self._waiting = len(turn.refs) < len(waiting) or len(waiting) >= self._settings.batch_jobs
        if not turn.refs:
            return False
        sinks = self._hold(await self._broker.queue.claim(self._model, self._name, turn.refs))
        ready = await self._loop.run_in_executor(self._beside, self._preparer.ready, sinks)
        at_rest = self._desk.put(ready, turn.place, company)
        if at_rest:
            self._begin([], at_rest)
        return self._more(waiting, len(sinks))

    async def _start(self) -> bool:
        """Give the engine, which is at rest, what is waiting. Whether more may be."""
        waiting, claims = await self._broker.queue.take(self._model, self._name, self._copy)
        if waiting:
            refs = choose(waiting, self._budget)
            claims = await self._broker.queue.claim(self._model, self._name, refs)
        self._waiting = self._more(waiting, len(claims))
        self._begin(self._hold(claims))
        return self._waiting

    def _more(self, waiting: Sequence[Waiting], claimed: int) -> bool:
        """Whether others wait beside those that were claimed."""
        return claimed > 0 and (claimed < len(waiting) or len(waiting) >= self._settings.batch_jobs)

    def _has_room(self, company: Company) -> bool:
        """Whether jobs can come while a batch is under way."""
        if company.overdue:
            self._desk.aside()
        return company.open and not company.busy

    def _hold(self, claims: Sequence[Claim]) -> list[JobSink]:
        sinks = [self._sink(claim) for claim in claims]
        self._held |= dict.fromkeys(sinks)
        return sinks

    async def _give_back(self) -> None:
        """Put the batch back that was claimed to be next."""
        await self._release(self._desk.give_back())

    async def _release(self, ready: Sequence[Ready]) -> None:
        sinks = [sink for sink, _ in ready]
        try:
            await self._broker.queue.release(self._name, [(sink.claim.ref, sink.claim.attempt) for sink in sinks])
        except (RedisError, OSError) as error:
            log.warning("%d jobs wait until their lease ends (%s)", len(sinks), type(error).__name__)
        for sink in sinks:
            self._forget(sink)

    def _unread(self, sink: JobSink) -> None:
        """A job can't be read as the blob store is away: somebody tries again in a while. From any thread."""
        self._loop.call_soon_threadsafe(lambda: self._returning.add(asyncio.create_task(self._return(sink))))

    async def _return(self, sink: JobSink) -> None:
        await asyncio.sleep(AWAY_S)
        try:
            await self._broker.queue.release(self._name, [(sink.claim.ref, sink.claim.attempt)])
        except (RedisError, OSError) as error:
            log.warning("a job waits until its lease ends (%s)", type(error).__name__)
        self._forget(sink)
        self._returning = {task for task in self._returning if not task.done()}

    # -- the engine --------------------------------------------------------------------------------------------

    def _begin(self, sinks: list[JobSink], ready: list[Ready] | None = None) -> None:
        """Have the engine run jobs, and whatever is next when it's done."""
        if not (sinks or ready):
            return
        self._desk.begin()
        self._driving = self._driver.begin(sinks, ready or [])
        self._driving.add_done_callback(self._stopped)

    def _stopped(self, _: object) -> None:
        self._changed.set()
        self._empty.set()

    def _tell(self) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._changed.set)

    # -- leases ------------------------------------------------------------------------------------------------

    def _sink(self, claim: Claim) -> JobSink:
        limits = replace(self._settings.limits, wall_s=min(claim.timeout_s, self._settings.limits.wall_s))
        return JobSink(claim, limits, self._publisher.backlog, self._publisher.put)

    async def _beat(self) -> None:
        """Keep the leases, and hear of jobs that were cancelled."""
        every = min(1.0, self._settings.lease_s / 3)
        while True:
            await asyncio.sleep(every)
            await self._end_stuck()
            held = {sink.claim.ref: sink for sink in self._held}
            try:
                await self._count()
                pairs = [(ref, sink.claim.attempt) for ref, sink in held.items()]
                for ref in await self._broker.queue.heartbeat(self._name, pairs) if pairs else ():
                    held[ref].lose()
            except (RedisError, OSError) as error:
                log.warning("no heartbeat (%s)", type(error).__name__)

    async def _count(self) -> None:
        """Say that the copy is alive, and what it has run since that was last said."""
        ran, told = self._driver.ran, self._told
        await self._broker.models.beat(
            self._model,
            self._copy,
            ran.batches - told.batches,
            ran.jobs - told.jobs,
            (ran.busy_s - told.busy_s) / self._lanes,
        )
        self._told = ran

    def stuck(self, patience_s: float = 2 * STUCK_S) -> str | None:
        """Why nobody can wait any longer for the operation under way; None while they can.

        Args:
            patience_s: how long beyond a job's wall time it may take. Half of what is the default, it gives up by
                itself, so that more has passed only if that failed.
        """
        over_s = self._driver.operation_s - self._settings.limits.wall_s
        return f"an operation is {over_s:.0f} s over the time a job has" if over_s >= patience_s else None

    async def _end_stuck(self) -> None:
        """Give up if the engine overran the wall time by far. A job that ran alone is told, others run again."""
        allowed = self._settings.limits.wall_s
        running = self._driver.running
        if running is None or self.stuck(STUCK_S) is None:
            return
        log.error("an operation doesn't end; the worker starts anew")
        began, sinks = running[0], [*running[1]]
        await self._give_back()
        if len(sinks) == 1:
            error = JobTimeout(f"the job ran for more than {allowed:g} s", details={"allowed_s": allowed})
            self._empty.clear()
            sinks[0].end(error, time.monotonic() - began)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), 10)
        self._give_up()

    def _forget(self, sink: JobSink) -> None:
        self._held.pop(sink, None)
        if not self._held:
            self._empty.set()
