"""Models of this process, graphs of blocks that aren't run, and a sink for the engine to run them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from interpose import LanguageModel
from interpose.graph.model import Graph
from interpose.runtime.engine import EngineJob
from interpose.runtime.nests import transform
from models import tiny


@cache
def opened(arch: str = "llama") -> Any:
    """A tiny model, loaded once a process: for tests that leave it as it is."""
    return LanguageModel(str(tiny(arch)))


class Kept:
    """A sink that keeps copies. `patience`: how often it says to go on."""

    def __init__(self, patience: int = 10**6) -> None:
        self.values: dict[int, Any] = {}
        self.patience = patience

    def save(self, node: int, value: Any) -> None:
        assert node not in self.values, "saved twice"
        self.values[node] = transform(value, torch.clone)

    def log(self, node: int, text: str) -> None:
        pass

    def cancelled(self) -> bool:
        self.patience -= 1
        return self.patience < 0


def recorded(block: Any, fill: Callable[[Any], Any]) -> Graph:
    """The graph of a block, which isn't run. `fill` is given what `with block as ...` gives."""
    found: list[Graph] = []
    block._owner.execute = lambda graph, tensors, options: found.append(graph) or {}
    with block as tracer:
        fill(tracer)
    return found[0]


def ran(model: Any, graphs: Sequence[Graph], **options: Any) -> list[dict[int, Any]]:
    """What graphs save that run together on a model, each without an error. `options`: of every job."""
    sinks = [Kept() for _ in graphs]
    jobs = [EngineJob(graph, {}, sink, **options) for graph, sink in zip(graphs, sinks, strict=True)]
    assert model._access.local.engine.run(jobs) == [None] * len(graphs)
    return [sink.values for sink in sinks]
