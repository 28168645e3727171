"""Graphs of blocks that aren't run, and a sink for the engine to run them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from interpose.graph.model import Graph
from interpose.runtime.nests import transform


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
