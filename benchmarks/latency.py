"""A tiny remote trace, as its user waits for it, beside the bare forward and beside an empty round trip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from cost import cpu
from interpose import LanguageModel
from lab import PROMPT, TINY, bare, tiny, tiny_server
from reference import reference
from table import Row, ms
from timing import Effort, added, interleaved, percentile, ratio, seconds
from trips import trips


def measure(effort: Effort) -> Iterator[Row]:
    folder = tiny()
    server = tiny_server()
    with reference() as ports, trips(*ports) as away:
        model = LanguageModel(TINY, host=server.host, api_key=server.key)
        works = (partial(trace, model), forward(folder), away.empty)
        measures = [partial(seconds, work) for work in works]
        remote, local, empty = interleaved(effort.traces, *measures, warm=10)
        spent = cpu(server.process.pid, works[0], effort.traces)
    yield _row("tiny remote trace, p50", 0.5, remote, local, "the bare forward")
    yield _row("tiny remote trace, p95", 0.95, remote, local, "the bare forward")
    stack = "one POST, one websocket message"
    yield _row("tiny remote trace, p50", 0.5, remote, empty, stack, "the same libraries, doing nothing")
    parts = ", ".join(f"{name} {ms(part)}" for name, part in spent.items())
    yield Row("processor time of one", ms(sum(spent.values())), "", "", f"{parts}; the forward is the worker's")


def trace(model: LanguageModel) -> None:
    with model.trace(PROMPT, remote=True):
        model.transformer.h[2].output[0].save()


def forward(folder: Path) -> Callable[[], object]:
    """The forward that the trace rides on, without a server."""
    plain = bare(folder)
    ids = torch.tensor([LanguageModel(str(folder)).tokenizer.encode(PROMPT)])

    def run() -> None:
        with torch.no_grad():
            plain(ids)

    return run


def _row(what: str, part: float, ours: list[float], beside: list[float], name: str, note: str = "") -> Row:
    mine, other = percentile(ours, part), percentile(beside, part)
    if part == 0.5:
        relation = f"{ratio(ours, beside):.1f}x, {ms(added(ours, beside))} added"
    else:
        relation = f"{mine / other:.1f}x, {ms(mine - other)} added"
    return Row(what, ms(mine), f"{name}: {ms(other)}", relation, note)
