"""Jobs that outlive the block: not waiting, attaching, cancelling, clients that die, connections that break."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from clients import LONG, client, held_up, told, until
from interpose import LanguageModel
from interpose.client import jobs
from interpose.errors import JobCancelled
from interpose.job import Job
from proxies import proxied
from serving import Served
from workloads import slow

PROMPT = "The capital of France is"


def attached(lab: Served, job: str) -> Job:
    return Job.attach(job, host=lab.host, api_key=lab.key)


def test_not_waiting(open_model: Callable[..., Any]) -> None:
    model = open_model()
    with model.trace(PROMPT, remote=True):
        expected = model.output.save()
    with model.trace(PROMPT, remote=True, blocking=False) as tracer:
        logits = model.output.save()
    values = tracer.job.result(timeout=90)
    assert tracer.job.status == "completed" and len(values) == 1
    assert isinstance(logits, torch.Tensor) and torch.equal(logits, expected)


async def test_awaiting(open_model: Callable[..., Any]) -> None:
    model = open_model()
    with model.trace(PROMPT, remote=True, blocking=False) as tracer:
        logits = model.output.save()
    assert tracer.job.id in repr(tracer.job)
    values = await tracer.job
    assert torch.equal(logits, next(iter(values.values())))


def test_another_process_attaches(lab: Served, open_model: Callable[..., Any]) -> None:
    model = open_model()
    with model.trace(PROMPT, remote=True, blocking=False) as tracer:
        saved = model.output[0, -1].save()
    with client(lab, "attach", tracer.job.id) as process:
        answer = told(process)
    tracer.job.result()
    assert answer["status"] == "completed" and list(answer["values"].values()) == [saved.tolist()]


def test_a_client_killed_while_its_job_waits(lab: Served, open_model: Callable[..., Any]) -> None:
    model = open_model()
    with model.trace(PROMPT, remote=True, batching="exclusive"):
        expected = model.output[:, -1].save()
    with held_up(model):
        with client(lab, "submit", "tiny-gpt2", INTERPOSE_BACKEND="numpy") as process:
            job = told(process)["job"]
            process.kill()
        found = attached(lab, job)
    (value,) = found.result(timeout=90).values()
    assert torch.allclose(value, expected, rtol=1e-5, atol=1e-5)


def test_cancelling_what_waits(lab: Served, open_model: Callable[..., Any]) -> None:
    model = open_model()
    with held_up(model):
        with model.trace(PROMPT, remote=True, blocking=False) as tracer:
            model.output.save()
        tracer.job.cancel()
        with pytest.raises(JobCancelled):
            tracer.job.result(timeout=90)
    assert {str(info.status) for info in listed(lab) if info.id == tracer.job.id} == {"cancelled"}


def test_cancelling_what_runs(open_model: Callable[..., Any]) -> None:
    tracer, _, _ = slow(open_model(), LONG, remote=True, blocking=False)
    until(lambda: tracer.job.status == "running")
    tracer.job.cancel()
    with pytest.raises(JobCancelled):
        tracer.job.result(timeout=90)
    # The worker has given it up too: it takes the next job long before the old one could have ended.
    start, model = time.monotonic(), open_model()
    with model.trace(PROMPT, remote=True):
        model.output.save()
    assert time.monotonic() - start < 20


def test_ctrl_c_cancels(lab: Served) -> None:
    before = {info.id for info in listed(lab)}
    with client(lab, "block", "tiny-gpt2", INTERPOSE_BACKEND="numpy") as process:
        job = until(lambda: [info for info in listed(lab) if info.id not in before and info.status == "running"])[0]
        process.send_signal(signal.SIGINT)
        assert told(process) == {"interrupted": True}
    assert {str(info.status) for info in listed(lab) if info.id == job.id} == {"cancelled"}


def listed(lab: Served) -> list[Any]:
    return jobs(host=lab.host, api_key=lab.key)


@pytest.mark.parametrize("path", [b"/v1/stream", b"/saves/"], ids=["streamed", "fetched"])
def test_a_connection_that_breaks_within_a_large_result(
    lab: Served, path: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interpose.transports.socket.direct", lambda server: path == b"/saves/")
    cut = [20 << 20, 5 << 20, 300]
    with proxied(lab.host, cut, path) as proxy:
        model = LanguageModel("tiny-gpt2", host=proxy.address, api_key=lab.key)
        factors = np.arange(1 << 18, dtype=np.float32)[:, None]
        with model.trace(PROMPT, remote=True):
            row = model.transformer.h[1].output[0][0, -1]
            small = row.save()
            big = (row.unsqueeze(0) * factors).save()
            logits = model.output.save()
    assert not cut
    assert big.nbytes == 64 << 20 and np.array_equal(big.numpy(), small.numpy() * factors)
    assert torch.isfinite(logits).all()


def test_a_fork_has_connections_of_its_own(open_model: Callable[..., Any]) -> None:
    model = open_model()
    with model.trace(PROMPT, remote=True):
        expected = model.output.sum().save()
    child = os.fork()
    if child == 0:
        with model.trace(PROMPT, remote=True):
            found = model.output.sum().save()
        os._exit(0 if torch.equal(found, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_short_jobs_wait_for_one_step_of_a_long_generation(open_model: Callable[..., Any]) -> None:
    """A forward comes between two steps, a short generation joins, and the long one still gets its own tokens."""
    model = open_model("tiny-llama")
    prompt, short = list(range(5, 12)), list(range(9, 14))

    def long(busy: int = 0) -> Any:
        """`busy`: products of large matrices at each step, so that it takes its time."""
        with model.generate(prompt, max_new_tokens=110, eos_token_id=-1, remote=True, blocking=False) as tracer:
            norms = [model.layers[1].resid_post[:, -1].norm().save() for _ in tracer.iter[:]]
            with tracer.all():
                value = model.layers[2].output[0].mean() + np.eye(600 if busy else 2, dtype=np.float32)
                for _ in range(busy):
                    value = (value @ value).clamp(-1, 1)
                model.output[:] += value.mean() * 0
            tokens = tracer.result.save()
        return tracer.job, tokens, norms

    with model.generate(short, max_new_tokens=3, remote=True) as tracer:
        alone = tracer.result.save()
    jobs = [long(busy) for busy in (4, 0, 0)]
    with model.trace(short, remote=True):
        model.logits.save()
    with model.generate(short, max_new_tokens=3, remote=True) as tracer:
        tokens = tracer.result.save()
    unfinished = [job.status for job, _, _ in jobs if job.status != "completed"]
    assert torch.equal(tokens, alone)
    for job, _, _ in jobs:
        job.result()
    assert all(torch.equal(jobs[0][1], other) for _, other, _ in jobs)
    assert all(abs(float(one) - float(two)) < 1e-3 for one, two in zip(jobs[0][2], jobs[2][2], strict=True))
    assert unfinished, "the long ones were done too soon to show anything"
