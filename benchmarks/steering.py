"""Sixteen prompts with a steering vector each, beside the same batch without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from interpose import LanguageModel
from lab import CORES, SMOL, bare, smol, smol_server
from table import Row, ms
from timing import Effort, interleaved, ratio, seconds

from client import TOKENS, WIDTH, prompt

VECTORS = 16
LAYER = 15


def measure(effort: Effort) -> Iterator[Row]:
    plain, server = bare(smol(), CORES), smol_server()
    remote, local = LanguageModel(SMOL, host=server.host, api_key=server.key), LanguageModel(str(smol()))
    works = [
        partial(run, model, steer, remote=model is remote) for model in (remote, local) for steer in (True, False)
    ]
    works += [partial(by_hand, plain, steer) for steer in (True, False)]
    times = interleaved(effort.steerings, *(partial(seconds, work) for work in works))
    for name, (steered, without) in zip(
        ("on a server", "in this process", "bare, a hook by hand"), zip(times[::2], times[1::2], strict=True),
        strict=True,
    ):  # fmt: skip
        yield Row(
            f"{VECTORS} steering vectors in one batch, {name}", ms(median(steered)),
            f"the same batch without, {ms(median(without))}", f"{100 * (ratio(steered, without) - 1):+.1f}%",
            f"SmolLM2-135M, {VECTORS} invokes of {TOKENS} tokens, the best token of each",
        )  # fmt: skip


def run(model: Any, steer: bool, *, remote: bool) -> None:
    with model.trace(remote=remote) as tracer:
        for index in range(VECTORS):
            with tracer.invoke(prompt(index)):
                if steer:
                    model.model.layers[LAYER].output[0][:] += VECTOR[index]
                model.output[0, -1].argmax().save()


VECTOR = torch.randn(VECTORS, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5


def by_hand(plain: Any, steer: bool) -> None:
    """As one who owns the batch writes it: one hook that adds a matrix."""
    ids = torch.tensor([prompt(index) for index in range(VECTORS)])
    handles = []
    if steer:
        handles = [plain.model.layers[LAYER].register_forward_hook(lambda *args: args[2] + VECTOR[:, None])]
    try:
        with torch.no_grad():
            plain(ids, use_cache=False).logits[:, -1].argmax(-1)
    finally:
        for handle in handles:
            handle.remove()
