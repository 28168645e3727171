"""A graph compiled for execution: what waits for what, and which nodes run at which place of the forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from ..graph.manifest import EVENT
from ..graph.model import Graph, Node
from ..graph.trim import live
from ..graph.values import refs

Place: TypeAlias = tuple[str, str, int]
"""Module path, event, call: where within one forward."""


@dataclass(frozen=True)
class Plan:
    """Pure data, so that one plan serves every execution of its graph.

    Attributes:
        waits: node -> number of distinct nodes it needs first.
        users: node -> nodes that need it.
        accesses: (run, step) -> place -> reads and writes there, in the user's order.
    """

    graph: Graph
    waits: tuple[int, ...]
    users: tuple[tuple[int, ...], ...]
    accesses: Mapping[tuple[int, int], Mapping[Place, tuple[Node, ...]]]

    @cached_property
    def masks(self) -> Mapping[int, tuple[Node, ...]]:
        """Run -> nodes that read its attention mask."""
        found: dict[int, tuple[Node, ...]] = {}
        for node in self.graph.nodes:
            if node.op == "attention_mask":
                found[node.run] = (*found.get(node.run, ()), node)
        return found

    def attention(self, run: int) -> bool:
        """Whether a run looks inside attention."""
        return any(
            event not in ("enter", "exit")
            for (index, _), places in self.accesses.items()
            if index == run
            for _, event, _ in places
        )


def compile_graph(graph: Graph) -> Plan:
    """The plan of a graph, without the nodes that no save, log or write needs."""
    needed_ids = live(graph.nodes)
    waits = [0] * len(graph.nodes)
    users: list[list[int]] = [[] for _ in graph.nodes]
    accesses: dict[tuple[int, int], dict[Place, list[Node]]] = {}
    for node in graph.nodes:
        if node.id not in needed_ids:
            continue
        needed = set(refs((*node.args, *node.kwargs.values())))
        waits[node.id] = len(needed)
        for ref in needed:
            users[ref].append(node.id)
        if node.point is not None:
            point = node.point
            place = point.module, EVENT.get(point.name, point.name), point.call
            accesses.setdefault((node.run, point.step), {}).setdefault(place, []).append(node)
    return Plan(
        graph,
        tuple(waits),
        tuple(map(tuple, users)),
        {key: {place: tuple(nodes) for place, nodes in places.items()} for key, places in accesses.items()},
    )
