"""Jobs that come to a generation under way: on a real broker, with an engine double that steps as it is told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from interpose_server.worker.cost import Cost
from interpose_server.worker.meter import Meter
from interpose_server.worker.scheduler import Budget, Place, UnderWay, between
from rig import Gateway, run_gateway, submission, tiny_graph, tiny_manifest
from test_server_worker import ended, error_of, working

BUDGET = Budget(jobs=4, rows=8, tokens=64, memory_bytes=1000)
GENERATES = Footprint(kind="generate")


def job(ref: str, *, alone: bool = False, **footprint: Any) -> Waiting:
    return Waiting(ref, Footprint(**footprint), alone, 0)


# -- who comes next ----------------------------------------------------------------------------------------------


def under_way(*jobs: Footprint, **more: Any) -> UnderWay:
    return UnderWay(jobs or (GENERATES,), **{"joinable": True, **more})


def turn(waiting: list[Waiting], *jobs: Footprint, budget: Budget = BUDGET, **more: Any) -> tuple[list[str], Place]:
    found = between(waiting, under_way(*jobs, **more), budget)
    return [*found.refs], found.place


def test_the_fairest_job_decides_whether_anybody_joins() -> None:
    generates, traces = job("g", kind="generate"), [job("a"), job("b", attention=True), job("c")]
    assert turn([generates, *traces]) == (["g"], Place.JOINS)
    assert turn([generates, job("h", kind="generate"), *traces]) == (["g", "h"], Place.JOINS)
    assert turn([traces[0], generates, *traces[1:]]) == (["a", "c"], Place.ASIDE)


def test_what_is_on_the_generation_takes_its_memory_from_those_aside() -> None:
    waiting = [job(name, memory_bytes=400) for name in "abc"]
    assert turn(waiting) == (["a", "b"], Place.ASIDE)
    assert turn(waiting, Footprint(kind="generate", memory_bytes=500)) == (["a"], Place.ASIDE)


LONG = {"kind": "generate", "longest": 900, "steps": 800}
TIMED = replace(
    BUDGET, tokens=4096, seconds=0.5, cost=Cost(forward_s=0.01, token_s=0.001, step_s=0.01, row_s=0.001)
)


@pytest.mark.parametrize(
    "first",
    [
        job("g", **LONG, exclusive=True),
        job("g", **LONG, alone=True),
        job("g", **LONG, rows=8),
        job("g", **LONG, attention=True),
        job("g", **LONG, runs=2),
        job("g", kind="mixed", runs=100, longest=10),
        job("g", runs=400, longest=12, tokens=4800),
    ],
)
def test_nobody_joins_before_a_job_that_waits_for_the_end_and_small_ones_wait_for_neither(first: Waiting) -> None:
    assert turn([first, job("h", **LONG)], budget=TIMED) == ([], Place.ASIDE)
    assert turn([first, job("h", **LONG), job("a", longest=12)], budget=TIMED) == (["a"], Place.ASIDE)


def test_a_small_generation_or_session_comes_between_the_forwards_of_a_sweep() -> None:
    sweep = Footprint(runs=360, longest=12, tokens=4320)
    for small in (job("g", kind="generate", longest=20, steps=8), job("s", runs=10, longest=12, tokens=120)):
        assert turn([small], sweep, budget=TIMED, joinable=False) == ([small.ref], Place.ASIDE)
    assert not turn([job("g", **LONG)], sweep, budget=TIMED, joinable=False)[0]


def test_who_had_a_turn_gives_way_to_others() -> None:
    waiting = [job("ada/1"), job("bob/1"), job("ada/2")]
    assert turn(waiting, served={"ada"}) == (["bob/1"], Place.ASIDE)
    assert not turn(waiting[::2], served={"ada"})[0]


def test_what_comes_at_the_end_of_a_batch_is_next() -> None:
    ending = {"joinable": False, "ending": True}
    waiting = [job("a"), job("g", kind="generate"), job("b")]
    assert turn(waiting, Footprint(), **ending) == (["a", "b"], Place.NEXT)
    assert turn(waiting[1:], Footprint(), **ending, ahead=[Footprint()]) == (["b"], Place.NEXT)
    assert not turn(waiting[1:2], Footprint(), **ending, ahead=[Footprint()])[0]


def test_a_job_under_suspicion_or_too_large_is_not_claimed_ahead() -> None:
    for first in (job("x", alone=True), job("x", memory_bytes=2000)):
        assert not turn([first, job("a")], Footprint(), joinable=False, ending=True)[0]


def test_nothing_comes_to_an_empty_generation() -> None:
    assert not between([job("a")], UnderWay([], joinable=True), BUDGET).refs
    assert not turn([])[0]
    assert turn([job("g", **LONG)], joinable=False, budget=TIMED) == ([], Place.ASIDE)
    assert turn([job("a")], joinable=False) == (["a"], Place.ASIDE)


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

    def run(self, jobs: Sequence[EngineJob], breaks: Any = None) -> list[InterposeError | None]:
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
        for _ in range(10_000):
            if (await gateway.broker.queue.info("ada", job.id)).status is JobStatus.RUNNING:
                break
            await asyncio.sleep(0.005)


async def test_generations_join_and_forwards_come_between_steps(settings: Settings) -> None:
    go_on, came, over = threading.Event(), threading.Event(), threading.Event()

    def each(step: int) -> None:
        came.set()
        go_on.wait(60)
        over.wait(0.005)

    engine = Stepping(steps=3000, each=each)
    async with run_gateway(settings) as gateway, working(gateway, engine):
        first, second, trace = submission(generation()), submission(generation()), submission(tiny_graph())
        await gateway.post(first)
        await asyncio.to_thread(came.wait, 60)
        await gateway.post(second)
        await gateway.post(trace)
        go_on.set()
        await ended(gateway, trace)
        assert (await gateway.broker.queue.info("ada", first.id)).status is JobStatus.RUNNING
        over.set()
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
    began, over = threading.Event(), threading.Event()

    def each(step: int) -> None:
        began.set()
        over.wait(60 if step == 19 else 0.01)

    async with run_gateway(settings) as gateway:
        async with working(gateway, Stepping(steps=20, each=each)) as stop:
            first = submission(generation())
            await gateway.post(first)
            await asyncio.to_thread(began.wait, 60)
            stop.set()
            await asyncio.sleep(0.1)
            late = submission(generation())
            await gateway.post(late)
            over.set()
        assert (await ended(gateway, first))[-1].body["status"] == "completed"
        assert (await gateway.broker.queue.info("ada", late.id)).status is JobStatus.QUEUED
