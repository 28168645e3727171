"""Which nodes of a graph matter, and the graph without the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .model import Node
from .values import Ref, substitute

EFFECTS = frozenset({"save", "write", "tell", "set_grad"})
"""Ops that matter in themselves; any other node matters if one of these needs it."""


def live(nodes: Sequence[Node]) -> set[int]:
    """Ids of the nodes that some effect needs, effects included."""
    found: set[int] = set()
    for node in reversed(nodes):
        if node.op in EFFECTS or node.id in found:
            found.add(node.id)
            found.update(node.refs)
            if node.when is not None:
                found.add(node.when)
    return found


def trimmed(nodes: Sequence[Node]) -> tuple[tuple[Node, ...], dict[int, int]]:
    """The live nodes, renumbered, and old id -> new id."""
    ids = {old: new for new, old in enumerate(sorted(live(nodes)))}
    if all(node.id == ids.get(node.id) for node in nodes):
        return tuple(nodes), ids

    def renumber(old: int) -> Ref:
        return Ref(ids[old])

    kept = tuple(
        replace(
            node,
            id=ids[node.id],
            args=tuple(substitute(arg, renumber) for arg in node.args),
            kwargs={name: substitute(arg, renumber) for name, arg in node.kwargs.items()},
            when=None if node.when is None else ids[node.when],
        )
        for node in nodes
        if node.id in ids
    )
    return kept, ids
