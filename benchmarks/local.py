"""A local trace with twelve saves, what it adds to a bare forward, beside what hooks by hand and the peers add."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from interpose import LanguageModel
from lab import PROMPT, bare, tiny
from peer import peers
from table import Row, ms, us
from timing import Effort, added, interleaved, ratio, seconds


def measure(effort: Effort) -> Iterator[Row]:
    folder = tiny()
    model, plain = LanguageModel(str(folder)), bare(folder)
    ids = model.tokenizer.encode(PROMPT)
    nodes = count(model, ids)
    works = [traced, hooked, forward]
    givens = [(model, ids), (plain, torch.tensor([ids])), (plain, torch.tensor([ids]))]
    measures = [warmed(partial(work, *given)) for work, given in zip(works, givens, strict=True)]
    with peers(folder, 1) as found:
        for other in found:
            measures += [partial(other.seconds, "saves"), partial(other.seconds, "bare")]
        recording, *times = interleaved(effort.locals, partial(recorded, model, ids), *measures, warm=5)
        labels = [other.label for other in found]
    whole, hooks, plainly, *theirs = times
    more = minus(whole, plainly)
    yield Row(
        "local trace, 12 saves", ms(median(whole)), f"hooks by hand {ms(median(hooks))}",
        f"{ratio(whole, hooks):.2f}x, {ms(added(whole, hooks))} added", f"a bare forward {ms(median(plainly))}",
    )  # fmt: skip
    yield Row(
        "of that, recording", ms(median(recording)), "", f"{us(median(recording) / nodes)} a node",
        f"the body of the block, {nodes} nodes",
    )  # fmt: skip
    yield Row(
        "12 saves beside a bare forward", f"{ms(median(more))} added", "", f"{us(median(more) / nodes)} a node"
    )
    for label, saves, without in zip(labels, theirs[::2], theirs[1::2], strict=True):
        other = minus(saves, without)
        yield Row(
            "12 saves beside a bare forward", f"{ms(median(more))} added", f"{label}: {ms(median(other))} added",
            f"{ratio(more, other):.2f} of it", "what each adds to the transformers library's forward",
        )  # fmt: skip


def warmed(work: Callable[[], object]) -> Callable[[], float]:
    """Once for the caches' sake, as the peers do, then measured."""

    def measured() -> float:
        work()
        return seconds(work)

    return measured


def minus(some: list[float], others: list[float]) -> list[float]:
    return [one - other for one, other in zip(some, others, strict=True)]


def record(model: Any) -> None:
    """Twelve saves: what attention, the MLP and the block put out, in four blocks."""
    for block in model.transformer.h:
        block.attn.output[0].save()
        block.mlp.output.save()
        block.output[0].save()


def traced(model: Any, ids: list[int]) -> None:
    with model.trace(ids):
        record(model)


def recorded(model: Any, ids: list[int]) -> float:
    """Seconds that the block's body takes, before anything runs."""
    with model.trace(ids):
        start = time.perf_counter()
        record(model)
        return time.perf_counter() - start


def count(model: Any, ids: list[int]) -> int:
    with model.trace(ids) as tracer:
        record(model)
        return len(tracer.recorder.nodes)


def forward(plain: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        plain(ids)


def hooked(plain: Any, ids: torch.Tensor) -> None:
    kept = []

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).clone())

    parts = [part for block in plain.transformer.h for part in (block.attn, block.mlp, block)]
    handles = [part.register_forward_hook(keep) for part in parts]
    try:
        with torch.no_grad():
            plain(ids)
    finally:
        for handle in handles:
            handle.remove()
