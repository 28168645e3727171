"""Jobs that come to a generation under way: on a real broker, with an engine double that steps as it is told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from interpose.errors import InterposeError, OpFailed
from interpose.graph.footprint import Footprint
from interpose.graph.model import Graph, Invoke, Node, Run
from interpose.graph.values import Ref
from interpose.runtime.engine import EngineJob
from interpose.wire.status import JobStatus
from interpose_server.broker.waiting import Waiting
from interpose_server.settings import Settings
from interpose_server.worker.meter import Meter
from interpose_server.worker.scheduler import Budget, between
from rig import Gateway, run_gateway, submission, tiny_graph, tiny_manifest
from test_server_worker import ended, error_of, working

BUDGET = Budget(jobs=4, rows=8, tokens=64, memory_bytes=1000)
GENERATES = Footprint(kind="generate")


def job(ref: str, *, alone: bool = False, **footprint: Any) -> Waiting:
    return Waiting(ref, Footprint(**footprint), alone, 0)


# -- who comes next ----------------------------------------------------------------------------------------------


def test_the_fairest_job_decides_who_comes_between_two_steps() -> None:
    generates, traces = job("g", kind="generate"), [job("a"), job("b", attention=True), job("c")]
    assert between([generates, *traces], [GENERATES], BUDGET) == between([generates], [GENERATES], BUDGET)
    turn = between([generates, job("h", kind="generate"), *traces], [GENERATES], BUDGET)
    assert (turn.refs, turn.joins) == (["g", "h"], True)
    turn = between([traces[0], generates, *traces[1:]], [GENERATES], BUDGET)
    assert (turn.refs, turn.joins) == (["a", "c"], False)


def test_what_is_on_the_generation_takes_its_memory_from_those_aside() -> None:
    waiting = [job(name, memory_bytes=400) for name in "abc"]
    assert between(waiting, [GENERATES], BUDGET).refs == ["a", "b"]
    assert between(waiting, [Footprint(kind="generate", memory_bytes=500)], BUDGET).refs == ["a"]


@pytest.mark.parametrize(
    "first",
    [
        job("g", kind="generate", exclusive=True),
        job("g", kind="generate", alone=True),
        job("g", kind="generate", rows=8),
        job("g", kind="generate", attention=True),
        job("g", kind="generate", runs=2),
        job("g", kind="mixed"),
    ],
)
def test_nobody_overtakes_a_job_that_waits_for_the_end(first: Waiting) -> None:
    turn = between([first, job("h", kind="generate"), job("a")], [GENERATES], BUDGET)
    assert not turn.refs


def test_nothing_comes_to_an_empty_generation() -> None:
    assert not between([job("a")], [], BUDGET).refs
    assert not between([], [GENERATES], BUDGET).refs
    assert not between([job("g", kind="generate")], [GENERATES], BUDGET, joinable=False).refs
    assert between([job("a")], [GENERATES], BUDGET, joinable=False).refs == ["a"]


def test_seconds_are_shared_by_rows() -> None:
    now = [0.0]
    meter = Meter(lambda: now[0])
    meter.enter("a", 1)
    now[0] = 2.0
    meter.enter("b", 3)
    now[0] = 6.0
    assert meter.leave("a") == pytest.approx(2.0 + 1.0)
    meter.mark()
    now[0] = 100.0
    meter.skip()
    now[0] = 101.0
    assert meter.leave("b") == pytest.approx(3.0 + 1.0)


# -- a worker ----------------------------------------------------------------------------------------------------


class Stepping:
    """An engine double: each job takes so many steps of a generation; traces are done at once."""

    def __init__(self, steps: int = 3, each: Callable[[int], None] = lambda step: None) -> None:
        self.manifest = tiny_manifest()
        self.log: list[str] = []
        self.steps = steps
        self.each = each

    def run(self, jobs: Sequence[EngineJob]) -> list[InterposeError | None]:
        self.log.append(f"aside {len(jobs)}")
        return [self._done(job) for job in jobs]

    def host(self, jobs: Sequence[EngineJob], company: Any) -> None:
        left = {id(job): self.steps for job in jobs}
        known = {id(job): job for job in jobs}
        step = 0
        while left:
            self.each(step)
            step += 1
            for number in list(left):
                left[number] -= 1
                if not left[number]:
                    del left[number]
                    company.ended(known[number], self._done(known[number]))
            company.pause(joinable=True)
            for job in company.arrivals():
                self.log.append(f"joined at {step}")
                known[id(job)] = job
                left[id(job)] = self.steps

    def _done(self, job: EngineJob) -> InterposeError | None:
        try:
            job.sink.cancelled()
        except InterposeError as error:
            return error
        job.sink.save(1, torch.ones(2))
        return None


def generation() -> Graph:
    nodes = (Node(0, "tokens", run=0), Node(1, "save", (Ref(0),), invoke=None))
    return Graph((Run("generate", (Invoke(((1, 2, 3),)),), {"max_new_tokens": 3}),), nodes)


async def running(gateway: Gateway, *jobs: Any) -> None:
    for job in jobs:
        for _ in range(1000):
            if (await gateway.broker.queue.info("ada", job.id)).status is JobStatus.RUNNING:
                break
            await asyncio.sleep(0.005)


async def test_generations_join_and_forwards_come_between_steps(settings: Settings) -> None:
    go_on = threading.Event()
    came = threading.Event()
    engine = Stepping(
        steps=200, each=lambda step: time.sleep(0.005) if go_on.is_set() else came.set() or go_on.wait(10)
    )
    async with run_gateway(settings) as gateway, working(gateway, engine):
        first, second, trace = submission(generation()), submission(generation()), submission(tiny_graph())
        await gateway.post(first)
        await asyncio.to_thread(came.wait, 10)
        await gateway.post(second)
        await gateway.post(trace)
        go_on.set()
        await ended(gateway, trace)
        assert (await gateway.broker.queue.info("ada", first.id)).status is JobStatus.RUNNING
        for job in (first, second):
            assert (await ended(gateway, job))[-1].body["status"] == "completed"
        assert engine.log[0] == "aside 1" or engine.log[0].startswith("joined")
        assert "aside 1" in engine.log and any(line.startswith("joined") for line in engine.log)


async def test_what_came_too_late_runs_next(settings: Settings) -> None:
    """Whatever was claimed ends, however the generation's end and its arrival fall together."""
    engine = Stepping(steps=2, each=lambda step: time.sleep(0.002))
    async with run_gateway(settings) as gateway, working(gateway, engine):
        jobs = [submission(generation() if index % 3 else tiny_graph()) for index in range(30)]
        for job in jobs:
            await gateway.post(job)
            await asyncio.sleep(0.003)
        for job in jobs:
            assert (await ended(gateway, job))[-1].body["status"] == "completed"


async def test_a_generation_that_fails_ends_all_that_are_on_it(settings: Settings) -> None:
    class Broken(Stepping):
        def host(self, jobs: Sequence[EngineJob], company: Any) -> None:
            company.ended(jobs[0], OpFailed("that one"))
            raise RuntimeError("the others")

    async with run_gateway(settings) as gateway, working(gateway, Broken()):
        jobs = [submission(generation()) for _ in range(2)]
        for job in jobs:
            await gateway.post(job)
        codes = {error_of(await ended(gateway, job)) for job in jobs}
        assert codes <= {"op_failed", "internal_error"} and "op_failed" in codes


async def test_stopping_lets_a_generation_end_and_takes_nobody_more(settings: Settings, tmp_path: Path) -> None:
    began = threading.Event()

    def each(step: int) -> None:
        began.set()
        time.sleep(0.01)

    async with run_gateway(settings) as gateway:
        async with working(gateway, Stepping(steps=20, each=each)) as stop:
            first = submission(generation())
            await gateway.post(first)
            await asyncio.to_thread(began.wait, 10)
            stop.set()
            await asyncio.sleep(0.02)
            late = submission(generation())
            await gateway.post(late)
        assert (await ended(gateway, first))[-1].body["status"] == "completed"
        assert (await gateway.broker.queue.info("ada", late.id)).status is JobStatus.QUEUED
