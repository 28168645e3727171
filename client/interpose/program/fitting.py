"""Making a graph fit a model: other layers, other names of the blocks, and reasons where it can't."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..errors import BadArgument, InterposeError, UnknownModule
from ..graph.limits import UNLIMITED
from ..graph.manifest import Manifest, walk
from ..graph.model import Graph, Node
from ..graph.validate import validate

NAMES_MODULE = frozenset({"param", "call"})
"""Ops whose first argument is a module's path."""


def moved(graph: Graph, blocks: Sequence[str], onto: Sequence[str], layers: Mapping[int, int]) -> Graph:
    """The graph with its blocks' paths replaced by those of other blocks.

    Args:
        blocks: paths of the blocks of the model it was recorded on.
        onto: of the model it is to run on.
        layers: block -> the block to take instead; others keep their number.

    Raises:
        BadArgument: a layer that isn't there, or that the graph doesn't touch.
    """
    used = {index for node in graph.nodes for path in _paths(node) for index in _block(path, blocks)}
    for layer, other in layers.items():
        if layer not in used:
            touched = ", ".join(map(str, sorted(used))) or "none"
            raise BadArgument(f"the program doesn't touch layer {layer!r}; it touches {touched}")
        if type(other) is not int or not 0 <= other < len(onto):
            raise BadArgument(f"layer {layer} can't become {other!r}: the model has layers 0 to {len(onto) - 1}")

    def path(old: str) -> str:
        for index in _block(old, blocks):
            new = layers.get(index, index)
            return (onto[new] if new < len(onto) else blocks[new]) + old[len(blocks[index]) :]
        return old

    return replace(graph, nodes=tuple(_renamed(node, path) for node in graph.nodes))


def _block(path: str, blocks: Sequence[str]) -> Iterator[int]:
    """The number of the block that a module is or lies in, if it does."""
    yield from (index for index, block in enumerate(blocks) if f"{path}.".startswith(f"{block}."))


def _paths(node: Node) -> Iterator[str]:
    if node.point is not None:
        yield node.point.module
    if node.op in NAMES_MODULE and node.args and isinstance(node.args[0], str):
        yield node.args[0]


def _renamed(node: Node, path: Callable[[str], str]) -> Node:
    if node.point is not None:
        return replace(node, point=replace(node.point, module=path(node.point.module)))
    if node.op in NAMES_MODULE and node.args and isinstance(node.args[0], str):
        return replace(node, args=(path(node.args[0]), *node.args[1:]))
    return node


def check_fit(graph: Graph, manifest: Manifest) -> None:
    """Raises what keeps a graph from running on a model: all places it lacks, else the first thing that's wrong."""
    missing = list(dict.fromkeys(_missing(graph, manifest)))
    if missing:
        shown = "".join(f"\n  - {reason}" for reason in missing[:20])
        more = f"\n  and {len(missing) - 20} more" if len(missing) > 20 else ""
        raise UnknownModule(
            f"the program doesn't fit {manifest.model}:{shown}{more}", details={"reasons": missing[:100]}
        )
    try:
        validate(graph, manifest, UNLIMITED)
    except InterposeError as error:
        error.message = f"the program doesn't fit {manifest.model}: {error.message}"
        raise


def _missing(graph: Graph, manifest: Manifest) -> Iterator[str]:
    for node in graph.nodes:
        try:
            for path in _paths(node):
                manifest.module(path)
        except UnknownModule as error:
            yield error.message
            continue
        if node.point is not None and manifest.moment(node.point.module, node.point.name, node.point.call) is None:
            yield f"{node.point.module or 'the model'} has no point {node.point.name!r}"
        elif node.point is not None:
            points = manifest.module(node.point.module).points
            try:
                walk(points.get(node.point.name), node.point.path)
            except KeyError:
                yield f"{node.point}: the value there has no such part"
