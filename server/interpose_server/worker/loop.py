"""A worker's life: claim the fairest jobs, run them in one forward, publish while they run."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import msgpack
import torch
from interpose.errors import (
    InternalError,
    InterposeError,
    InvalidPayload,
    JobTimeout,
    UnknownModel,
)
from interpose.graph.codec import decode_graph
from interpose.graph.manifest import Manifest
from interpose.graph.model import Graph
from interpose.runtime.engine import EngineJob
from redis.exceptions import RedisError

from .. import blob_keys
from ..blobs import Blobs
from ..broker.connect import Broker
from ..broker.queue import Claim
from ..settings import Settings
from ..tasks import end
from .company import Company, Ready
from .publisher import Publisher
from .scheduler import Budget, between, choose
from .shelf import Shelf
from .sink import JobSink

log = logging.getLogger(__name__)

STUCK_S = 60.0
"""An operation under way can't be stopped. One that overruns the wall time by so long costs the process."""

IDLE_S = 1.0
"""How long to wait for the bell before looking at the queue all the same."""


class Runner(Protocol):
    """What the worker asks of an engine."""

    manifest: Manifest

    def run(self, jobs: Sequence[EngineJob]) -> list[InterposeError | None]: ...

    def host(self, jobs: Sequence[EngineJob], company: Company) -> None: ...


class Worker:
    """Runs jobs of one model until told to stop. Make it inside a running event loop.

    Args:
        name: under which its jobs are leased.
        place: brings a tensor to the device of the engine's model.
        check: called after each batch, on the engine's thread; raises if the device is broken.
        give_up: ends the process, where an operation doesn't end.
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
    ) -> None:
        self._model = model
        self._name = name
        self._runner = runner
        self._broker = broker
        self._blobs = blobs
        self._settings = settings
        self._shelf = Shelf(blobs, settings.shelf_bytes, place)
        self._check = check
        self._give_up = give_up
        self._running: tuple[float, Collection[JobSink]] | None = None
        """Since when, and which jobs, while the engine runs."""
        self._publisher = Publisher(name, broker.queue, blobs, settings, self._forget)
        self._held: dict[JobSink, None] = {}
        self._ran = (0, 0)
        """Batches and jobs run since the last heartbeat."""
        self._empty = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        shared = runner.manifest.row_independent
        self._company: Company | None = None
        """Who comes to the generation under way."""
        self._ringing: asyncio.Task[None] | None = None
        self._budget = Budget(
            jobs=settings.batch_jobs if shared else 1,
            rows=settings.batch_rows,
            tokens=settings.batch_tokens,
            memory_bytes=settings.batch_memory_bytes,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`, then finish the running batch and publish its last word."""
        tasks = [asyncio.create_task(self._publisher.run()), asyncio.create_task(self._beat())]
        try:
            while not stop.is_set():
                await self._turn(stop)
            while self._held:
                self._empty.clear()
                await self._empty.wait()
        finally:
            await end([*tasks, *([self._ringing] if self._ringing else [])])
            self._thread.shutdown(wait=False)

    def _bell(self) -> asyncio.Task[None]:
        """Done when a job may be waiting. The same until it is: one that is given up in between may have rung."""
        if self._ringing is None or self._ringing.done():
            self._ringing = asyncio.create_task(self._broker.queue.wait(self._model, IDLE_S))
        return self._ringing

    async def _turn(self, stop: asyncio.Event) -> None:
        try:
            waiting, claims = await self._broker.queue.take(self._model, self._name)
            if not waiting and not claims:
                await _either(self._bell(), stop)
                return
            if waiting:
                claims = await self._broker.queue.claim(self._model, self._name, choose(waiting, self._budget))
        except (RedisError, OSError) as error:
            log.warning("the broker doesn't answer (%s); trying again", type(error).__name__)
            await asyncio.sleep(0.2)
            return
        ready: Sequence[Ready] = await self._ready(claims)
        while ready:
            ready = await self._together(ready, stop)

    async def _together(self, ready: Sequence[Ready], stop: asyncio.Event) -> Sequence[Ready]:
        """Run jobs. Returns those that were claimed to come with them and came too late."""
        engine = asyncio.get_running_loop().run_in_executor
        self._count(1, len(ready))
        if not _open(ready):
            await engine(self._thread, self._run, ready)
            return ()
        over = asyncio.Event()
        company = self._company = Company(ready, self._aside, self._check)
        inviting = asyncio.create_task(self._invite(company, stop, over))
        try:
            await engine(self._thread, self._generate, ready, company)
        finally:
            over.set()
            company.changed.set()
            await inviting
            self._company = None
        return company.close()

    async def _invite(self, company: Company, stop: asyncio.Event, over: asyncio.Event) -> None:
        """Claim jobs for a generation under way: those that join it, those that come between its steps."""
        while not over.is_set() and not stop.is_set():
            company.changed.clear()
            try:
                if not company.busy:
                    await self._offer(company)
                await _either(self._bell(), company.changed)
            except (RedisError, OSError) as error:
                log.warning("the broker doesn't answer (%s); trying again", type(error).__name__)
                await asyncio.sleep(0.2)

    async def _offer(self, company: Company) -> None:
        waiting = await self._broker.queue.peek(self._model)
        turn = between(waiting, company.footprints, self._budget, joinable=company.joinable)
        if not turn.refs:
            return
        ready = await self._ready(await self._broker.queue.claim(self._model, self._name, turn.refs))
        if ready:
            self._count(not turn.joins, len(ready))
            company.offer(ready, joins=turn.joins)

    async def _ready(self, claims: Sequence[Claim]) -> list[Ready]:
        """Claimed jobs, prepared; those that can't be are ended."""
        sinks = [self._sink(claim) for claim in claims]
        self._held |= dict.fromkeys(sinks)
        ready: list[tuple[JobSink, EngineJob]] = []
        for sink in sinks:
            try:
                ready.append((sink, await self._prepare(sink)))
            except InterposeError as error:
                sink.end(error, 0)
            except OSError as error:
                log.error("a job can't be read: %s", error)
                sink.end(InternalError("the server couldn't read the job"), 0)
        return ready

    def _run(self, ready: Sequence[tuple[JobSink, EngineJob]]) -> None:
        """On the engine's thread. Ends are published from here, in one round with the last saves."""
        outcomes, seconds = self._attempt(ready)
        rows = sum(max(sink.claim.footprint.rows, 1) for sink, _ in ready)
        for (sink, job), outcome in zip(ready, outcomes, strict=True):
            share = seconds * max(sink.claim.footprint.rows, 1) / rows
            if len(ready) > 1 and isinstance(sink.stopped, JobTimeout):
                # Who took the time isn't known: each that ran out of it has its own, alone.
                (outcome,), alone_s = self._attempt([(sink, job)])
                share += alone_s
            sink.end(outcome, share)

    def _count(self, batches: int, jobs: int) -> None:
        self._ran = self._ran[0] + batches, self._ran[1] + jobs

    def _generate(self, ready: Sequence[Ready], company: Company) -> None:
        """On the engine's thread: a generation that others join. Each job's end is told as it comes."""
        for sink, _ in ready:
            sink.start()
        self._running = time.monotonic(), company.sinks
        try:
            self._runner.host([job for _, job in ready], company)
        except Exception:
            log.exception("the engine failed")
        self._check()
        company.give_up(InternalError("the server failed while running this job"))
        self._running = None

    def _aside(self, ready: Sequence[Ready]) -> None:
        """Run jobs between two steps of a generation."""
        before = self._running
        self._run(ready)
        self._running = before

    def _attempt(self, ready: Sequence[tuple[JobSink, EngineJob]]) -> tuple[list[InterposeError | None], float]:
        """Run jobs together. Returns how each ended, and the seconds it took."""
        start = time.monotonic()
        for sink, _ in ready:
            sink.start()
        self._running = start, [sink for sink, _ in ready]
        try:
            outcomes = self._runner.run([job for _, job in ready])
        except Exception:
            log.exception("the engine failed")
            outcomes = [InternalError("the server failed while running this job") for _ in ready]
        self._check()
        self._running = None
        return outcomes, time.monotonic() - start

    def _sink(self, claim: Claim) -> JobSink:
        limits = replace(self._settings.limits, wall_s=min(claim.timeout_s, self._settings.limits.wall_s))
        return JobSink(claim, limits, self._publisher.backlog, self._publisher.put)

    async def _prepare(self, sink: JobSink) -> EngineJob:
        claim = sink.claim
        served = self._runner.manifest.revision
        if claim.revision not in ("", served):
            # It was checked when it was submitted; since then the worker came back with other weights.
            raise UnknownModel(
                f"{self._model} is now served at revision {served[:12]}, and this job was recorded against "
                f"{claim.revision[:12]}; run it again"
            )
        graph = await asyncio.to_thread(self._graph, claim) if claim.blob else self._graph(claim)
        tensors = await asyncio.to_thread(self._attachments, claim, graph) if graph.attachments else {}
        exclusive = claim.footprint.exclusive or claim.alone
        return EngineJob(
            graph=graph,
            attachments=tensors,
            sink=sink,
            limits=sink.limits,
            exclusive=exclusive,
            owner=claim.user,
        )

    def _graph(self, claim: Claim) -> Graph:
        payload: bytes | bytearray = claim.payload
        if claim.blob:
            reader = self._blobs.open(blob_keys.payload(claim.user, claim.blob))
            if reader is None:
                raise InvalidPayload("the job's payload has expired; submit it again")
            try:
                payload = bytearray(reader.size)
                reader.readinto(0, memoryview(payload))
            finally:
                reader.close()
        return decode_graph(msgpack.unpackb(payload), self._settings.limits)

    def _attachments(self, claim: Claim, graph: Graph) -> dict[str, torch.Tensor]:
        inputs = {sha for run in graph.runs for invoke in run.invokes for sha in invoke.tensors.values()}
        return {
            sha: self._shelf.get(claim.user, sha, spec, placed=sha not in inputs)
            for sha, spec in graph.attachments.items()
        }

    async def _beat(self) -> None:
        """Keep the leases, and hear of jobs that were cancelled."""
        every = min(1.0, self._settings.lease_s / 3)
        while True:
            await asyncio.sleep(every)
            await self._end_stuck()
            held = {sink.claim.ref: sink for sink in self._held}
            try:
                ran, self._ran = self._ran, (0, 0)
                await self._broker.models.beat(self._model, *ran)
                pairs = [(ref, sink.claim.attempt) for ref, sink in held.items()]
                for ref in await self._broker.queue.heartbeat(self._name, pairs) if pairs else ():
                    held[ref].lose()
            except (RedisError, OSError) as error:
                log.warning("no heartbeat (%s)", type(error).__name__)

    async def _end_stuck(self) -> None:
        """Give up if the engine overran the wall time by far. A job that ran alone is told, others run again."""
        allowed = self._settings.limits.wall_s
        if self._running is None:
            return
        company = self._company
        since = self._running[0] if company is None else max(self._running[0], company.stepped_at)
        if time.monotonic() - since < allowed + STUCK_S:
            return
        log.error("an operation doesn't end; the worker starts anew")
        sinks = [*self._running[1]]
        if len(sinks) == 1:
            error = JobTimeout(f"the job ran for more than {allowed:g} s", details={"allowed_s": allowed})
            self._empty.clear()
            sinks[0].end(error, time.monotonic() - self._running[0])
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), 10)
        self._give_up()

    def _forget(self, sink: JobSink) -> None:
        self._held.pop(sink, None)
        if not self._held:
            self._empty.set()


def _open(ready: Sequence[Ready]) -> bool:
    """Whether jobs are a generation that others can join."""
    footprints = [sink.claim.footprint for sink, _ in ready]
    return all(
        footprint.kind == "generate" and footprint.runs == 1 and not job.exclusive
        for footprint, (_, job) in zip(footprints, ready, strict=True)
    )


async def _either(bell: asyncio.Task[None], event: asyncio.Event) -> None:
    """Return when the bell has rung or the event is set; raises what the bell raised. An unrung bell stays."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([bell, waiting], return_when=asyncio.FIRST_COMPLETED)
        if bell.done():
            bell.result()
    finally:
        await end([waiting])
