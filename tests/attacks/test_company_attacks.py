"""Jobs that come to a generation to stop it, to hide in it, or to have another blamed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from interpose.errors import InternalError, InterposeError
from interpose.graph.limits import Limits
from interpose.graph.model import Graph, Invoke, Node, Run
from interpose.graph.values import Ref
from interpose.runtime.engine import EngineJob
from interpose.wire.status import JobStatus
from interpose.wire.submission import Submission
from interpose_server.broker.jobs import JobInfo
from interpose_server.worker import company, loop, sink
from interpose_server.worker.loop import Worker
from rig import (
    Clock,
    Gateway,
    Valkey,
    make_settings,
    run_gateway,
    run_valkey,
    submission,
    tiny_graph,
    tiny_manifest,
)


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    yield from run_valkey()


class Stepping:
    """Each generation takes so many steps, each of them so long; forwards take `aside_s`."""

    def __init__(self, steps: int, step_s: float = 0.002, aside_s: float = 0.0, clock: Clock | None = None) -> None:
        self.manifest = tiny_manifest()
        self.steps, self.step_s, self.aside_s = steps, step_s, aside_s
        self.clock = clock or Clock()
        self.aside = 0
        self.stepping = threading.Event()

    def run(self, jobs: Sequence[EngineJob], breaks: Any = None) -> list[InterposeError | None]:
        self.aside += 1
        self.take(self.aside_s)
        return [self.done(job) for job in jobs]

    def host(self, jobs: Sequence[EngineJob], company: Any) -> None:
        left = {id(job): (job, self.steps) for job in jobs}
        while left:
            company.pause(joinable=True)
            left |= {id(job): (job, self.steps) for job in company.arrivals()}
            self.stepping.set()
            self.take(self.step_s)
            for job, steps in list(left.values()):
                left[id(job)] = job, steps - 1
                error = self.wanted(job)
                if steps == 1 or error is not None:
                    del left[id(job)]
                    company.ended(job, error or self.done(job))

    def take(self, seconds: float) -> None:
        time.sleep(seconds)
        self.clock.sleep(seconds)

    def wanted(self, job: EngineJob) -> InterposeError | None:
        try:
            job.sink.cancelled()
        except InterposeError as error:
            return error
        return None

    def done(self, job: EngineJob) -> InterposeError | None:
        if (error := self.wanted(job)) is None:
            job.sink.save(1, torch.ones(2))
        return error


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which turns and wall times are measured: that of the engine double, whatever holds up this machine."""
    clock = Clock()
    for module in (company, sink):
        monkeypatch.setattr(module, "time", clock)
    return clock


@asynccontextmanager
async def lab(valkey: Valkey, folder: Path, **more: Any) -> AsyncIterator[Gateway]:
    valkey.clear()
    async with run_gateway(make_settings(valkey, folder, **more)) as gateway:
        yield gateway


@asynccontextmanager
async def working(gateway: Gateway, engine: Any, **more: Any) -> AsyncIterator[asyncio.Task[None]]:
    stop = asyncio.Event()
    worker = Worker("tiny", "w", engine, gateway.broker, gateway.blobs, gateway.settings, **more)
    task = asyncio.create_task(worker.run(stop))
    try:
        yield task
    finally:
        stop.set()
        with suppress(OSError):
            await asyncio.wait_for(task, 60)


def generation() -> Submission:
    nodes = (Node(0, "tokens", run=0), Node(1, "save", (Ref(0),), invoke=None))
    return submission(Graph((Run("generate", (Invoke(((1, 2, 3),)),), {"max_new_tokens": 3}),), nodes))


async def status(gateway: Gateway, job: Submission) -> JobInfo:
    return await gateway.broker.queue.info("ada", job.id)


async def ended(gateway: Gateway, job: Submission) -> JobInfo:
    for _ in range(6000):
        if (info := await status(gateway, job)).status.terminal:
            return info
        await asyncio.sleep(0.01)
    raise TimeoutError


async def begun(gateway: Gateway, engine: Stepping) -> Submission:
    job = generation()
    await gateway.post(job)
    assert await asyncio.to_thread(engine.stepping.wait, 60)
    return job


@asynccontextmanager
async def flooded(gateway: Gateway, make: Callable[[], Submission], every_s: float) -> AsyncIterator[None]:
    """Jobs without end."""
    enough = asyncio.Event()

    async def flood() -> None:
        while not enough.is_set():
            await gateway.post(make())
            await asyncio.sleep(every_s)

    task = asyncio.create_task(flood())
    try:
        yield
    finally:
        enough.set()
        await task


async def test_forwards_without_end_take_half_of_the_time(valkey: Valkey, tmp_path: Path, clock: Clock) -> None:
    """100 steps of 5 ms beside forwards of 60 ms: one forward a step would make them 6.5 seconds."""
    engine = Stepping(steps=100, step_s=0.005, aside_s=0.06, clock=clock)
    async with lab(valkey, tmp_path, batch_jobs=1) as gateway, working(gateway, engine):
        job = await begun(gateway, engine)
        start = clock.now
        async with flooded(gateway, lambda: submission(tiny_graph()), 0.02):
            info = await ended(gateway, job)
        assert info.status is JobStatus.COMPLETED
        assert engine.aside >= 2 and clock.now - start < 2.0


async def test_a_job_that_ran_out_of_time_in_company_has_its_own_though_others_go_on_coming(
    valkey: Valkey, tmp_path: Path, clock: Clock
) -> None:
    engine = Stepping(steps=150, step_s=0.005, clock=clock)
    async with lab(valkey, tmp_path, limits=Limits(wall_s=0.5)) as gateway, working(gateway, engine):
        job = await begun(gateway, engine)
        async with flooded(gateway, generation, 0.1):
            info = await asyncio.wait_for(ended(gateway, job), 60)
    assert info.status is JobStatus.COMPLETED


async def test_who_broke_the_device_fails_nobody_else(valkey: Valkey, tmp_path: Path) -> None:
    """Its neighbours' failures are the device's: they are run again by a process that has a sound one."""
    broken = threading.Event()

    class Breaks(Stepping):
        def host(self, jobs: Sequence[EngineJob], company: Any) -> None:
            self.stepping.set()
            broken.wait(60)
            for job in jobs:
                company.ended(job, InternalError("everything fails now"))

    def check() -> None:
        if broken.is_set():
            raise OSError("the device is broken")

    engine = Breaks(1)
    async with lab(valkey, tmp_path) as gateway, working(gateway, engine, check=check) as worker:
        job = await begun(gateway, engine)
        broken.set()
        with pytest.raises(OSError):
            await asyncio.wait_for(asyncio.shield(worker), 60)
        assert (await status(gateway, job)).status is JobStatus.RUNNING
        await gateway.broker.queue.reap("w")
        assert (await status(gateway, job)).status is JobStatus.QUEUED


async def test_the_first_of_a_generation_is_not_blamed_for_one_that_joined(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined, go_on, given_up = threading.Event(), threading.Event(), asyncio.Event()

    class Sticks(Stepping):
        def host(self, jobs: Sequence[EngineJob], company: Any) -> None:
            self.stepping.set()
            while not (came := company.arrivals()):
                company.pause(joinable=True)
                time.sleep(0.01)
            joined.set()
            assert go_on.wait(60)
            for job in (*jobs, *came):
                company.ended(job, self.done(job))

    engine = Sticks(1)
    async with (
        lab(valkey, tmp_path, limits=Limits(wall_s=0.5)) as gateway,
        working(gateway, engine, give_up=given_up.set),
    ):
        job = await begun(gateway, engine)
        await gateway.post(generation())
        assert await asyncio.to_thread(joined.wait, 60)
        monkeypatch.setattr(loop, "STUCK_S", 0.2)
        await asyncio.wait_for(given_up.wait(), 60)
        assert (await status(gateway, job)).status is JobStatus.RUNNING
        go_on.set()
