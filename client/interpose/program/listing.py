"""A program as lines a person reads: one a run, one an invoke, one a node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any

from ..graph.model import Graph, Node
from ..graph.values import DType, Ref


def listing(graph: Graph, names: Mapping[int, str], parameters: Mapping[str, str]) -> Iterator[str]:
    """The lines.

    Args:
        names: save node -> its name.
        parameters: name -> key of its attachment.
    """
    for number, run in enumerate(graph.runs):
        options = "".join(f" {name}={value!r}" for name, value in run.options.items())
        adapter = "" if run.adapter is None else f" with adapter {run.adapter!r}"
        yield f"run {number}: {run.kind}{adapter}{options}"
        for index, invoke in enumerate(run.invokes):
            text = " | ".join(map(repr, invoke.text)) or "token ids"
            sizes = ", ".join(str(len(row)) for row in invoke.rows[:8]) + (", ..." if len(invoke.rows) > 8 else "")
            given = "".join(f" {name}={_spec(graph, key)}" for name, key in invoke.tensors.items())
            about = f"{text if len(text) <= 80 else text[:77] + '...'} ({sizes} tokens)" if invoke.longest else ""
            yield f"  invoke {index}:{' ' * bool(about)}{about}{given}" if about or given else f"  invoke {index}"
    by_key = {key: name for name, key in parameters.items()}
    depths: dict[int, int] = {}
    for node in graph.nodes:
        depths[node.id] = 0 if node.when is None else depths.get(node.when, 0) + 1
        yield "  " * depths[node.id] + _line(node, graph, names, by_key) + _where(node, len(graph.runs))


def _line(node: Node, graph: Graph, names: Mapping[int, str], parameters: Mapping[str, str]) -> str:
    if node.op == "attachment" and node.args:
        shape = _spec(graph, str(node.args[0]))
        name = parameters.get(str(node.args[0]))
        return f"%{node.id} = param({name!r}, {shape})" if name else f"%{node.id} = attachment({shape})"
    if node.op == "read":
        return f"%{node.id} = {node.point}"
    if node.op == "write" and len(node.args) == 3:
        chain, index, value = node.args
        views = "".join(f".{name}({', '.join(map(_shown, rest))})" for name, *rest in chain)
        at = "" if index is None else f"[{_item(index)}]"
        return f"{node.point}{views}{at} = {_shown(value)}"
    shown = [*map(_shown, node.args), *(f"{name}={_shown(value)}" for name, value in node.kwargs.items())]
    if node.op == "save":
        return f"{names.get(node.id, node.id)} = save({', '.join(shown)})"
    if node.op == "getitem" and len(node.args) == 2:
        shown[1] = f"[{_item(node.args[1])}]"
    return f"%{node.id} = {node.op}({', '.join(shown)})"


def _spec(graph: Graph, key: str) -> str:
    spec = graph.attachments.get(key)
    return f"{spec.dtype}{list(spec.shape)}" if spec else "?"


def _where(node: Node, runs: int) -> str:
    invoke = "all" if node.invoke is None else str(node.invoke)
    place = f"run {node.run}, " if runs > 1 else ""
    source = "" if node.source is None else f"  # {node.source.file}:{node.source.line}"
    return f"  <{place}invoke {invoke}>{source}" if node.point or place else source


def _item(index: Any) -> str:
    return ", ".join(map(_shown, index)) if isinstance(index, tuple) else _shown(index)


def _shown(value: Any) -> str:
    match value:
        case Ref():
            return f"%{value.id}"
        case DType():
            return value.name
        case slice():
            ends = ["" if part is None else _shown(part) for part in (value.start, value.stop)]
            return ":".join(ends if value.step is None else [*ends, _shown(value.step)])
        case EllipsisType():
            return "..."
        case list():
            return f"[{', '.join(map(_shown, value))}]"
        case tuple():
            return f"({', '.join(map(_shown, value))}{',' if len(value) == 1 else ''})"
    return repr(value)
