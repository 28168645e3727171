"""Generations with a vector added at every step, beside the transformers library's plain `generate`."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from crowd import Crowd, crowd
from interpose import LanguageModel
from lab import CORES, SMOL, bare, smol, smol_server
from table import Row
from timing import Effort, interleaved, ratio, seconds

from client import NEVER, NEW_TOKENS, TOKENS, WIDTH, prompt

SEQUENCES = 16
OPTIONS = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": NEVER}
BUSY = 1.5
"""Requests come on average so many times more slowly than the plain batch of all would serve them."""


def measure(effort: Effort) -> Iterator[Row]:
    plain, server = bare(smol(), CORES), smol_server()
    remote, local = LanguageModel(SMOL, host=server.host, api_key=server.key), LanguageModel(str(smol()))
    with crowd(server, SEQUENCES, processes=2) as clients:
        together = partial(_last, clients, [0.0] * SEQUENCES)
        generate(plain, 1)
        with local.trace(prompt(0)):  # it loads when it first runs
            local.output.save()
        works = [partial(seconds, partial(steered, remote, remote=True)), partial(seconds, partial(steered, local))]
        measures = [together, *works, partial(seconds, partial(generate, plain, SEQUENCES))]
        ours, one_job, here, beside = interleaved(effort.generations, *measures, warm=0)
        yield from together_rows(ours, one_job, here, beside)
        if effort.arrivals:
            yield from apart(clients, plain, effort, median(beside))


def together_rows(ours: list[float], one_job: list[float], here: list[float], beside: list[float]) -> Iterator[Row]:
    plain = f"plain generate of {SEQUENCES} rows, {tokens_s(median(beside))}"
    note = f"SmolLM2-135M, {TOKENS} tokens, {NEW_TOKENS} new ones; ours adds a vector at every step"
    for name, found in (
        (f"{SEQUENCES} generations of {SEQUENCES} clients", ours),
        (f"{SEQUENCES} generations as one job", one_job),
        (f"{SEQUENCES} generations in this process", here),
    ):
        yield Row(name, tokens_s(median(found)), plain, f"{1 / ratio(found, beside):.2f} of its rate", note)


def apart(clients: Crowd, plain: Any, effort: Effort, batch_s: float) -> Iterator[Row]:
    """Requests that come one by one, at random times, the same for all."""
    gap_s = BUSY * batch_s / SEQUENCES
    found: dict[str, list[list[float]]] = {"ours": [], "waiting": [], "in turn": []}
    for turn in range(effort.arrivals):
        draw = random.Random(turn)
        after = [0.0]
        while len(after) < SEQUENCES:
            after.append(after[-1] + draw.expovariate(1 / gap_s))
        runs = {"ours": partial(_took, clients, after), "waiting": partial(waiting_together, plain, after)}
        for name in sorted(runs, reverse=bool(turn % 2)):
            found[name].append(runs[name]())
        single_s = seconds(partial(generate, plain, 1))
        found["in turn"].append(in_turn(after, single_s))
    mine = found["ours"]
    note = f"one every {gap_s * 1e3:.0f} ms on average; seconds from a request to its last token, the mean of a run"
    for name, how in (("waiting", "plain generate of whatever waits"), ("in turn", "plain generate, one by one")):
        own, other = [mean(run) for run in mine], [mean(run) for run in found[name]]
        yield Row(
            f"{SEQUENCES} generations asked for at random times", f"{median(own):.2f} s",
            f"{how}: {median(other):.2f} s", f"{ratio(own, other):.2f} of its time", note,
        )  # fmt: skip


def tokens_s(time_s: float) -> str:
    return f"{SEQUENCES * NEW_TOKENS / time_s:.0f} tokens/s"


def steered(model: Any, **options: Any) -> None:
    """All sequences as one job."""
    vector = torch.randn(WIDTH) / WIDTH**0.5
    with model.generate([prompt(index) for index in range(SEQUENCES)], **OPTIONS, **options) as tracer:
        with tracer.all():
            model.model.layers[15].output[0][:, -1] += vector
        ids = tracer.result.save()
    assert ids.shape == (SEQUENCES, TOKENS + NEW_TOKENS)


def generate(plain: Any, rows: int) -> None:
    ids = torch.tensor([prompt(index) for index in range(rows)])
    with torch.no_grad():
        made = plain.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=NEVER, **OPTIONS)
    assert made.shape == (rows, TOKENS + NEW_TOKENS)


def waiting_together(plain: Any, after: Sequence[float]) -> list[float]:
    """A server without continuous batching: all that waits is one batch, and what comes meanwhile waits."""
    start, served = time.monotonic(), 0
    took: list[float] = []
    while served < len(after):
        time.sleep(max(0.0, start + after[served] - time.monotonic()))
        now = time.monotonic() - start
        waiting = sum(at <= now for at in after) - served
        generate(plain, waiting)
        end = time.monotonic() - start
        took += [end - at for at in after[served : served + waiting]]
        served += waiting
    return took


def in_turn(after: Sequence[float], single_s: float) -> list[float]:
    """A server that serves one after another, by how long it takes for one."""
    end, took = 0.0, []
    for at in after:
        end = max(at, end) + single_s
        took.append(end - at)
    return took


def _last(clients: Crowd, after: Sequence[float]) -> float:
    return clients.generations(after)[1]


def _took(clients: Crowd, after: Sequence[float]) -> list[float]:
    return clients.generations(after)[0]
