"""Saved values leave the device while the model goes on: nobody waits for them but who needs their bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpose.errors import BadArgument, InternalError, JobTimeout
from interpose.graph.limits import Limits
from interpose.graph.model import Graph, Node, Point
from interpose.graph.values import Ref
from interpose.runtime.engine import EngineJob
from interpose.wire.tensors import encode_tensor
from interpose_server.broker import events, keys
from interpose_server.broker.jobs import Claim
from interpose_server.settings import Settings
from interpose_server.worker import leaving
from interpose_server.worker.leaving import leave
from interpose_server.worker.sink import Backlog, JobSink
from rig import new_job, run_gateway, submission, tiny_graph
from test_server_worker import Obedient, ended, working


class SlowWay:
    """A device whose copies are over when the test says so."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.failed = False

    def start(self, tensor: torch.Tensor) -> tuple[Callable[[], bool], Callable[[], torch.Tensor]]:
        there = tensor.clone()

        def bring() -> torch.Tensor:
            assert self.over.wait(60)
            if self.failed:
                raise InternalError("the device failed before a value had left it")
            return there

        return self.over.is_set, bring


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> SlowWay:
    made = SlowWay()
    monkeypatch.setitem(leaving.STARTS, "cpu", made.start)
    return made


def two_saves() -> Graph:
    graph = tiny_graph()
    more = Node(2, "read", point=Point("h.1", "output"), invoke=0), Node(3, "save", args=(Ref(2),), invoke=0)
    return Graph(graph.runs, (*graph.nodes, *more))


@pytest.mark.parametrize("size", [6, 100_000], ids=["inline", "blob"])
async def test_the_engine_goes_on_and_order_and_values_are_kept(
    settings: Settings, way: SlowWay, size: int
) -> None:
    went_on = threading.Event()

    def step(job: EngineJob) -> None:
        first = torch.arange(size, dtype=torch.float32)
        job.sink.save(1, first)
        first.fill_(-1)  # what the engine does with the memory once the value is on its way
        job.sink.save(3, torch.ones(2))
        went_on.set()

    async with run_gateway(settings) as gateway, working(gateway, Obedient(step)):
        job = submission(two_saves())
        await gateway.post(job)
        ref = keys.ref("ada", job.id)
        while not went_on.is_set():
            await events.read(gateway.broker.redis, ref, 0)
        assert [event.kind for event in await events.read(gateway.broker.redis, ref, 0)] == ["status"] * 2
        way.over.set()
        kinds = [event.kind for event in await ended(gateway, job)]
        assert kinds == ["status", "status", "save", "save", "status"]
        saved = await gateway.client.get(f"/v1/jobs/{job.id}/saves/3")
        assert saved.content == torch.arange(size, dtype=torch.float32).numpy().tobytes()


async def test_a_device_that_fails_on_the_way_fails_the_job(settings: Settings, way: SlowWay) -> None:
    way.failed = True
    way.over.set()
    engine = Obedient(lambda job: job.sink.save(1, torch.ones(2)))
    async with run_gateway(settings) as gateway, working(gateway, engine):
        job = submission()
        await gateway.post(job)
        found = await ended(gateway, job)
        assert (found[-1].body["status"], found[-1].body["error"]["code"]) == ("failed", "internal_error")


async def test_no_memory_for_a_copy_fails_the_job_and_the_next_runs(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bring() -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setitem(leaving.STARTS, "cpu", lambda tensor: (lambda: False, bring))
    engine = Obedient(lambda job: job.sink.save(1, torch.ones(2)))
    async with run_gateway(settings) as gateway, working(gateway, engine):
        first, second = submission(), submission()
        await gateway.post(first)
        assert (await ended(gateway, first))[-1].body["error"]["code"] == "internal_error"
        monkeypatch.delitem(leaving.STARTS, "cpu")
        await gateway.post(second)
        assert (await ended(gateway, second))[-1].body["status"] == "completed"


def test_who_waits_for_room_waits_no_longer_than_the_job_may_take() -> None:
    published: list[Any] = []
    backlog = Backlog(1000)
    assert backlog.fits(1000), "what a broker that is away hasn't taken yet"
    job = new_job()
    claim = Claim("ada/x", "ada", job.id, 1, b"", "", job.footprint, 60.0, False, "")
    limits = Limits(wall_s=0.1, result_bytes=500)
    sink = JobSink(claim, limits, backlog, lambda sink, item: published.append(item))
    sink.start()
    began = time.monotonic()
    with pytest.raises(JobTimeout):
        sink.save(1, torch.ones(100))
    assert time.monotonic() - began < 5
    assert backlog.waited_s == 0 and not published
    backlog.remove(1000)
    sink.start()
    sink.save(1, torch.ones(100))
    assert len(published) == 1, "run again alone it has room, and may save as much as before"
    backlog.remove(400)
    assert backlog.fits(1000)


def test_what_cannot_be_sent_is_told_on_the_engines_thread_and_holds_no_room(monkeypatch: Any) -> None:
    published: list[Any] = []
    backlog = Backlog(1000)
    job = new_job()
    claim = Claim("ada/x", "ada", job.id, 1, b"", "", job.footprint, 60.0, False, "")
    sink = JobSink(claim, Limits(), backlog, lambda sink, item: published.append(item))
    with pytest.raises(BadArgument):
        sink.save(1, torch.ones(3).to_sparse())

    def broken(tensor: torch.Tensor) -> Any:
        raise RuntimeError("no pinned memory is left")

    monkeypatch.setitem(leaving.STARTS, "cpu", broken)
    with pytest.raises(RuntimeError):
        sink.save(1, torch.ones(3))
    assert backlog._bytes == 0
    assert not published


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).reshape(3, 4).T,
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.tensor(3.5),
        torch.ones(0),
    ],
    ids=["transposed", "conjugate", "scalar", "empty"],
)
def test_bytes_are_those_of_the_tensor(tensor: torch.Tensor) -> None:
    made = leave(tensor)
    assert made.spec == encode_tensor(tensor).spec
    assert bytes(made.data()) == bytes(encode_tensor(tensor).data)
    assert leave(torch.ones(3)).ready()
    assert not leave(torch.ones(3, 4).T).ready()  # its copy is the publisher's work


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpus_values_leave_beside_the_model() -> None:
    """Saved while the model is busy; then their memory is given back and written over."""
    torch.cuda.synchronize()
    value = torch.empty(1 << 24, device="cuda")
    torch.cuda._sleep(200_000_000)  # about 0.1 s of work that comes before the value
    value.copy_(torch.arange(1 << 24, device="cuda"))
    began = time.perf_counter()
    made = [leave(value), leave(value.reshape(4096, -1).T), leave(value[:5].to(torch.bfloat16))]
    assert time.perf_counter() - began < 0.05
    assert not made[0].ready()
    del value
    torch.empty(1 << 24, device="cuda").fill_(-1.0)
    expected = torch.arange(1 << 24, dtype=torch.float32)
    assert bytes(made[0].data()) == expected.numpy().tobytes()
    assert bytes(made[1].data()) == expected.reshape(4096, -1).T.contiguous().numpy().tobytes()
    assert bytes(made[2].data()) == bytes(encode_tensor(expected[:5].to(torch.bfloat16)).data)
    assert made[0].ready()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_computes_while_its_values_leave() -> None:
    """What comes after a save doesn't wait for its copy."""
    value = torch.ones(256 << 20, device="cuda")  # 1 GB: some 40 ms over the bus
    warm = leave(value)
    warm.data()
    torch.cuda.synchronize()
    made = leave(value)
    after = torch.cuda.Event()
    (torch.ones(8, device="cuda") + 1).sum()
    after.record()
    after.synchronize()
    assert not made.ready()
    assert made.data().nbytes == value.nbytes
