"""What of a graph decides how it is checked and compiled: all but the ids of its tokens and what its tensors hold.

A notebook's loop hands in one structure again and again, with other prompts and other vectors.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from .model import Graph, Node, Run
from .values import Arg


def structure(graph: Graph) -> Hashable:
    """Equal for graphs that differ in token ids, texts of prompts and names of attachments at most.

    None for a graph that brings inputs beside token ids, whose own numbers count.
    """
    if any(run.given for run in graph.runs):
        return None
    places = {name: place for place, name in enumerate(graph.attachments)}
    nodes = tuple([_node(node, places) for node in graph.nodes])
    return tuple(map(_run, graph.runs)), nodes, tuple(graph.attachments.values())


def _run(run: Run) -> Hashable:
    lengths = tuple([tuple(map(len, invoke.rows)) for invoke in run.invokes])
    return run.kind, lengths, _named(run.options), run.adapter


def _node(node: Node, places: Mapping[str, int]) -> Hashable:
    if node.op == "attachment" and node.args and type(node.args[0]) is str and node.args[0] in places:
        args: Hashable = places[node.args[0]]
    else:
        args = tuple([exact(arg) for arg in node.args])
    named = _named(node.kwargs) if node.kwargs else None
    return node.op, args, named, node.point, node.invoke, node.run, node.when, node.source


def _named(values: Mapping[str, Arg]) -> Hashable:
    return tuple([(name, exact(value)) for name, value in values.items()])


def exact(value: Arg) -> Hashable:
    """An argument as a key: equal only for what is the same in kind and value; 1, 1.0 and True are three."""
    kind = type(value)
    if kind is float or kind is bool:
        return kind, repr(value)  # -0.0 is no 0.0
    if kind is tuple or kind is list:
        return (kind, *[exact(item) for item in value])
    if kind is slice:
        return kind, exact(value.start), exact(value.stop), exact(value.step)
    found: Hashable = value
    return found


def weight(graph: Graph) -> int:
    """Roughly how many small objects a graph is made of."""
    values = (value for node in graph.nodes for value in (*node.args, *node.kwargs.values()))
    return 32 + 8 * len(graph.nodes) + sum(map(_weight, values))


def _weight(value: Arg) -> int:
    if isinstance(value, (tuple, list)):
        return 1 + sum(map(_weight, value))
    return 1 + len(value) // 64 if isinstance(value, str) else 1
