"""Jobs that would take the worker's time from others, or the broker's and the gateway's memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from interpose.errors import InterposeError
from interpose.graph.limits import Limits
from interpose.graph.manifest import Manifest
from interpose.graph.model import Graph, Invoke, Node, Run
from interpose.graph.values import Ref
from interpose.runtime.engine import EngineJob
from interpose.wire.messages import Chunk, Save, Subscribe, decode_server, encode
from interpose.wire.submission import Submission
from interpose_server.broker import events, keys
from interpose_server.broker.jobs import JobInfo
from interpose_server.relay import SAVES
from interpose_server.worker import loop, sink
from interpose_server.worker.loop import Worker
from rig import (
    Clock,
    Gateway,
    Valkey,
    at_work,
    listening,
    make_settings,
    run_gateway,
    run_valkey,
    submission,
    tiny_manifest,
)
from websockets.asyncio.client import connect


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    yield from run_valkey()


class Engine:
    """Runs a function on each batch."""

    def __init__(self, run: Callable[[Sequence[EngineJob]], list[InterposeError | None]]) -> None:
        self.manifest: Manifest = tiny_manifest()
        self._run = run

    def run(self, jobs: Sequence[EngineJob], breaks: Any = None) -> list[InterposeError | None]:
        return self._run(jobs)


@asynccontextmanager
async def lab(valkey: Valkey, folder: Path, engine: Engine, **more: Any) -> AsyncIterator[Gateway]:
    valkey.clear()
    settings = make_settings(valkey, folder, **more)
    async with run_gateway(settings) as gateway:
        yield gateway


@asynccontextmanager
async def working(gateway: Gateway, engine: Engine, **more: Any) -> AsyncIterator[None]:
    async with at_work(Worker("tiny", "w", engine, gateway.broker, gateway.blobs, gateway.settings, **more)):
        yield


async def ended(gateway: Gateway, job: Submission) -> JobInfo:
    for _ in range(6000):
        info = await gateway.broker.queue.info("ada", job.id)
        if info.status.terminal:
            return info
        await asyncio.sleep(0.01)
    raise TimeoutError


async def test_a_slow_job_takes_no_time_of_its_batch_mates(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, clock = set[int](), Clock()
    monkeypatch.setattr(sink, "time", clock)

    def run(jobs: Sequence[EngineJob]) -> list[InterposeError | None]:
        if not slow:
            slow.add(id(jobs[0].sink))
        found: list[InterposeError | None] = []
        for job in jobs:
            try:
                if id(job.sink) in slow:
                    clock.sleep(0.4)
                job.sink.cancelled()
                found.append(None)
            except InterposeError as error:
                found.append(error)
        return found

    engine = Engine(run)
    async with lab(valkey, tmp_path, engine, limits=Limits(wall_s=0.3)) as gateway:
        jobs = [submission() for _ in range(4)]
        for job in jobs:
            await gateway.post(job)
        async with working(gateway, engine):
            infos = [await ended(gateway, job) for job in jobs]
    codes = [info.error["code"] if info.error else "" for info in infos]
    assert codes == ["job_timeout", "", "", ""]


async def test_an_operation_without_end_costs_the_process_and_its_own_job(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "STUCK_S", 0.2)
    go_on, given_up = threading.Event(), asyncio.Event()

    def run(jobs: Sequence[EngineJob]) -> list[InterposeError | None]:
        assert go_on.wait(60)
        return [None for _ in jobs]

    engine = Engine(run)
    async with (
        lab(valkey, tmp_path, engine, limits=Limits(wall_s=0.2)) as gateway,
        working(gateway, engine, give_up=given_up.set),
    ):
        job = submission()
        await gateway.post(job)
        info = await ended(gateway, job)
        await asyncio.wait_for(given_up.wait(), 60)
        go_on.set()
    assert info.error and info.error["code"] == "job_timeout"


async def test_an_operation_without_end_isnt_laid_to_a_generation_that_others_joined(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, all_there, go_on = threading.Event(), threading.Event(), threading.Event()
    given_up = asyncio.Event()

    class Hosting(Engine):
        def host(self, jobs: Sequence[EngineJob], company: Any) -> None:
            began.set()
            joined: list[EngineJob] = []
            while not joined:
                company.pause(joinable=True)
                joined += company.arrivals()
                time.sleep(0.005)
            all_there.set()
            assert go_on.wait(60)
            for job in [*jobs, *joined]:
                company.ended(job, None)

    nodes = (Node(0, "tokens", run=0), Node(1, "save", (Ref(0),)))
    graph = Graph((Run("generate", (Invoke(((1, 2, 3),)),), {"max_new_tokens": 3}),), nodes)
    engine = Hosting(lambda jobs: [None for _ in jobs])
    async with (
        lab(valkey, tmp_path, engine, limits=Limits(wall_s=0.2)) as gateway,
        working(gateway, engine, give_up=given_up.set),
    ):
        first, late = submission(graph), submission(graph)
        await gateway.post(first)
        assert await asyncio.to_thread(began.wait, 60)
        await gateway.post(late)
        assert await asyncio.to_thread(all_there.wait, 60)
        monkeypatch.setattr(loop, "STUCK_S", 0.2)
        await asyncio.wait_for(given_up.wait(), 60)
        infos = [await gateway.broker.queue.info("ada", job.id) for job in (first, late)]
        go_on.set()
    assert not any(info.status.terminal for info in infos)


def _save_often(jobs: Sequence[EngineJob]) -> list[InterposeError | None]:
    for job in jobs:
        for node in range(100):
            job.sink.save(node, torch.ones(6000))
    return [None for _ in jobs]


async def test_the_broker_holds_only_so_much_of_a_job(valkey: Valkey, tmp_path: Path) -> None:
    engine = Engine(_save_often)
    async with lab(valkey, tmp_path, engine) as gateway, working(gateway, engine):
        job = submission()
        await gateway.post(job)
        await ended(gateway, job)
        found = await events.read(gateway.broker.redis, keys.ref("ada", job.id), 0, 1000)
        saves = [event for event in found if event.kind == "save"]
        assert len(saves) == 100
        assert sum(len(event.data) for event in saves) <= 64 * gateway.settings.inline_bytes
        assert all(event.data or event.blob for event in saves)


async def test_a_tree_of_plain_values_has_a_bound(valkey: Valkey, tmp_path: Path) -> None:
    def run(jobs: Sequence[EngineJob]) -> list[InterposeError | None]:
        jobs[0].sink.save(1, ["x" * 1000] * 2000)
        return [None for _ in jobs]

    engine = Engine(run)
    async with lab(valkey, tmp_path, engine) as gateway, working(gateway, engine):
        job = submission()
        await gateway.post(job)
        info = await ended(gateway, job)
        assert info.error and info.error["code"] == "limit_exceeded"


async def test_who_never_reads_holds_few_files(valkey: Valkey, tmp_path: Path) -> None:
    def run(jobs: Sequence[EngineJob]) -> list[InterposeError | None]:
        for job in jobs:
            job.sink.save(1, torch.ones(1 << 19))
        return [None for _ in jobs]

    engine = Engine(run)
    async with (
        lab(valkey, tmp_path, engine) as gateway,
        working(gateway, engine),
        listening(gateway.app) as address,
    ):
        jobs = [submission() for _ in range(30)]
        for job in jobs:
            await gateway.post(job)
        for job in jobs:
            await ended(gateway, job)
        opened = most = 0
        plain = gateway.blobs.open

        def counted(key: Any) -> Any:
            nonlocal opened, most
            reader = plain(key)
            if reader is not None:
                opened, close = opened + 1, reader.close
                most = max(most, opened)

                def closed() -> None:
                    nonlocal opened
                    opened -= 1
                    close()

                reader.close = closed
            return reader

        gateway.blobs.open = counted  # type: ignore[method-assign]
        url = f"ws://{address}/v1/stream"
        auth = gateway.auth(gateway.token)
        async with connect(url, additional_headers=auth, max_size=None, max_queue=1, compression=None) as socket:
            for job in jobs:
                await socket.send(encode(Subscribe(job.id)))
            while not most:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            assert most <= SAVES
            done: dict[str, int] = {}
            while sum(done.values()) < 30 << 21:
                message = decode_server(await asyncio.wait_for(socket.recv(), 60))
                if isinstance(message, Chunk):
                    done[message.job] = done.get(message.job, 0) + message.data.nbytes
                assert not isinstance(message, Save) or message.nbytes == 1 << 21
            assert len(done) == 30
