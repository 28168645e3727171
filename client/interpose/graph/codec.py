"""A graph's plain form: what msgpack carries, what JSON files hold.

Field order means nothing, defaults are left out, and whatever isn't understood is refused. Decoding bounds
sizes by `Limits` before anything is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InvalidGraph, Source
from .limits import Limits
from .model import FORMAT, Graph, Invoke, Node, Point, Run
from .values import DTYPES, TensorSpec, decode, encode, refs, text, whole

MAX_PROMPT = 1 << 22
"""Characters of one prompt's text, or of a file's name."""

_NODE_FIELDS = {"id", "op", "args", "kwargs", "point", "invoke", "run", "when", "source"}
_POINT_FIELDS = {"module", "name", "path", "call", "step"}
_RUN_FIELDS = {"kind", "invokes", "options", "adapter"}
_GRAPH_FIELDS = {"version", "files", "runs", "nodes", "attachments"}


def encode_graph(graph: Graph) -> dict[str, Any]:
    """The plain form, in the oldest version that can say it. Source files are numbered; their text stays out."""
    files: dict[str, int] = {}
    nodes = [_encode_node(node, files) for node in graph.nodes]
    return {
        "version": 1 if all(run.adapter is None for run in graph.runs) else FORMAT,
        "files": list(files),
        "runs": [_encode_run(run) for run in graph.runs],
        "nodes": nodes,
        "attachments": {
            sha: {"shape": list(spec.shape), "dtype": spec.dtype} for sha, spec in graph.attachments.items()
        },
    }


def _encode_node(node: Node, files: dict[str, int]) -> dict[str, Any]:
    plain: dict[str, Any] = {"id": node.id, "op": node.op}
    if node.args:
        plain["args"] = [encode(arg) for arg in node.args]
    if node.kwargs:
        plain["kwargs"] = {name: encode(arg) for name, arg in node.kwargs.items()}
    if node.point is not None:
        plain["point"] = _encode_point(node.point)
    if node.invoke is not None:
        plain["invoke"] = node.invoke
    if node.run:
        plain["run"] = node.run
    if node.when is not None:
        plain["when"] = node.when
    if node.source is not None:
        plain["source"] = [files.setdefault(node.source.file, len(files)), node.source.line]
    return plain


def _encode_point(point: Point) -> dict[str, Any]:
    plain: dict[str, Any] = {"module": point.module, "name": point.name}
    if point.path:
        plain["path"] = list(point.path)
    if point.call:
        plain["call"] = point.call
    if point.step:
        plain["step"] = point.step
    return plain


def _encode_run(run: Run) -> dict[str, Any]:
    invokes = []
    for invoke in run.invokes:
        plain: dict[str, Any] = {"rows": [list(row) for row in invoke.rows]}
        if invoke.tensors:
            plain["tensors"] = dict(invoke.tensors)
        if invoke.text:
            plain["text"] = list(invoke.text)
        invokes.append(plain)
    plain_run: dict[str, Any] = {"kind": run.kind, "invokes": invokes}
    if run.options:
        plain_run["options"] = {name: encode(value) for name, value in run.options.items()}
    if run.adapter is not None:
        plain_run["adapter"] = run.adapter
    return plain_run


def decode_graph(plain: Any, limits: Limits | None = None) -> Graph:
    """The graph a plain form stands for.

    Raises:
        InvalidGraph: it isn't one.
        LimitExceeded: more nodes, rows or tokens than `limits` allow.
    """
    limits = limits or Limits()
    plain = _mapping(plain, "a graph", _GRAPH_FIELDS)
    version = plain.get("version")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise InvalidGraph(f"graph version {version!r}; this side reads 1 to {FORMAT}")
    files = _texts(plain.get("files", []), "files", limits.nodes)
    nodes = _list(plain.get("nodes", []), "nodes")
    limits.check("nodes", len(nodes))
    runs = _list(plain.get("runs", []), "runs")
    limits.check("runs", len(runs))
    attachments = plain.get("attachments", {})
    if not isinstance(attachments, dict):
        raise InvalidGraph("attachments aren't a mapping")
    limits.check("attachments", len(attachments))
    decoded = tuple(_decode_run(run, limits, version) for run in runs)
    limits.check("invokes", sum(len(run.invokes) for run in decoded))
    limits.check("rows", sum(run.rows for run in decoded))
    limits.check("tokens", sum(run.rows * run.longest for run in decoded))
    return Graph(
        runs=decoded,
        nodes=tuple(_decode_node(node, position, files) for position, node in enumerate(nodes)),
        attachments={_sha(sha): _spec(spec) for sha, spec in attachments.items()},
    )


def _decode_node(plain: Any, position: int, files: list[str]) -> Node:
    plain = _mapping(plain, f"node {position}", _NODE_FIELDS)
    if plain.get("id") != position or type(plain.get("id")) is not int:
        raise InvalidGraph(f"node {position} has id {plain.get('id')!r}; ids are positions")
    args = tuple(decode(arg) for arg in _list(plain.get("args", []), "args"))
    raw = plain.get("kwargs", {})
    if not isinstance(raw, dict):
        raise InvalidGraph(f"node {position}: kwargs aren't named")
    kwargs = {text(name, "an argument's name"): decode(arg) for name, arg in raw.items()}
    if any(ref >= position for arg in (*args, *kwargs.values()) for ref in refs(arg)):
        raise InvalidGraph(f"node {position} refers to a node that doesn't come before it")
    when = plain.get("when")
    if when is not None and whole(when, "when") >= position:
        raise InvalidGraph(f"node {position} lies in a body that doesn't come before it")
    point = plain.get("point")
    invoke = plain.get("invoke")
    return Node(
        id=position,
        op=text(plain.get("op"), "op"),
        args=args,
        kwargs=kwargs,
        point=None if point is None else _decode_point(point),
        invoke=None if invoke is None else whole(invoke, "invoke"),
        run=whole(plain.get("run", 0), "run"),
        when=when,
        source=_source(plain.get("source"), files),
    )


def _decode_point(plain: Any) -> Point:
    plain = _mapping(plain, "a point", _POINT_FIELDS)
    path = _list(plain.get("path", []), "a point's path")
    # Numbers from 0 only: -1 would be a second name of the same place, and writes are merged by name.
    if len(path) > 8 or not all((type(key) is int and 0 <= key < 2**31) or isinstance(key, str) for key in path):
        raise InvalidGraph("a point's path is made of a few names and whole numbers")
    return Point(
        module=text(plain.get("module"), "a point's module", 1024),
        name=text(plain.get("name"), "a point's name"),
        path=tuple(text(key, "a point's path") if isinstance(key, str) else key for key in path),
        call=whole(plain.get("call", 0), "a point's call", 0, 2**20),
        step=whole(plain.get("step", 0), "a point's step", 0, 2**20),
    )


def _decode_run(plain: Any, limits: Limits, version: int) -> Run:
    plain = _mapping(plain, "a run", _RUN_FIELDS if version > 1 else _RUN_FIELDS - {"adapter"})
    kind = plain.get("kind", "trace")
    if kind not in ("trace", "generate"):
        raise InvalidGraph("a run is a trace or a generate")
    invokes = _list(plain.get("invokes", []), "invokes")
    limits.check("invokes", len(invokes))
    options = plain.get("options", {})
    if not isinstance(options, dict):
        raise InvalidGraph("a run's options aren't named")
    adapter = plain.get("adapter")
    run = Run(
        kind=kind,
        invokes=tuple(_decode_invoke(invoke, limits) for invoke in invokes),
        options={text(name, "an option's name"): decode(value) for name, value in options.items()},
        adapter=None if adapter is None else text(adapter, "an adapter's name"),
    )
    limits.check("rows", run.rows)
    limits.check("tokens", run.rows * run.longest)
    return run


def _decode_invoke(plain: Any, limits: Limits) -> Invoke:
    plain = _mapping(plain, "an invoke", {"rows", "tensors", "text"})
    rows = _list(plain.get("rows", []), "rows")
    limits.check("rows", len(rows))
    for row in rows:
        limits.check("tokens", len(_list(row, "a row")))
        if not all(type(token) is int and 0 <= token < 2**31 for token in row):
            raise InvalidGraph("token ids are whole numbers")
    tensors = plain.get("tensors", {})
    if not isinstance(tensors, dict) or len(tensors) > 16:
        raise InvalidGraph("an invoke's tensors are a small mapping")
    return Invoke(
        rows=tuple(tuple(row) for row in rows),
        tensors={text(name, "an input's name"): _sha(sha) for name, sha in tensors.items()},
        text=tuple(_texts(plain.get("text", []), "text", limits.rows)),
    )


def _source(plain: Any, files: list[str]) -> Source | None:
    if plain is None:
        return None
    if not isinstance(plain, list) or len(plain) != 2:
        raise InvalidGraph("a source is a file's number and a line")
    return Source(files[whole(plain[0], "a file's number", 0, len(files) - 1)], whole(plain[1], "a line"))


def _spec(plain: Any) -> TensorSpec:
    plain = _mapping(plain, "an attachment", {"shape", "dtype"})
    shape = _list(plain.get("shape"), "an attachment's shape")
    if not isinstance(plain.get("dtype"), str) or plain["dtype"] not in DTYPES or len(shape) > 16:
        raise InvalidGraph("an attachment has an unknown dtype or too many dimensions")
    return TensorSpec(tuple(whole(size, "a size", 0, 2**40) for size in shape), plain["dtype"])


def _sha(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise InvalidGraph("an attachment is named by its SHA-256, 64 hex digits")
    return value


def _mapping(plain: Any, what: str, fields: set[str]) -> Mapping[str, Any]:
    if not isinstance(plain, dict) or not set(plain) <= fields:
        raise InvalidGraph(f"{what} is a mapping of {', '.join(sorted(fields))}")
    return plain


def _list(plain: Any, what: str) -> list[Any]:
    if not isinstance(plain, list):
        raise InvalidGraph(f"{what}: a list is expected")
    return plain


def _texts(plain: Any, what: str, most: int) -> list[str]:
    if not isinstance(plain, list) or len(plain) > most:
        raise InvalidGraph(f"{what}: a list of at most {most} texts is expected")
    return [text(item, what, MAX_PROMPT) for item in plain]
