"""Several graphs as the runs of one job, its parts again, and what modules compute meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpose.graph.model import Graph, Node
from interpose.graph.values import Ref
from test_engine_isolation import Kept
from torch import nn


def session(graphs: Sequence[Graph]) -> tuple[Graph, list[int]]:
    """One job of all runs, and where the nodes of each begin."""
    nodes: list[Node] = []
    begins = []
    for number, graph in enumerate(graphs):
        begin = len(nodes)
        begins.append(begin)
        nodes += [
            replace(node, id=begin + node.id, run=number, args=_moved(node.args, begin)) for node in graph.nodes
        ]
    return Graph(tuple(graph.runs[0] for graph in graphs), tuple(nodes)), begins


def _moved(value: Any, by: int) -> Any:
    if isinstance(value, Ref):
        return Ref(value.id + by)
    return tuple(_moved(item, by) for item in value) if isinstance(value, tuple) else value


def part(whole: Kept, begin: int, graph: Graph) -> Kept:
    """What one graph of a session saved, under its own numbers."""
    found = Kept()
    found.values = {
        node - begin: value for node, value in whole.values.items() if begin <= node < begin + len(graph.nodes)
    }
    return found


@contextmanager
def called(modules: Iterable[nn.Module], tell: Callable[[nn.Module, torch.Tensor], None]) -> Iterator[None]:
    """Tells of what modules are given, through their classes: on a model with others' hooks nothing is shared."""
    wanted = {*modules}
    before = {kind: kind.forward for kind in map(type, wanted)}

    def counting(forward: Any) -> Any:
        def instead(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self in wanted:
                tell(self, (args or tuple(kwargs.values()))[0])
            return forward(self, *args, **kwargs)

        return instead

    with pytest.MonkeyPatch.context() as patch:
        for kind, forward in before.items():
            patch.setattr(kind, "forward", counting(forward))
        yield
