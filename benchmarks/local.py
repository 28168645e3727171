"""A local trace with twelve saves beside the same forward with twelve hooks written by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from interpose import LanguageModel
from lab import PROMPT, bare, tiny
from table import Row, ms, us
from timing import Effort, added, interleaved, ratio, seconds


def measure(effort: Effort) -> Iterator[Row]:
    folder = tiny()
    model, plain = LanguageModel(str(folder)), bare(folder)
    ids = model.tokenizer.encode(PROMPT)
    nodes = count(model, ids)
    works = [partial(seconds, partial(traced, model, ids)), partial(recording, model, ids)]
    works.append(partial(seconds, partial(hooked, plain, torch.tensor([ids]))))
    whole, record, hooks = interleaved(effort.locals, *works, warm=5)
    more = added(whole, hooks)
    yield Row(
        "local trace, 12 saves", ms(median(whole)), f"hooks by hand {ms(median(hooks))}",
        f"{ratio(whole, hooks):.2f}x, {ms(more)} added", f"{us(more / nodes)} for each of {nodes} nodes",
    )  # fmt: skip
    yield Row(
        "of that, recording", ms(median(record)), "", f"{us(median(record) / nodes)} a node",
        "the body of the block",
    )  # fmt: skip


def record(model: Any) -> None:
    """Twelve saves: what attention, the MLP and the block put out, in four blocks."""
    for block in model.transformer.h:
        block.attn.output[0].save()
        block.mlp.output.save()
        block.output[0].save()


def traced(model: Any, ids: list[int]) -> None:
    with model.trace(ids):
        record(model)


def recording(model: Any, ids: list[int]) -> float:
    """Seconds that the block's body takes, before anything runs."""
    with model.trace(ids):
        start = time.perf_counter()
        record(model)
        return time.perf_counter() - start


def count(model: Any, ids: list[int]) -> int:
    with model.trace(ids) as tracer:
        record(model)
        return len(tracer.recorder._nodes)


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
