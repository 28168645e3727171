"""The next batch is claimed and made ready while one runs; small jobs come between the forwards of a large one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interpose.errors import InterposeError
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.loading import load
from interpose.wire.status import JobStatus
from interpose.wire.submission import Submission
from interpose_server.broker import keys
from interpose_server.worker import company
from interpose_server.worker.cost import Cost
from interpose_server.worker.loop import Worker
from interpose_server.worker.scheduler import Budget
from models import tiny
from rig import Clock, Gateway, Valkey, make_settings, run_gateway, submission, tiny_graph
from test_server_company import generation
from test_server_worker import Obedient, ended, error_of, save_ones, working

# -- the next batch --------------------------------------------------------------------------------------------


class Held(Obedient):
    """Its first batch takes until it is let go."""

    def __init__(self) -> None:
        super().__init__(lambda job: None)
        self.began, self.go_on = threading.Event(), threading.Event()

    def run(self, jobs: Sequence[EngineJob], breaks: Any = None) -> list[InterposeError | None]:
        self.batches.append(jobs)
        self.began.set()
        assert self.go_on.wait(60)
        errors: list[InterposeError | None] = []
        for job in jobs:
            try:
                job.sink.cancelled()
                errors.append(None)
            except InterposeError as error:
                errors.append(error)
        return errors


async def reached(gateway: Gateway, job: Submission, status: JobStatus) -> None:
    for _ in range(12_000):
        if (await gateway.broker.queue.info("ada", job.id)).status is status:
            return
        await asyncio.sleep(0.005)
    raise TimeoutError(f"never {status}")


async def kept(gateway: Gateway, *jobs: Submission) -> None:
    """Return once a heartbeat has kept the lease of each."""
    redis = gateway.broker.redis
    for job in jobs:
        ref = keys.ref("ada", job.id)
        before = await redis.zscore(keys.LEASES, ref)
        assert before is not None
        async with asyncio.timeout(60):
            while (await redis.zscore(keys.LEASES, ref) or 0) <= before:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def first_of(gateway: Gateway, engine: Held) -> Submission:
    job = submission()
    await gateway.post(job)
    assert await asyncio.to_thread(engine.began.wait, 60)
    return job


async def test_the_next_batch_is_claimed_while_one_runs_and_grows_until_it_begins(
    valkey: Valkey, tmp_path: Path
) -> None:
    engine, prepared = Held(), list[EngineJob]()
    settings = make_settings(valkey, tmp_path)
    async with run_gateway(settings) as gateway:
        worker = Worker(
            "tiny", "w1", engine, gateway.broker, gateway.blobs, settings,
            prepare=lambda job: prepared.append(job) or job,  # type: ignore[func-returns-value]
        )  # fmt: skip
        async with driven(worker):
            first = await first_of(gateway, engine)
            later = [submission() for _ in range(3)]
            for job in later:
                await gateway.post(job)
                await reached(gateway, job, JobStatus.RUNNING)
            unlike = submission(generation())
            await gateway.post(unlike)
            await kept(gateway, first, *later)
            assert len(prepared) == 4, "ready before they begin"
            assert (await gateway.broker.queue.info("ada", unlike.id)).status is JobStatus.QUEUED
            engine.go_on.set()
            for job in (first, *later):
                await ended(gateway, job)
                info = await gateway.broker.queue.info("ada", job.id)
                assert (info.status, info.attempt) == (JobStatus.COMPLETED, 1)
            assert [len(batch) for batch in engine.batches[:2]] == [1, 3]
            await gateway.broker.queue.cancel("ada", unlike.id)


async def test_what_is_claimed_ahead_goes_back_when_the_worker_stops(valkey: Valkey, tmp_path: Path) -> None:
    engine = Held()
    async with run_gateway(make_settings(valkey, tmp_path)) as gateway:
        async with working(gateway, engine) as stop:
            first = await first_of(gateway, engine)
            later = [submission(), submission()]
            for job in later:
                await gateway.post(job)
                await reached(gateway, job, JobStatus.RUNNING)
            stop.set()
            for job in later:
                await reached(gateway, job, JobStatus.QUEUED)
            engine.go_on.set()
        assert (await gateway.broker.queue.info("ada", first.id)).status is JobStatus.COMPLETED
        assert await gateway.broker.queue.order("tiny") == [keys.ref("ada", job.id) for job in later]
        assert not any(waiting.alone for waiting in await gateway.broker.queue.peek("tiny"))
        async with working(gateway, Obedient(save_ones), "w2"):
            for job in later:
                *_, end = await ended(gateway, job)
                assert end.body["status"] == "completed"


async def test_a_broken_device_is_not_laid_to_those_who_were_next(valkey: Valkey, tmp_path: Path) -> None:
    engine = Held()

    def check() -> None:
        raise OSError("the device is broken")

    async with run_gateway(make_settings(valkey, tmp_path)) as gateway:
        worker = Worker("tiny", "w1", engine, gateway.broker, gateway.blobs, gateway.settings, check=check)
        task = asyncio.create_task(worker.run(asyncio.Event()))
        first = await first_of(gateway, engine)
        later = submission()
        await gateway.post(later)
        await reached(gateway, later, JobStatus.RUNNING)
        engine.go_on.set()
        with pytest.raises(OSError):
            await asyncio.wait_for(task, 60)
        await gateway.broker.queue.reap("w1")
        waiting = {one.ref: one.alone for one in await gateway.broker.queue.peek("tiny")}
        assert waiting == {keys.ref("ada", first.id): True, keys.ref("ada", later.id): False}


async def test_a_job_cancelled_before_its_batch_begins_is_not_run(valkey: Valkey, tmp_path: Path) -> None:
    engine = Held()
    settings = make_settings(valkey, tmp_path)
    async with run_gateway(settings) as gateway, working(gateway, engine):
        await first_of(gateway, engine)
        gone, other = submission(), submission()
        for job in (gone, other):
            await gateway.post(job)
            await reached(gateway, job, JobStatus.RUNNING)
        await gateway.client.delete(f"/v1/jobs/{gone.id}")
        await kept(gateway, other)  # by the same heartbeat the worker hears of it
        engine.go_on.set()
        assert error_of(await ended(gateway, gone)) == "job_cancelled"
        assert (await ended(gateway, other))[-1].body["status"] == "completed"


async def test_a_job_that_cannot_be_prepared_fails_alone(valkey: Valkey, tmp_path: Path) -> None:
    engine = Held()

    def prepare(job: EngineJob) -> EngineJob:
        if len(job.graph.nodes) > 2:
            raise RuntimeError("a fault of ours")
        return job

    graph = tiny_graph()
    async with run_gateway(make_settings(valkey, tmp_path)) as gateway:
        worker = Worker("tiny", "w1", engine, gateway.broker, gateway.blobs, gateway.settings, prepare=prepare)
        async with driven(worker):
            await first_of(gateway, engine)
            bad = submission(Graph(graph.runs, (*graph.nodes, Node(2, "tell", args=("x",)))))
            good = submission()
            for job in (bad, good):
                await gateway.post(job)
            assert error_of(await ended(gateway, bad)) == "internal_error"
            await reached(gateway, good, JobStatus.RUNNING)
            engine.go_on.set()
            assert (await ended(gateway, good))[-1].body["status"] == "completed"


async def test_a_job_that_came_too_late_for_a_batch_counts_once(valkey: Valkey, tmp_path: Path) -> None:
    engine = Held()
    async with run_gateway(make_settings(valkey, tmp_path)) as gateway:
        budget = replace(BUDGET, seconds=0.06)
        worker = Worker("tiny", "w1", engine, gateway.broker, gateway.blobs, gateway.settings, budget=budget)
        async with driven(worker):
            large = submission(tiny_graph(tokens=(1,) * 60), batching="exclusive")
            await gateway.post(large)
            assert await asyncio.to_thread(engine.began.wait, 60)
            late = submission()
            await gateway.post(late)
            batch = worker._desk.company
            assert batch is not None
            for _ in range(12_000):
                if batch.busy:
                    break
                await asyncio.sleep(0.005)
            assert batch.busy, "it was to come between two forwards"
            engine.go_on.set()
            await ended(gateway, late)
            assert await ran(gateway, 2) == (2, 2)


async def ran(gateway: Gateway, jobs: int) -> tuple[int, int]:
    """Batches and jobs that the worker has told of, once it's so many jobs or more."""
    for _ in range(12_000):
        hosted = await gateway.broker.models.get("tiny")
        if hosted.jobs >= jobs:
            return hosted.batches, hosted.jobs
        await asyncio.sleep(0.01)
    raise TimeoutError


@asynccontextmanager
async def driven(worker: Worker) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    try:
        yield
    finally:
        stop.set()
        with suppress(OSError):
            await asyncio.wait_for(task, 60)


# -- the bound, on a real engine -------------------------------------------------------------------------------

MARK = 299
"""The token that small jobs are known by."""

BUDGET = Budget(
    jobs=64, rows=256, tokens=4096, memory_bytes=1 << 33, seconds=0.5,
    cost=Cost(forward_s=0.05, token_s=0.001, step_s=0.05, row_s=0.001),
)  # fmt: skip
"""By which a forward takes 50 ms, so that ten are a long time."""


def small() -> Submission:
    return submission(blocks(((MARK, 7, 8),)))


def blocks(*prompts: Sequence[Sequence[int]]) -> Graph:
    """A run for each prompt, all apart from the others."""
    nodes: list[Node] = []
    for run in range(len(prompts)):
        nodes.append(Node(len(nodes), "read", point=Point("transformer.h.2", "output"), invoke=0, run=run))
        nodes.append(Node(len(nodes), "save", (Ref(len(nodes) - 1),), invoke=0, run=run))
    runs = tuple(Run("trace", (Invoke(tuple(map(tuple, rows))),)) for rows in prompts)
    return Graph(runs, tuple(nodes))


def grows(steps: int) -> Graph:
    nodes = (Node(0, "tokens"), Node(1, "save", (Ref(0),)))
    options = {"max_new_tokens": steps, "eos_token_id": -1}
    return Graph((Run("generate", (Invoke(((5, 6, 7),)),), options),), nodes)


LARGE: dict[str, Callable[[], Submission]] = {
    "a generation": lambda: submission(grows(40)),
    "a generation that must be alone": lambda: submission(grows(40), batching="exclusive"),
    "a sweep": lambda: submission(blocks(*[((5, 6, 7 + run),) for run in range(40)])),
    "a sweep that must be alone": lambda: submission(
        blocks(*[((5, 6, 7 + run),) for run in range(40)]), batching="exclusive"
    ),
}


@pytest.mark.parametrize("large", LARGE)
async def test_a_small_job_waits_for_the_forward_under_way_and_no_other(
    valkey: Valkey, tmp_path: Path, large: str
) -> None:
    """Of 40 forwards, at each of three that are under way when one comes. A new turn follows a pause of `aside_s`,
    here none."""
    engine = Engine(load(tiny("gpt2"), name="tiny"), tokens=4)
    settings = make_settings(valkey, tmp_path, aside_s=0.0)
    loop = asyncio.get_running_loop()
    seen: list[str] = []
    came: list[Submission] = []

    async with run_gateway(settings) as gateway:
        await gateway.broker.models.publish("tiny", "w1", engine.manifest, "")
        worker = Worker(
            "tiny", "w1", engine, gateway.broker, gateway.blobs, settings, budget=BUDGET, prepare=engine.prepare
        )

        def forward(_: Any, args: Any, kwargs: Any) -> None:
            seen.append("small" if MARK in kwargs["input_ids"] else "large")
            if seen[-1] == "large" and seen.count("large") in (5, 11, 29):
                came.append(small())
                asyncio.run_coroutine_threadsafe(gateway.post(came[-1]), loop).result(60)
                batch = worker._desk.company
                assert batch is not None
                # The forward takes long enough for the job to be claimed and made ready.
                for _ in range(12_000):
                    if batch.busy:
                        return
                    time.sleep(0.005)
                raise TimeoutError

        handle = engine.loaded.model.register_forward_pre_hook(forward, with_kwargs=True)
        try:
            async with driven(worker):
                job = LARGE[large]()
                await gateway.post(job)
                assert (await ended(gateway, job))[-1].body["status"] == "completed"
                for one in came:
                    assert (await ended(gateway, one))[-1].body["status"] == "completed"
        finally:
            handle.remove()
    places = [index for index, kind in enumerate(seen) if kind == "small"]
    assert len(seen) == 43 and places == [5, 12, 31], "each right after the forward during which it came"


async def test_small_jobs_of_a_crowd_leave_the_large_one_its_share(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user that has one small job after the other gets half of the time of one that generates, not all of it."""
    engine = Engine(load(tiny("gpt2"), name="tiny"))
    settings = make_settings(valkey, tmp_path, aside_s=10.0)
    spent = {"small": 0.0, "large": 0.0}
    meanwhile, clock = 0.0, Clock()
    monkeypatch.setattr(company, "time", clock)

    async with run_gateway(settings) as gateway:
        await gateway.broker.models.publish("tiny", "w1", engine.manifest, "")

        def forward(_: Any, args: Any, kwargs: Any) -> None:
            nonlocal meanwhile
            kind = "small" if MARK in kwargs["input_ids"] else "large"
            took = 0.04 if kind == "small" else 0.01
            time.sleep(took)
            clock.sleep(took)
            spent[kind] += took
            meanwhile = spent["small"] if kind == "large" else meanwhile

        handle = engine.loaded.model.register_forward_pre_hook(forward, with_kwargs=True)
        worker = Worker("tiny", "w1", engine, gateway.broker, gateway.blobs, settings, budget=BUDGET)
        try:
            async with driven(worker):
                job = submission(grows(60))
                await gateway.post(job)
                await reached(gateway, job, JobStatus.RUNNING)
                crowd = [small() for _ in range(300)]

                async def flood() -> None:
                    for one in crowd:
                        await gateway.post(one)
                        await asyncio.sleep(0.01)

                task = asyncio.create_task(flood())
                assert (await ended(gateway, job))[-1].body["status"] == "completed"
                task.cancel()
                assert 0 < meanwhile <= 1.2 * spent["large"]
        finally:
            handle.remove()


async def test_whatever_comes_ends_once(valkey: Valkey, tmp_path: Path) -> None:
    """Small and large, alone and not, in a row without rest: none is lost between being claimed and being run."""
    engine = Engine(load(tiny("gpt2"), name="tiny"), tokens=16)
    settings = make_settings(valkey, tmp_path, aside_s=0.0, batch_jobs=8)
    makers = [
        small,
        lambda: submission(grows(4)),
        lambda: submission(blocks(((5, 6),), ((7, 8),))),
        lambda: submission(blocks(((5, 6, 7),)), batching="exclusive"),
        small,
        lambda: submission(grows(30)),
    ]
    async with run_gateway(settings) as gateway:
        await gateway.broker.models.publish("tiny", "w1", engine.manifest, "")
        worker = Worker(
            "tiny", "w1", engine, gateway.broker, gateway.blobs, settings, budget=BUDGET, prepare=engine.prepare
        )
        async with driven(worker):
            jobs = [makers[index % len(makers)]() for index in range(60)]
            for index, job in enumerate(jobs):
                assert (await gateway.post(job)).status_code == 202
                await asyncio.sleep(0.004 * (index % 3))
            for job in jobs:
                found = await ended(gateway, job)
                assert [event.body["status"] for event in found if event.kind == "status"] == [
                    "queued",
                    "running",
                    "completed",
                ]
            assert (await ran(gateway, len(jobs)))[1] == len(jobs)
    assert torch.is_grad_enabled()
