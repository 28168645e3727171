"""Parts of the server die while clients wait: each job ends once, with the values it would have had."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from clients import until
from interpose import LanguageModel
from interpose.errors import JobPoisoned
from interpose.job import Job
from interpose.wire.result import Saved
from interpose.wire.stream import Changed, Received
from models import tiny
from serving import Served, parts, serve
from workloads import slow

SETTINGS = {
    "INTERPOSE_SERVER_LEASE_S": "8",
    "INTERPOSE_SERVER_MAX_ATTEMPTS": "2",
    "INTERPOSE_SERVER_VALKEY_FSYNC": "always",  # It is killed, too.
}
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of its own, since its parts are killed."""
    data = tmp_path_factory.mktemp("ward") / "data"
    with serve(f"tiny-gpt2={tiny('gpt2')}", data_dir=data, env=SETTINGS) as server:
        yield server


@pytest.fixture
def model(ward: Served) -> LanguageModel:
    return LanguageModel("tiny-gpt2", host=ward.host, api_key=ward.key)


def kill(server: Served, mark: str) -> None:
    until(lambda: parts(server, mark))[0].kill()


def running(job: Any, attempt: int = 1) -> None:
    until(lambda: job.status == "running" and job.attempt == attempt)


def expected(model: LanguageModel) -> torch.Tensor:
    with model.trace([1, 2, 3], remote=True, batching="exclusive"):
        return model.output.save()  # type: ignore[no-any-return]


@pytest.mark.parametrize("mark", ["interpose_server.worker", "interpose_server.gateway", "valkey-server"])
def test_a_part_is_killed_while_a_job_runs(ward: Served, model: LanguageModel, mark: str) -> None:
    wanted = expected(model)
    tracer, early, late = slow(model, 30, remote=True, blocking=False)
    running(tracer.job)
    kill(ward, mark)
    tracer.job.result(timeout=90)
    assert torch.equal(late, wanted) and torch.isfinite(early).all()
    assert tracer.job.attempt == (2 if mark.endswith("worker") else 1)
    events = past(tracer.job)
    ends = [event for event in events if isinstance(event, Changed) and event.status.terminal]
    saves = [event.node for event in events if isinstance(event, Saved)]
    assert len(ends) == 1 and len(saves) == len(set(saves)) == 2
    assert torch.equal(expected(model), wanted)


def past(job: Any) -> list[Any]:
    """Everything that happened to a job that has ended."""
    events: list[Any] = []
    job.wait(lambda event: events.append(event))
    return events


@pytest.mark.parametrize("mark", ["interpose_server.gateway", "valkey-server"])
def test_submitting_right_after_a_part_was_killed(ward: Served, model: LanguageModel, mark: str) -> None:
    wanted = expected(model)
    kill(ward, mark)
    assert torch.equal(expected(model), wanted)


@pytest.mark.parametrize("mark", ["interpose_server.worker", "interpose_server.gateway", "valkey-server"])
def test_a_part_is_killed_while_a_large_save_is_on_its_way(ward: Served, model: LanguageModel, mark: str) -> None:
    with model.trace([1, 2, 3], remote=True, batching="exclusive", blocking=False) as tracer:
        column = model.transformer.h[1].output[0][0, 0].reshape(-1, 1)
        large = column.repeat(1, (32 << 20) // column.shape[0]).save()
        seed = column.save()
    killed: list[int] = []

    def kill_once(event: Any) -> None:
        if isinstance(event, Received) and event.received < event.nbytes and not killed:
            killed.append(event.received)
            kill(ward, mark)

    tracer.job.wait(kill_once, 90)
    tracer.job.result()
    assert killed
    assert large.nbytes == 128 << 20
    assert torch.equal(large, seed.expand_as(large))


def test_batch_mates_of_a_killed_worker(ward: Served, model: LanguageModel) -> None:
    wanted = expected(model)
    first, _, _ = slow(model, 15, remote=True, blocking=False, batching="exclusive")
    mates = [slow(model, 15, remote=True, blocking=False) for _ in range(3)]
    first.job.result(timeout=90)
    for tracer, _, _ in mates:
        running(tracer.job)
    kill(ward, "interpose_server.worker")
    for tracer, _, late in mates:
        tracer.job.result(timeout=90)
        assert (tracer.job.attempt, str(tracer.job.status)) == (2, "completed")
        assert torch.allclose(late, wanted, rtol=1e-5, atol=1e-5)


def test_a_job_that_kills_every_worker(ward: Served, model: LanguageModel) -> None:
    tracer, _, _ = slow(model, 60, remote=True, blocking=False)
    for attempt in (1, 2):
        running(tracer.job, attempt)
        kill(ward, "interpose_server.worker")
    with pytest.raises(JobPoisoned) as caught:
        tracer.job.result(timeout=90)
    assert caught.value.details == {"attempts": 2}
    assert torch.isfinite(expected(model)).all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restarted_server_still_has_its_jobs(tmp_path: Path, number: int) -> None:
    """Accepted jobs outlive the server's processes, all of which go when their parent does."""
    source = f"tiny-gpt2={tiny('gpt2')}"
    env = SETTINGS | {"INTERPOSE_SERVER_GRACE_S": "1"}
    with serve(source, data_dir=tmp_path / "data", env=env) as server:
        model = LanguageModel("tiny-gpt2", host=server.host, api_key=server.key)
        wanted = expected(model)
        busy, _, _ = slow(model, 30, remote=True, blocking=False)
        running(busy.job)
        with model.trace([1, 2, 3], remote=True, blocking=False, batching="exclusive") as waiting:
            model.output.save()
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert len(family) >= 3
        server.process.send_signal(number)
        server.process.wait(90)
        _, alive = psutil.wait_procs(family, timeout=90)
        assert not alive
    with serve(source, data_dir=tmp_path / "data", env=env) as server:
        (value,) = Job.attach(waiting.job.id, host=server.host, api_key=server.key).result(timeout=90).values()
        assert torch.equal(value, wanted)
