"""The bucket's service goes away while jobs wait and run: they are done once it is back."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from buckets import S3
from interpose.graph.model import Graph
from interpose.graph.values import Ref
from interpose.runtime.engine import EngineJob
from interpose.wire.status import JobStatus
from interpose_server.settings import Settings
from proxies import Proxy, proxied
from rig import Gateway, Valkey, make_settings, run_gateway, submission, tiny_graph
from test_server_worker import Obedient, ended, working

SAVED = torch.arange(100_000)


@pytest.fixture
def proxy(s3: S3) -> Iterator[Proxy]:
    with proxied(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def settings(s3: S3, proxy: Proxy, valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in s3.env(f"http://{proxy.address}").items():
        monkeypatch.setenv(name, value)
    return make_settings(valkey, tmp_path, blobs=s3.bucket(), inline_bytes=1000, max_attempts=1)


def save_many(job: EngineJob) -> None:
    job.sink.save(1, SAVED)
    job.sink.save(2, torch.ones(2))


async def status(gateway: Gateway, job: str) -> JobStatus:
    return (await gateway.broker.queue.info("ada", job)).status


async def test_a_result_is_stored_once_the_bucket_is_back(settings: Settings, proxy: Proxy) -> None:
    def step(job: EngineJob) -> None:
        proxy.shut()
        save_many(job)

    async with run_gateway(settings) as gateway, working(gateway, Obedient(step)):
        job = submission()
        assert (await gateway.post(job)).status_code == 202
        await asyncio.sleep(3)
        assert await status(gateway, job.id) is JobStatus.RUNNING
        assert (await gateway.client.get("/healthz")).status_code == 200
        proxy.reopen()
        _, _, large, small, end = await ended(gateway, job)
        assert (large.body["node"], small.body["node"], end.body["status"]) == (1, 2, "completed")
        answer = await gateway.client.get(f"/v1/jobs/{job.id}/saves/{large.seq}")
        assert answer.content == SAVED.numpy().tobytes()


async def test_one_that_is_cancelled_meanwhile_is_let_go_of(settings: Settings, proxy: Proxy) -> None:
    async with run_gateway(settings) as gateway, working(gateway, Obedient(save_many)):
        proxy.shut()
        job = submission()
        await gateway.post(job)
        async with asyncio.timeout(60):
            while await status(gateway, job.id) is not JobStatus.RUNNING:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await gateway.client.delete(f"/v1/jobs/{job.id}")
        assert (await ended(gateway, job))[-1].body["status"] == "cancelled"
    # `working` has ended: the worker held nothing back.


async def test_a_job_that_cannot_be_read_waits_for_the_bucket(settings: Settings, proxy: Proxy) -> None:
    """Its graph is in the bucket; another's isn't, and runs meanwhile."""
    engine = Obedient(lambda job: job.sink.save(1, torch.ones(2)))
    async with run_gateway(settings) as gateway:
        large = submission(_large())
        assert (await gateway.post(large)).status_code == 202
        proxy.shut()
        small = submission()
        assert (await gateway.post(small)).status_code == 202
        async with working(gateway, engine):
            assert (await ended(gateway, small))[-1].body["status"] == "completed"
            await asyncio.sleep(3)
            assert not (await status(gateway, large.id)).terminal
            proxy.reopen()
            assert (await ended(gateway, large))[-1].body["status"] == "completed"


async def test_uploads_and_downloads_are_told_to_come_again(settings: Settings, proxy: Proxy) -> None:
    data = torch.arange(4.0).numpy().tobytes()
    sha = hashlib.sha256(b"float32 4\n" + data).hexdigest()
    headers = {"Interpose-Dtype": "float32", "Interpose-Shape": "4"}
    async with run_gateway(settings) as gateway, working(gateway, Obedient(save_many)):
        job = submission()
        await gateway.post(job)
        large = (await ended(gateway, job))[2]
        proxy.shut()
        refused = await gateway.client.put(f"/v1/tensors/{sha}", content=data, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (503, "storage_unavailable")
        assert "retry-after" in refused.headers
        ready = await gateway.client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "no blob store")
        proxy.reopen()
        stored = await gateway.client.put(f"/v1/tensors/{sha}", content=data, headers=headers)
        assert stored.status_code == 201
        assert (await gateway.client.head(f"/v1/tensors/{sha}")).status_code == 200
        answer = await gateway.client.get(f"/v1/jobs/{job.id}/saves/{large.seq}")
        assert answer.content == SAVED.numpy().tobytes()


def _large() -> Graph:
    """Too large to go through the broker."""
    graph = tiny_graph()
    nodes = [
        replace(node, id=node.id + 2 * index, args=tuple(Ref(2 * index) for _ in node.args))
        for index in range(60)
        for node in graph.nodes
    ]
    return replace(graph, nodes=tuple(nodes))
