"""The worker's loop on a real broker, with an engine that does as it is told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interpose.errors import InterposeError, OpFailed
from interpose.graph.limits import Limits
from interpose.graph.manifest import Manifest
from interpose.graph.model import Graph, Node
from interpose.runtime.engine import EngineJob
from interpose.wire.status import JobStatus
from interpose.wire.submission import Submission
from interpose.wire.tensors import encode_tensor
from interpose_server.broker import events, keys
from interpose_server.broker.events import Stored
from interpose_server.broker.jobs import Report
from interpose_server.broker.states import ModelState
from interpose_server.settings import Settings
from interpose_server.worker import publisher
from interpose_server.worker.loop import Worker
from rig import Gateway, Valkey, at_work, make_settings, run_gateway, submission, tiny_graph, tiny_manifest

Step = Callable[[EngineJob], InterposeError | None]


class Obedient:
    """An engine double: runs a function for each job and remembers the batches."""

    def __init__(self, step: Step) -> None:
        self.manifest: Manifest = tiny_manifest()
        self.batches: list[Sequence[EngineJob]] = []
        self._step = step

    def run(self, jobs: Sequence[EngineJob], breaks: Any = None) -> list[InterposeError | None]:
        self.batches.append(jobs)
        return [self._step(job) for job in jobs]


def save_ones(job: EngineJob) -> None:
    job.sink.save(1, torch.ones(2, 3))


@asynccontextmanager
async def working(gateway: Gateway, engine: Any, name: str = "w1") -> AsyncIterator[asyncio.Event]:
    async with at_work(Worker("tiny", name, engine, gateway.broker, gateway.blobs, gateway.settings)) as stop:
        yield stop


async def ended(gateway: Gateway, job: Submission) -> list[Stored]:
    """The job's events, once it is over."""
    for _ in range(6000):
        info = await gateway.broker.queue.info("ada", job.id)
        if info.status.terminal:
            return await events.read(gateway.broker.redis, keys.ref("ada", job.id), 0, 1000)
        await asyncio.sleep(0.01)
    raise TimeoutError


def error_of(found: list[Stored]) -> str:
    return str(found[-1].body.get("error", {}).get("code"))


async def test_saves_are_published_and_the_job_completes(settings: Settings) -> None:
    async with run_gateway(settings) as gateway, working(gateway, Obedient(save_ones)):
        job = submission()
        await gateway.post(job)
        _, running, save, end = await ended(gateway, job)
        assert (running.body["status"], end.body["status"]) == ("running", "completed")
        assert save.body == {
            "node": 1,
            "tree": {"tensor": 0},
            "tensors": [{"dtype": "float32", "shape": [2, 3]}],
            "nbytes": 24,
        }
        assert save.data == torch.ones(2, 3).numpy().tobytes()


async def test_a_save_leaves_while_the_engine_goes_on(settings: Settings) -> None:
    go_on = threading.Event()

    def step(job: EngineJob) -> None:
        job.sink.save(1, torch.zeros(100_000))
        assert go_on.wait(60)

    async with run_gateway(settings) as gateway, working(gateway, Obedient(step)):
        job = submission()
        await gateway.post(job)
        ref = keys.ref("ada", job.id)
        for _ in range(6000):
            found = await events.read(gateway.broker.redis, ref, 2)
            if found:
                break
            await asyncio.sleep(0.01)
        assert found[0].kind == "save" and found[0].blob and not found[0].data
        assert (await gateway.broker.queue.info("ada", job.id)).status is JobStatus.RUNNING
        go_on.set()
        await ended(gateway, job)


async def test_waiting_jobs_share_a_batch_and_fail_apart(settings: Settings) -> None:
    def step(job: EngineJob) -> InterposeError | None:
        if len(job.graph.nodes) > 2:
            return OpFailed("this one fails", node=2)
        save_ones(job)
        return None

    engine = Obedient(step)
    graph = tiny_graph()
    bad = submission(Graph(graph.runs, (*graph.nodes, Node(2, "tell", args=("x",)))))
    async with run_gateway(settings) as gateway:
        jobs = [submission(), bad, submission()]
        for job in jobs:
            assert (await gateway.post(job)).status_code == 202
        async with working(gateway, engine):
            ends = [(await ended(gateway, job))[-1].body["status"] for job in jobs]
    assert ends == ["completed", "failed", "completed"] and [len(batch) for batch in engine.batches] == [3]


async def test_a_job_does_not_run_on_other_weights_than_it_was_recorded_against(settings: Settings) -> None:
    engine = Obedient(save_ones)
    engine.manifest = replace(engine.manifest, revision="r2")
    async with run_gateway(settings) as gateway:
        bound, free = submission(revision="r1"), submission()
        for job in (bound, free):
            assert (await gateway.post(job)).status_code == 202
        async with working(gateway, engine):
            end = (await ended(gateway, bound))[-1].body["error"]
            assert end["code"] == "model_updated" and "was updated while your job waited" in end["message"]
            assert (await ended(gateway, free))[-1].body["status"] == "completed"
    assert [len(batch) for batch in engine.batches] == [1]


async def test_while_a_model_changes_each_job_is_run_by_a_copy_it_was_recorded_against(settings: Settings) -> None:
    old, new = Obedient(save_ones), Obedient(save_ones)
    new.manifest = replace(new.manifest, revision="r2")
    async with run_gateway(settings) as gateway:
        before = [submission(revision="r1") for _ in range(3)]
        for job in before:
            assert (await gateway.post(job)).status_code == 202
        models = gateway.broker.models
        await models.publish("tiny", "w2", new.manifest, "")
        refused = await gateway.post(submission(revision="r1"))
        assert (refused.status_code, refused.json()["code"]) == (409, "model_updated"), "whatever was remembered"
        after = [submission(revision="r2") for _ in range(3)]
        for job in after:
            assert (await gateway.post(job)).status_code == 202
        await models.beat("tiny", "w1")
        async with working(gateway, new, "w2"):
            for job in after:
                assert (await ended(gateway, job))[-1].body["status"] == "completed"
            await asyncio.sleep(0.2)
            assert await gateway.broker.queue.depth("tiny") == 3, "the old copy's are left to it"
            async with working(gateway, old, "w1"):
                for job in before:
                    assert (await ended(gateway, job))[-1].body["status"] == "completed"
            late = submission(revision="r2")
            assert (await gateway.post(late)).status_code == 202
            assert (await ended(gateway, late))[-1].body["status"] == "completed"
    assert (sum(map(len, old.batches)), sum(map(len, new.batches))) == (3, 4)


async def test_jobs_of_a_revision_that_nobody_serves_any_more_end(settings: Settings) -> None:
    new = Obedient(save_ones)
    new.manifest = replace(new.manifest, revision="r2")
    async with run_gateway(settings) as gateway:
        jobs = [submission(revision="r1") for _ in range(2)]
        for job in jobs:
            await gateway.post(job)
        await gateway.broker.models.publish("tiny", "w2", new.manifest, "")
        async with working(gateway, new, "w2"):
            await asyncio.sleep(0.2)
            assert await gateway.broker.queue.depth("tiny") == 2
            await gateway.broker.models.announce("tiny", "w1", ModelState.DRAINING)
            for job in jobs:
                assert error_of(await ended(gateway, job)) == "model_updated"


async def test_a_copy_of_an_older_version_leaves_what_came_since_to_its_successor(settings: Settings) -> None:
    """Which may be away for a moment."""
    old, new = Obedient(save_ones), Obedient(save_ones)
    new.manifest = replace(new.manifest, revision="r2")
    async with run_gateway(settings) as gateway:
        models = gateway.broker.models
        await models.publish("tiny", "w2", new.manifest, "")
        job = submission(revision="r2")
        assert (await gateway.post(job)).status_code == 202
        await models.announce("tiny", "w2", ModelState.STOPPED)
        async with working(gateway, old, "w1"):
            await asyncio.sleep(0.2)
            assert await gateway.broker.queue.depth("tiny") == 1
        await models.publish("tiny", "w2", new.manifest, "")
        async with working(gateway, new, "w2"):
            assert (await ended(gateway, job))[-1].body["status"] == "completed"


async def test_attachments_reach_the_engine(settings: Settings) -> None:
    tensor = torch.randn(300, 300, dtype=torch.bfloat16)
    encoded = encode_tensor(tensor)
    graph = tiny_graph()
    graph = Graph(
        graph.runs, (*graph.nodes, Node(2, "attachment", args=(encoded.sha,))), {encoded.sha: encoded.spec}
    )
    engine = Obedient(save_ones)
    async with run_gateway(settings) as gateway, working(gateway, engine):
        job = submission(graph, attachments={encoded.sha: bytes(encoded.data)})
        assert (await gateway.post(job)).status_code == 202
        await ended(gateway, job)
    assert torch.equal(engine.batches[0][0].attachments[encoded.sha], tensor)


async def test_a_large_graph_goes_through_the_blob_store(settings: Settings) -> None:
    graph = tiny_graph()
    graph = Graph(graph.runs, graph.nodes + tuple(Node(index, "tell", args=("x" * 90,)) for index in range(2, 500)))
    engine = Obedient(save_ones)
    async with run_gateway(settings) as gateway, working(gateway, engine):
        job = submission(graph)
        assert (await gateway.post(job)).status_code == 202
        await ended(gateway, job)
    assert engine.batches[0][0].graph == graph


def spin(job: EngineJob) -> InterposeError | None:
    """Run until told to stop, as a model's hooks would notice."""
    try:
        while not job.sink.cancelled():
            time.sleep(0.01)
    except InterposeError as error:
        return error
    return None


async def test_wall_time(settings: Settings) -> None:
    async with run_gateway(settings) as gateway, working(gateway, Obedient(spin)):
        job = submission(timeout_s=0.1)
        await gateway.post(job)
        assert error_of(await ended(gateway, job)) == "job_timeout"


async def test_cancelling_stops_the_engine(settings: Settings) -> None:
    async with run_gateway(settings) as gateway, working(gateway, Obedient(spin)):
        job, after = submission(), submission(timeout_s=0.05)
        await gateway.post(job)
        async with asyncio.timeout(60):
            while (await gateway.broker.queue.info("ada", job.id)).status is JobStatus.QUEUED:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await gateway.client.delete(f"/v1/jobs/{job.id}")
        await gateway.post(after)
        assert error_of(await ended(gateway, after)) == "job_timeout"


async def test_more_result_than_allowed(valkey: Valkey, tmp_path: Path) -> None:
    def step(job: EngineJob) -> InterposeError | None:
        try:
            job.sink.save(1, torch.zeros(1_000_000))
        except InterposeError as error:
            return error
        return None

    settings = make_settings(valkey, tmp_path, limits=Limits(result_bytes=10_000))
    async with run_gateway(settings) as gateway, working(gateway, Obedient(step)):
        job = submission()
        await gateway.post(job)
        assert error_of(await ended(gateway, job)) == "limit_exceeded"


async def test_a_full_store_fails_the_job_and_the_next_one_runs(valkey: Valkey, tmp_path: Path) -> None:
    def step(job: EngineJob) -> None:
        job.sink.save(1, torch.zeros(len(job.graph.runs[0].invokes[0].rows[0]) * 10_000))

    settings = make_settings(valkey, tmp_path, blob_bytes=100_000)
    async with run_gateway(settings) as gateway, working(gateway, Obedient(step)):
        large, small = submission(), submission(tiny_graph(tokens=(1,)))
        await gateway.post(large)
        assert error_of(await ended(gateway, large)) == "storage_full"
        await gateway.post(small)
        assert (await ended(gateway, small))[-1].body == {"status": "completed"}


async def test_an_engine_that_raises_fails_its_jobs_only(settings: Settings) -> None:
    calls = 0

    def step(job: EngineJob) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("secret")

    async with run_gateway(settings) as gateway, working(gateway, Obedient(step)):
        first, second = submission(), submission()
        await gateway.post(first)
        assert error_of(await ended(gateway, first)) == "internal_error"
        await gateway.post(second)
        assert (await ended(gateway, second))[-1].body == {"status": "completed"}


async def test_stopping_finishes_the_running_batch(settings: Settings) -> None:
    started, go_on = threading.Event(), threading.Event()

    def step(job: EngineJob) -> None:
        started.set()
        assert go_on.wait(60)
        save_ones(job)

    async with run_gateway(settings) as gateway:
        job, later = submission(batching="exclusive"), submission()
        await gateway.post(job)
        await gateway.post(later)
        async with working(gateway, Obedient(step)) as stop:
            await asyncio.to_thread(started.wait, 60)
            stop.set()
            asyncio.get_running_loop().call_later(0.1, go_on.set)
        assert (await gateway.broker.queue.info("ada", job.id)).status is JobStatus.COMPLETED
        assert (await gateway.broker.queue.info("ada", later.id)).status is JobStatus.QUEUED


async def test_what_ran_just_before_it_stops_is_counted(settings: Settings) -> None:
    def step(job: EngineJob) -> None:
        time.sleep(0.05)
        save_ones(job)

    async with run_gateway(settings) as gateway:
        jobs = [submission(batching="exclusive") for _ in range(2)]
        for job in jobs:
            await gateway.post(job)
        async with working(gateway, Obedient(step)):
            for job in jobs:
                await ended(gateway, job)
        hosted = await gateway.broker.models.get("tiny")
    assert (hosted.batches, hosted.jobs) == (2, 2) and hosted.busy_s > 0.1


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64, torch.int64])
async def test_nests_and_dtypes(settings: Settings, dtype: torch.dtype) -> None:
    def step(job: EngineJob) -> None:
        job.sink.save(1, (torch.ones(2, 1, dtype=dtype).mT, {"a": [torch.zeros((), dtype=dtype), 3, None]}))

    async with run_gateway(settings) as gateway, working(gateway, Obedient(step)):
        job = submission()
        await gateway.post(job)
        _, _, save, end = await ended(gateway, job)
        assert end.body["status"] == "completed" and len(save.body["tensors"]) == 2
        assert len(save.data) == 3 * dtype.itemsize


async def test_a_small_job_is_reported_in_one_trip_and_a_save_waits_only_a_moment(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[list[str]] = []
    later = threading.Event()

    def save_and_stay(job: EngineJob) -> None:
        save_ones(job)
        later.wait(60)

    async with run_gateway(settings) as gateway:
        queue = gateway.broker.queue
        report = queue.report

        async def noted(given: Sequence[Report]) -> list[bool]:
            reports.extend([*(record.kind for record in one.records), "end" * bool(one.outcome)] for one in given)
            return await report(given)

        queue.report = noted  # type: ignore[method-assign]
        for step, moment_s in ((save_ones, 60.0), (save_and_stay, 0.1)):  # this machine may be busy
            monkeypatch.setattr(publisher, "MOMENT_S", moment_s)
            job = submission()
            async with working(gateway, Obedient(step)):
                await gateway.post(job)
                if step is save_and_stay:
                    while ["save", ""] not in reports:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                    later.set()
                await ended(gateway, job)
    assert reports == [["save", "end"], ["save", ""], ["end"]]


async def test_an_operation_that_does_not_end_is_told_of(settings: Settings) -> None:
    goes_on = threading.Event()

    def step(job: EngineJob) -> None:
        goes_on.wait(60)

    short = settings.changed({"limits": {"wall_s": 0.05}})
    async with run_gateway(short) as gateway:
        worker = Worker("tiny", "w1", Obedient(step), gateway.broker, gateway.blobs, short)
        stop = asyncio.Event()
        task = asyncio.create_task(worker.run(stop))
        assert worker.stuck(0) is None
        await gateway.post(submission())
        for _ in range(6000):
            if worker.stuck(0):
                break
            await asyncio.sleep(0.01)
        assert "over the time a job has" in (worker.stuck(0) or "")
        assert worker.stuck() is None
        goes_on.set()
        stop.set()
        await asyncio.wait_for(task, 60)
        assert worker.stuck(0) is None
