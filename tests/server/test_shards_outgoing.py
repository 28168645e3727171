"""Large saves of a split model: they go from their shards to the store, and are told of when they are there."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interpose.errors import InterposeError, ReplicaLost, StorageFull, StorageUnavailable
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.loading import load
from interpose.wire.submission import Submission
from interpose_server import blob_keys
from interpose_server.blobs import LocalBlobs, whole
from interpose_server.settings import Settings
from interpose_server.shards.outgoing import Outgoing
from interpose_server.worker.loop import Worker
from models import tiny
from rig import Gateway, run_gateway, submission
from sharding import split
from test_server_worker import Obedient, ended, working

ADDRESS = {"user": "ada", "id": "job", "attempt": 2}


def outcome(outgoing: Outgoing, token: int) -> Any:
    for _ in range(12_000):
        if told := outgoing.stored(token):
            return told["error"]
        time.sleep(0.005)
    raise TimeoutError


@pytest.fixture
def blobs(settings: Settings) -> LocalBlobs:
    return LocalBlobs(settings.blob_dir, settings.blob_bytes)


def test_a_large_value_goes_to_the_store_and_a_small_one_home(blobs: LocalBlobs, settings: Settings) -> None:
    outgoing = Outgoing(blobs, settings)
    small, large = torch.ones(3), torch.randn(50_000, dtype=torch.bfloat16)
    assert outgoing.leave(ADDRESS, 1, small)["value"] is small
    told = outgoing.leave(ADDRESS, 7, [large, 2])
    assert told["nbytes"] == large.nbytes
    assert outcome(outgoing, told["token"]) is None
    data = whole(blobs, blob_keys.result("ada", "job/2/7"))
    assert data is not None
    assert torch.equal(torch.frombuffer(data, dtype=torch.bfloat16), large)


def test_a_job_without_an_address_has_all_brought_home(blobs: LocalBlobs, settings: Settings) -> None:
    assert "value" in Outgoing(blobs, settings).leave(None, 1, torch.ones(100_000))


def test_a_store_that_is_full_is_told(blobs: LocalBlobs, settings: Settings) -> None:
    full = LocalBlobs(settings.blob_dir, 1000)
    outgoing = Outgoing(full, settings)
    error = outcome(outgoing, outgoing.leave(ADDRESS, 1, torch.ones(100_000))["token"])
    assert error["code"] == StorageFull.code


class Away(LocalBlobs):
    """A store that can't be reached until it is `back`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.blob_dir, settings.blob_bytes)
        self.back = threading.Event()
        self.tried = threading.Event()

    def put(self, *args: Any) -> int:
        self.tried.set()
        if not self.back.is_set():
            raise StorageUnavailable("nobody answers")
        return super().put(*args)


def test_a_store_that_is_away_holds_up_nobody_and_gets_all_once_it_is_back(settings: Settings) -> None:
    away = Away(settings)
    outgoing = Outgoing(away, settings.model_copy(update={"backlog_bytes": 900_000}))
    values = [torch.randn(100_000) for _ in range(4)]
    began = time.monotonic()
    told = [outgoing.leave(ADDRESS, node, value) for node, value in enumerate(values)]
    assert time.monotonic() - began < 30, "it would wait for ever"
    assert ["value" in each for each in told] == [False, False, True, True], "what no more can wait goes home"
    assert away.tried.wait(60)
    assert outgoing.stored(told[0]["token"]) == {}
    away.back.set()
    for node, value in enumerate(values[:2]):
        assert outcome(outgoing, told[node]["token"]) is None
        data = whole(away, blob_keys.result("ada", f"job/2/{node}"))
        assert data is not None and torch.equal(torch.frombuffer(data, dtype=torch.float32), value)
    assert "blob" in outgoing.leave(ADDRESS, 5, values[0]), "and there is room again"


def test_a_store_that_stays_away_ends_the_job(settings: Settings) -> None:
    limits = replace(settings.limits, wall_s=0.1)
    outgoing = Outgoing(Away(settings), settings.model_copy(update={"limits": limits}))
    error = outcome(outgoing, outgoing.leave(ADDRESS, 1, torch.ones(100_000))["token"])
    assert error["code"] == StorageUnavailable.code


def test_a_save_nobody_knows_is_an_error(blobs: LocalBlobs, settings: Settings) -> None:
    assert outcome(Outgoing(blobs, settings), 5)["code"] == "internal_error"


def wide_job(*blocks: int) -> Any:
    row = tuple(range(5, 105))
    nodes = [
        node
        for n, block in enumerate(blocks)
        for node in (
            Node(2 * n, "read", point=Point(f"transformer.h.{block}", "output"), invoke=0),
            Node(2 * n + 1, "save", (Ref(2 * n),), invoke=0),
        )
    ]
    rows = Invoke((row,) * 4)
    return submission(Graph((Run("trace", (rows,)),), tuple(nodes)))


async def test_a_worker_tells_of_what_its_shards_stored(settings: Settings, tmp_path: Path) -> None:
    loaded = load(tiny("gpt2"), name="tiny")
    blobs = LocalBlobs(settings.blob_dir, settings.blob_bytes)
    home = split(loaded, 3, lambda site: Outgoing(blobs, settings))
    engine = Engine(home)
    async with run_gateway(settings) as gateway:
        await gateway.broker.models.publish("tiny", "w1", home.manifest, "")
        gateway.app.state.parts.catalogue._hosted.clear()
        async with working(gateway, engine):
            job = wide_job(0, 1)
            assert (await gateway.post(job)).status_code == 202
            found = await ended(gateway, job)
        assert found[-1].body["status"] == "completed"
        saves = [event for event in found if event.kind == "save"]
        assert {event.body["node"] for event in saves} == {1, 3}
        for event in saves:
            data = whole(blobs, blob_keys.result("ada", event.blob))
            assert data is not None
            value = torch.frombuffer(data, dtype=torch.float32).reshape(4, 100, 64)
            assert event.body["nbytes"] == value.nbytes == len(data)
            torch.testing.assert_close(value, hidden(loaded.model, 1 + event.body["node"] // 2))


async def test_while_the_store_is_away_jobs_that_need_none_go_on(settings: Settings) -> None:
    """Two lanes of one copy: one waits for the store with more than fits its shard's backlog, the other doesn't."""
    small = settings.model_copy(update={"backlog_bytes": 150_000})
    loaded, away = load(tiny("gpt2"), name="tiny"), Away(small)
    home = split(loaded, 2, lambda site: Outgoing(away, small))
    engine = Engine(home)
    async with run_gateway(small) as gateway:
        await gateway.broker.models.publish("tiny", "w1", home.manifest, "")
        gateway.app.state.parts.catalogue._hosted.clear()
        stop = asyncio.Event()
        lanes = [
            asyncio.create_task(Worker("tiny", name, engine, gateway.broker, away, small, copy="w1").run(stop))
            for name in ("w1", "w1+1")
        ]
        try:
            waiting, others = wide_job(0, 1, 1, 0), [narrow_job(block) for block in (0, 2, 1)]
            assert (await gateway.post(waiting)).status_code == 202
            assert await asyncio.to_thread(away.tried.wait, 60)
            for job in others:
                await gateway.post(job)
                assert (await ended(gateway, job))[-1].body["status"] == "completed"
            assert (await gateway.broker.queue.info("ada", waiting.id)).status == "running"
            away.back.set()
            found = await ended(gateway, waiting)
        finally:
            away.back.set()
            stop.set()
            await asyncio.gather(*lanes)
    saves = [event for event in found if event.kind == "save"]
    assert {event.body["node"] for event in saves} == {1, 3, 5, 7}
    for event in saves:
        data = whole(away, blob_keys.result("ada", event.blob))
        assert data is not None
        value = torch.frombuffer(data, dtype=torch.float32).reshape(4, 100, 64)
        torch.testing.assert_close(value, hidden(loaded.model, 2 if event.body["node"] in (3, 5) else 1))


def narrow_job(block: int) -> Any:
    nodes = (
        Node(0, "read", point=Point(f"transformer.h.{block}", "output"), invoke=0),
        Node(1, "save", (Ref(0),), invoke=0),
    )
    return submission(Graph((Run("trace", (Invoke(((5, 6, 7),)),)),), nodes))


def hidden(model: torch.nn.Module, block: int) -> torch.Tensor:
    """What the model makes before that block."""
    output: Any = model(torch.tensor([range(5, 105)] * 4), output_hidden_states=True)
    found: torch.Tensor = output.hidden_states[block]
    return found


async def claimed(gateway: Gateway, job: Submission) -> None:
    async with asyncio.timeout(60):
        while (await gateway.broker.queue.info("ada", job.id)).status == "queued":  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_jobs_of_a_replica_that_lost_a_shard_are_not_ended(settings: Settings) -> None:
    class Lost(Obedient):
        def run(self, jobs: Any, breaks: Any = None) -> list[InterposeError | None]:
            raise ReplicaLost("shard 2 is gone")

    async with run_gateway(settings) as gateway:
        job = submission()
        await gateway.post(job)
        with pytest.raises(ReplicaLost):
            async with working(gateway, Lost(lambda job: None)):
                await claimed(gateway, job)
        info = await gateway.broker.queue.info("ada", job.id)
        assert info.status == "running"
        await gateway.broker.queue.reap("w1")
        assert (await gateway.broker.queue.info("ada", job.id)).status == "queued"


async def test_a_job_whose_save_was_on_its_way_from_a_lost_shard_is_run_again(settings: Settings) -> None:
    asked, gone = threading.Event(), threading.Event()

    def stored(token: int) -> dict[str, Any]:
        asked.set()
        if gone.is_set():
            raise ReplicaLost("shard 2 is gone")
        return {}

    def step(job: EngineJob) -> None:
        job.sink.adopt(1, {"tree": {"tensor": 0}, "tensors": [], "blob": "b", "token": 5}, stored)

    async with run_gateway(settings) as gateway:
        job = submission()
        with pytest.raises(ReplicaLost):
            async with working(gateway, Obedient(step)) as stop:
                await gateway.post(job)
                assert await asyncio.to_thread(asked.wait, 60)
                stop.set()  # it would wait for this job
                gone.set()
        assert (await gateway.broker.queue.info("ada", job.id)).status == "running"
        await gateway.broker.queue.reap("w1")
        assert (await gateway.broker.queue.info("ada", job.id)).status == "queued"
        async with working(gateway, Obedient(lambda job: None), "w2"):
            assert (await ended(gateway, job))[-1].body["status"] == "completed"
