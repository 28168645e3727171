"""Generations that join one another, gradients and forwards between their steps, cancelled neighbours, a worker
killed among them: each job ends once, with the numbers of plain hooks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from interpose import LanguageModel
from interpose.wire.stream import Changed
from models import tiny
from serving import Served, parts, serve
from transformers import AutoModelForCausalLM

SETTINGS = {
    "INTERPOSE_SERVER_LEASE_S": "8",
    # So that even a tiny model has jobs that take long.
    "INTERPOSE_SERVER_BATCH_S": "0.1",
    "INTERPOSE_SERVER_ASIDE_S": "0.05",
}
BLOCK = 1
Check = Callable[[Any], None]


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    data = tmp_path_factory.mktemp("company") / "data"
    with serve(f"tiny-llama={tiny('llama')}", data_dir=data, env=SETTINGS) as server:
        yield server


@pytest.fixture(scope="module")
def twin() -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    model.requires_grad_(False)
    return model


def close(found: Any, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 5e-5 * float(expected.abs().max())


def ids_of(rng: random.Random, most: int = 30) -> list[int]:
    return [rng.randrange(5, 300) for _ in range(rng.randint(1, most))]


# -- jobs, each with a check against the same thing done by hand -------------------------------------------------


def steered(model: Any, twin: Any, rng: random.Random) -> tuple[Any, Check]:
    """A greedy generation whose block is scaled at one step and read at every other."""
    ids, new = ids_of(rng), rng.randint(3, 60)
    step, factor = rng.randrange(new), rng.choice([-0.5, 2.0])
    with model.generate(
        ids, max_new_tokens=new, eos_token_id=-1, stream=None, remote=True, blocking=False
    ) as tracer:
        seen = []
        with tracer.iter[step]:
            model.model.layers[BLOCK].output[:, -1] *= factor
        with tracer.all():
            seen = model.output[:, -1].save()
        tokens = tracer.result.save()

    def check(job: Any) -> None:
        at = 0

        def hook(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if at == step:
                hidden[:, -1] *= factor

        handle = twin.model.layers[BLOCK].register_forward_hook(hook)
        feed, state, known = torch.tensor([ids]), None, list(ids)
        try:
            with torch.no_grad():
                for at in range(new):
                    out = twin(input_ids=feed, past_key_values=state, use_cache=True)
                    state, logits = out.past_key_values, out.logits[:, -1]
                    close(seen[at], logits)
                    known.append(int(logits.argmax()))
                    feed = torch.tensor([known[-1:]])
        finally:
            handle.remove()
        assert tokens[0].tolist() == known

    return tracer.job, check


def sampled(model: Any, twin: Any, rng: random.Random) -> tuple[Any, Check]:
    """What transformers draws from the same seed."""
    ids, new, seed = ids_of(rng), rng.randint(2, 40), rng.randrange(1000)
    with model.generate(
        ids, max_new_tokens=new, do_sample=True, seed=seed, temperature=1.5, remote=True, blocking=False
    ) as tracer:
        tokens = tracer.result.save()

    def check(job: Any) -> None:
        torch.manual_seed(seed)
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        expected = twin.generate(**given, max_new_tokens=new, do_sample=True, temperature=1.5)
        assert tokens[0].tolist() == expected[0].tolist()

    return tracer.job, check


def gradient(model: Any, twin: Any, rng: random.Random) -> tuple[Any, Check]:
    ids, token = ids_of(rng), rng.randrange(300)
    with model.trace(ids, remote=True, blocking=False) as tracer:
        hidden = model.model.layers[0].output
        with model.output[0, -1, token].backward():
            found = hidden.grad.save()

    def check(job: Any) -> None:
        kept: list[torch.Tensor] = []

        def hook(module: Any, args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            kept.append(first.detach().requires_grad_())
            return (kept[0], *output[1:]) if isinstance(output, tuple) else kept[0]

        handle = twin.model.layers[0].register_forward_hook(hook)
        try:
            twin(torch.tensor([ids])).logits[0, -1, token].backward()
        finally:
            handle.remove()
        close(found, kept[0].grad)

    return tracer.job, check


def last(model: Any, twin: Any, rng: random.Random) -> tuple[Any, Check]:
    ids = ids_of(rng)
    with model.trace(ids, remote=True, blocking=False) as tracer:
        found = model.output[:, -1].save()

    def check(job: Any) -> None:
        with torch.no_grad():
            close(found, twin(torch.tensor([ids])).logits[:, -1])

    return tracer.job, check


KINDS = (steered, steered, sampled, gradient, last)


def ended_once(job: Any) -> None:
    events: list[Any] = []
    job.wait(lambda event: events.append(event))
    assert [event.status for event in events if isinstance(event, Changed) and event.status.terminal] == [
        "completed"
    ]


@pytest.mark.parametrize("seed", range(2))
def test_everything_at_once(company: Served, twin: Any, seed: int) -> None:
    model: Any = LanguageModel("tiny-llama", host=company.host, api_key=company.key)
    rng = random.Random(seed)
    jobs, cancelled = [], []
    for number in range(40):
        jobs.append(rng.choice(KINDS)(model, twin, rng))
        if number % 8 == 3:
            with model.generate([7] * 40, max_new_tokens=80, remote=True, blocking=False) as gone:
                gone.result.save()
            cancelled.append(gone.job)
        if cancelled and number % 8 == 5:
            cancelled[-1].cancel()
        if seed == 1 and number == 20:
            _kill_worker(company)
    for job, check in jobs:
        job.result(timeout=90)
        check(job)
        ended_once(job)
    assert all(job.status in ("cancelled", "completed") for job in cancelled)


def chained(model: Any, runs: int) -> Any:
    """A session whose every run takes what the one before made, so that it is as many forwards. Its last value."""
    with model.session(remote=True, blocking=False) as session:
        value = None
        for run in range(runs):
            with model.trace([5, 6, 7 + run % 200] * 40):  # long, so that it takes its time
                if value is not None:
                    model.model.layers[0].output[:, -1] += 0.001 * value
                value = model.model.layers[BLOCK].output[0, -1]
                if run == runs - 1:
                    value.save()
    return session.job, value


LARGE: dict[str, Callable[[Any], Any]] = {
    "session": lambda model: chained(model, 1000),
    "generation": lambda model: generated(model, 100, 100, busy=12),
}


def generated(model: Any, new: int, rows: int, busy: int = 0) -> Any:
    """`busy`: products of large matrices at each step, so that it takes its time."""
    with model.generate(
        [[7] * 20] * rows, max_new_tokens=new, eos_token_id=-1, remote=True, blocking=False, batching="exclusive"
    ) as tracer:
        if busy:
            with tracer.all():
                value = model.model.layers[0].output[0].mean() + np.eye(600, dtype=np.float32)
                for _ in range(busy):
                    value = (value @ value).clamp(-1, 1)
                model.model.layers[1].output[0][:] += value.mean() * 0
        tokens = tracer.result.save()
    return tracer.job, tokens


@pytest.mark.parametrize("kind", LARGE)
def test_small_jobs_of_another_user_end_while_a_large_one_runs(company: Served, twin: Any, kind: str) -> None:
    """Each is done, with its own numbers, long before the large one is; and that one has its own."""
    model: Any = LanguageModel("tiny-llama", host=company.host, api_key=company.key)
    other: Any = LanguageModel("tiny-llama", host=company.host, api_key=_new_key(company, "bob"))
    rng = random.Random(7)
    last(other, twin, rng)[0].result(timeout=90)
    expected = LARGE[kind](model)
    expected[0].result(timeout=90)
    for _ in range(3):  # once, unless the machine stops for as long as the large one takes
        job, value = LARGE[kind](model)
        _until(job, "running", "completed")
        waits = []
        while len(waits) < 5 and job.status == "running":
            began = time.monotonic()
            small, check = last(other, twin, rng)
            small.result(timeout=90)
            waits.append(time.monotonic() - began)
            check(small)
        if job.status == "running":
            break
    assert job.status == "running", "the small ones didn't wait for its end"
    # A step or forward, a pause of a second, a batch: a bound for a machine that others use as well, or that stops
    # for a moment.
    assert len(waits) == 5 and median(waits) < 5
    job.result(timeout=90)
    assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected[1]))


def _until(job: Any, *statuses: str) -> None:
    for _ in range(18_000):
        if job.status in statuses:
            return
        time.sleep(0.005)
    raise TimeoutError


def _new_key(server: Served, user: str) -> str:
    headers = {"Authorization": f"Bearer {server.key}"}
    answer = httpx.post(
        f"{server.host}/v1/admin/keys", json={"user": user}, headers=headers, trust_env=False, timeout=60
    )
    return str(answer.raise_for_status().json()["token"])


def _kill_worker(server: Served) -> None:
    for process in parts(server, "interpose_server.worker"):
        process.kill()
