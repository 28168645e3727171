"""Hooks beside hooks by hand, and a batch of jobs beside the bare forward of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_model import Bench
from interpose.runtime.engine import EngineJob
from kinds import KINDS, fill
from recording import recorded
from table import Row, ms
from timing import added, ratio


def hooks(bench: Bench) -> Iterator[Row]:
    """The last token's hidden states of every layer, kept on the device by hand, and saved by a trace."""
    for tokens in (1, bench.wanted.tokens):
        ids, prompt = bench.ids(1, tokens), bench.prompt(0, tokens)
        works = (partial(last_states, bench, prompt), partial(by_hand, bench, ids), partial(bench.forward, ids))
        ours, hand, plain = bench.times(*works)
        for name, beside in (("hooks by hand", hand), ("the bare forward", plain)):
            yield Row(
                f"a local trace, {len(bench.layers)} saves", ms(median(ours)), f"{name}, {ms(median(beside))}",
                f"{ratio(ours, beside):.2f}x, {ms(added(ours, beside))} added", f"a prompt of {tokens} tokens",
            )  # fmt: skip


def last_states(bench: Bench, prompt: list[int]) -> None:
    with bench.model.trace(prompt):
        for layer in bench.model.model.layers:
            layer.output[0][:, -1].save()
        bench.model.output[0, -1].argmax().save()


def by_hand(bench: Bench, ids: torch.Tensor) -> None:
    kept: list[torch.Tensor] = []
    layers = bench.plain.model.layers
    handles = [layer.register_forward_hook(lambda *args: kept.append(args[2][:, -1].clone())) for layer in layers]
    try:
        bench.forward(ids)
    finally:
        for handle in handles:
            handle.remove()


def batch(bench: Bench) -> Iterator[Row]:
    """Jobs of different graphs in one forward, as a worker runs them."""
    jobs, tokens = bench.wanted.jobs, max(bench.wanted.tokens // 4, 4)
    blocks = [bench.model.trace(bench.prompt(row, tokens)) for row in range(jobs)]
    graphs = [recorded(block, partial(body, bench, row)) for row, block in enumerate(blocks)]

    def ours() -> None:
        done = bench.engine.run([EngineJob(graph, {}, Dropped()) for graph in graphs])
        assert done == [None] * jobs, done

    ids = bench.ids(jobs, tokens)
    mine, plain, short, single = bench.times(
        ours, partial(bench.forward, ids), partial(bench.forward, ids, logits_to_keep=1),
        partial(bench.forward, ids[:1]),
    )  # fmt: skip
    for name, beside in (("the bare forward of them all", plain), ("that, logits of the last token only", short)):
        yield Row(
            f"{jobs} jobs in one batch", f"{jobs / median(mine):.0f} jobs/s",
            f"{name}, {jobs / median(beside):.0f} rows/s", f"{1 / ratio(mine, beside):.2f} of its rate",
            f"{tokens} tokens each, {KINDS} kinds of graph; one row alone takes {ms(median(single))}",
        )  # fmt: skip


def body(bench: Bench, index: int, tracer: Any) -> None:
    model = bench.model
    fill(model, model.model.layers[7 * index % len(bench.layers)], index)
    model.output[0, -1].argmax().save()


class Dropped:
    """A sink that keeps nothing."""

    def save(self, node: int, value: Any) -> None: ...

    def log(self, node: int, text: str) -> None: ...

    def tokens(self, run: int, step: int, ids: Sequence[int | None]) -> None: ...

    def cancelled(self) -> bool:
        return False
