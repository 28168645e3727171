"""Whether a graph can run on a model, and what it takes: the same check while recording and on the server.

A `Checker` takes nodes one by one. For each it knows the shape where shapes tell, and the moment of the forward
at which the value exists; from these follow wrong order, wrong shapes and the bounds on memory and work, before
anything is queued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..errors import (
    BadArgument,
    IndexOutOfRange,
    InterposeError,
    InvalidGraph,
    LimitExceeded,
    ShapeMismatch,
    UnknownPoint,
    WrongOrder,
)
from . import ops
from .footprint import Footprint
from .limits import Limits
from .manifest import EVENT, Leaf, Manifest, leaves, walk
from .model import Graph, Node, Point, Run
from .ops import UNKNOWN
from .values import DTYPES, Ref, TensorSpec, refs, substitute

Spec: TypeAlias = Any
"""TensorSpec, UNKNOWN, a tuple or dict of these, or None for what isn't a tensor."""

Moment: TypeAlias = tuple[int, int, int]
"""Run, step, event within the forward. Lexicographic order is time."""

ALWAYS: Moment = (-1, 0, 0)
LATE = 2**62
"""Stands for the moment of a call that the measured forward never made."""

MAX_CHAIN = 32


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a node before it runs."""

    spec: Spec
    moment: Moment
    bytes: int = 0
    peak: int = 0
    flops: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """A valid graph: what is known of each node, and the whole job's footprint."""

    known: tuple[Known, ...]
    footprint: Footprint


@dataclass
class Checker:
    """Checks nodes in creation order against a manifest.

    `runs` may grow while a client records; specs use the rows known when a node is added.
    """

    manifest: Manifest
    runs: Sequence[Run] = ()
    attachments: Mapping[str, TensorSpec] = field(default_factory=dict)
    known: list[Known] = field(default_factory=list)
    attention: bool = False
    exclusive: bool = False

    def add(self, node: Node) -> Known:
        """Check one node. Raises a GraphError that names it."""
        try:
            handler = STRUCTURE.get(node.op)
            known = handler(self, node) if handler else self._pure(node)
        except InterposeError as error:
            raise error.at(node.id, node.op, node.source) from None
        self.known.append(known)
        return known

    def spec(self, ref: int) -> Spec:
        spec = self.known[ref].spec
        if spec is None:
            raise InvalidGraph(f"node {ref} makes no value that another could use")
        return spec

    def point_spec(self, point: Point, run: int, invoke: int | None) -> Spec:
        """The shape of what lies at a point for one invoke. Raises UnknownModule or UnknownPoint."""
        rows, seq = self._sizes(run, invoke)
        return _spec_of(self._layout(point), rows, seq)

    def moment(self, values: object) -> Moment:
        """When the last of some arguments exists."""
        return max((self.known[ref].moment for ref in refs(values)), default=ALWAYS)

    # -- parts -------------------------------------------------------------------------------------------------

    def _run(self, index: int) -> Run:
        if index >= len(self.runs):
            raise InvalidGraph(f"there is no run {index}")
        return self.runs[index]

    def _sizes(self, run: int, invoke: int | None) -> tuple[int, int]:
        whole = self._run(run)
        if invoke is None:
            return whole.rows, whole.longest
        if invoke >= len(whole.invokes):
            raise InvalidGraph(f"run {run} has no invoke {invoke}")
        one = whole.invokes[invoke]
        return len(one.rows), one.longest

    def _layout(self, point: Point) -> Any:
        info = self.manifest.module(point.module)
        where = point.module or "the model"
        if point.name not in info.points:
            offered = ", ".join(info.points) or "none: the model's forward doesn't call it"
            raise UnknownPoint(f"{where} has no hook point {point.name!r}; it has {offered}")
        moments = info.events.get(EVENT.get(point.name, point.name), ())
        if moments and point.call >= len(moments):
            raise UnknownPoint(
                f"{where} is called {len(moments)} times in a forward; there is no call {point.call}"
            )
        try:
            return walk(info.points[point.name], point.path)
        except KeyError as error:
            raise UnknownPoint(f"{point}: nothing is at {error.args[0]!r}") from None

    def _when(self, node: Node, point: Point) -> Moment:
        moment = self.manifest.moment(point.module, point.name, point.call)
        return node.run, point.step, LATE if moment is None else moment

    def _touch(self, node: Node) -> tuple[Point, Any]:
        """The node's point and layout; notes what touching it means for sharing a batch."""
        point = node.point
        if point is None:
            raise InvalidGraph(f"{node.op} names no hook point")
        layout = self._layout(point)
        if point.step and self._run(node.run).kind != "generate":
            raise BadArgument("a trace has one forward; steps exist in generate")
        if point.name not in EVENT:
            self.attention = True
        found = leaves(layout)
        if not found:
            raise UnknownPoint(f"{point} holds no tensor")
        if not all(leaf.by_rows for leaf in found):
            self.exclusive = True
        return point, layout

    def read(self, node: Node) -> Known:
        _arity(node, 0)
        point, layout = self._touch(node)
        rows, seq = self._sizes(node.run, node.invoke)
        return Known(_spec_of(layout, rows, seq), self._when(node, point))

    def write(self, node: Node) -> Known:
        _arity(node, 3)
        point, layout = self._touch(node)
        if not isinstance(layout, Leaf):
            raise BadArgument(f"{point} is a nest; write one of its tensors")
        if layout.dtype not in _FLOATING:
            self.exclusive = True
        chain, index, value = node.args
        moment = self._when(node, point)
        ready = self.moment(node.args)
        if ready > moment and moment[2] != LATE:
            raise WrongOrder(
                f"{point} is written with a value that exists only later in the forward; "
                "write a later point, or take the value from a run before"
            )
        rows, seq = self._sizes(node.run, node.invoke)
        spec = layout.spec(rows, seq) or UNKNOWN
        self._place(spec, chain, index, value)
        size = _nbytes(spec)
        return Known(None, max(moment, ready), bytes=2 * size, peak=size)

    def update(self, node: Node) -> Known:
        _arity(node, 4)
        base, chain, index, value = node.args
        spec = self._tensor(base)
        self._place(spec, chain, index, value)
        return Known(spec, self.moment(node.args), bytes=_nbytes(spec), peak=_nbytes(spec))

    def _place(self, spec: Spec, chain: Any, index: Any, value: Any) -> None:
        """Check that `value` fits where a chain of views and an index lead within a tensor."""
        if not isinstance(chain, tuple) or len(chain) > MAX_CHAIN:
            raise InvalidGraph(f"a write's views are a tuple of at most {MAX_CHAIN}")
        for step in chain:
            if not isinstance(step, tuple) or not step or not isinstance(step[0], str):
                raise InvalidGraph("a view in a write is an op and its arguments")
            op = ops.lookup(step[0])
            if not op.view:
                raise InvalidGraph(f"{op.name} is no view: what is written there would be lost")
            spec = ops.infer(op.name, (spec, *self._specs(step[1:])), {})
        if isinstance(spec, tuple):
            raise BadArgument("a write ends in one tensor")
        given = self._specs(value)
        if index is None:
            if isinstance(given, TensorSpec) and isinstance(spec, TensorSpec) and given.shape != spec.shape:
                raise ShapeMismatch(
                    f"replaced with shape {list(given.shape)}, where {list(spec.shape)} is expected"
                )
            if not isinstance(given, TensorSpec) and given is not UNKNOWN:
                raise BadArgument("a value is replaced by a tensor")
        else:
            ops.infer("setitem", (spec, self._specs(index), given), {})

    def _specs(self, value: Any) -> Any:
        return substitute(value, self.spec)

    def _tensor(self, value: Any) -> Spec:
        if not isinstance(value, Ref):
            raise BadArgument("a tensor of this graph is expected")
        spec = self.spec(value.id)
        if not isinstance(spec, TensorSpec) and spec is not UNKNOWN:
            raise BadArgument("one tensor is expected, not a nest")
        return spec

    def save(self, node: Node) -> Known:
        _arity(node, 1)
        spec = self._specs(node.args[0])
        return Known(spec, self.moment(node.args), bytes=sum(map(_nbytes, _flat(spec))))

    def log(self, node: Node) -> Known:
        if not node.args or len(node.args) > 16:
            raise BadArgument("log takes one to sixteen values")
        return Known(None, self.moment(node.args))

    def attachment(self, node: Node) -> Known:
        _arity(node, 1)
        sha = node.args[0]
        spec = self.attachments.get(sha) if isinstance(sha, str) else None
        if spec is None:
            raise InvalidGraph("it names an attachment that the graph doesn't list")
        return Known(spec, ALWAYS, bytes=spec.nbytes)

    def param(self, node: Node) -> Known:
        _arity(node, 2)
        path, name = node.args
        if not isinstance(path, str) or not isinstance(name, str):
            raise BadArgument("a parameter is named by its module's path and its own name")
        info = self.manifest.module(path)
        param = info.params.get(name)
        if param is None:
            offered = ", ".join(info.params) or "none"
            raise UnknownPoint(f"{path or 'the model'} has no parameter {name!r}; it has {offered}")
        return Known(TensorSpec(param.shape, param.dtype), ALWAYS)

    def call(self, node: Node) -> Known:
        if not node.args or not isinstance(node.args[0], str):
            raise BadArgument("call takes a module's path and one tensor")
        _arity(node, 2)
        info = self.manifest.module(node.args[0])
        given = self._tensor(node.args[1])
        spec = called_spec(info.points, given)
        flops = _module_flops(self.manifest, info.path, given)
        return Known(spec, self.moment(node.args), bytes=_nbytes(spec), peak=4 * _nbytes(spec), flops=flops)

    def attention_mask(self, node: Node) -> Known:
        _arity(node, 0)
        return Known(TensorSpec(self._sizes(node.run, node.invoke), "int64"), (node.run, 0, -1))

    def _pure(self, node: Node) -> Known:
        op = ops.lookup(node.op)
        if node.point is not None:
            raise InvalidGraph("only reads and writes name a hook point")
        args = self._specs(node.args)
        kwargs = {name: self._specs(arg) for name, arg in node.kwargs.items()}
        spec = ops.infer(op.name, args, kwargs)
        cost = ops.cost(op.name, args, kwargs)
        moment = self.moment((*node.args, *node.kwargs.values()))
        if cost is None:
            return Known(spec, moment)
        return Known(spec, moment, 0 if op.view else cost.out_bytes, cost.peak_bytes, cost.flops)


STRUCTURE: Mapping[str, Callable[[Checker, Node], Known]] = {
    "read": Checker.read,
    "write": Checker.write,
    "update": Checker.update,
    "save": Checker.save,
    "log": Checker.log,
    "attachment": Checker.attachment,
    "param": Checker.param,
    "call": Checker.call,
    "attention_mask": Checker.attention_mask,
}
"""Ops that concern the model or the job, rather than tensors alone. The rest is `ops.OPS`."""

_FLOATING = {name for name in DTYPES if name.startswith(("float", "bfloat"))}


def validate(graph: Graph, manifest: Manifest, limits: Limits, *, batching: str = "auto") -> Report:
    """Check a whole graph.

    Raises:
        GraphError: it can't run on this model; names the node.
        LimitExceeded: it asks for more than `limits`, with both figures.
    """
    limits.check("nodes", len(graph.nodes))
    for run in graph.runs:
        check_run(run, manifest)
    for spec in graph.attachments.values():
        limits.check("attachment_bytes", spec.nbytes)
    checker = Checker(manifest, graph.runs, graph.attachments)
    for node in graph.nodes:
        checker.add(node)
    known = tuple(checker.known)
    result = sum(known[node.id].bytes for node in graph.saves)
    memory = _most_alive(graph, known)
    flops = sum(item.flops for item in known)
    limits.check("result_bytes", result)
    limits.check("memory_bytes", memory)
    limits.check("flops", flops)
    kinds = {run.kind for run in graph.runs}
    return Report(
        known,
        Footprint(
            kind=kinds.pop() if len(kinds) == 1 else "mixed",
            runs=len(graph.runs),
            rows=max((run.rows for run in graph.runs), default=0),
            longest=max((run.longest for run in graph.runs), default=0),
            attention=checker.attention,
            exclusive=checker.exclusive or batching == "exclusive" or not manifest.row_independent,
            result_bytes=result,
            memory_bytes=memory,
            flops=flops,
        ),
    )


def check_run(run: Run, manifest: Manifest) -> None:
    """Token ids against the vocabulary, lengths against the model's positions."""
    for invoke in run.invokes:
        for row in invoke.rows:
            if not row:
                raise BadArgument("a prompt has no tokens")
            if manifest.vocab is not None and max(row) >= manifest.vocab:
                raise IndexOutOfRange(f"token id {max(row)} is outside the vocabulary of {manifest.vocab}")
    if manifest.positions is not None and run.longest > manifest.positions:
        raise LimitExceeded(
            f"a prompt of {run.longest} tokens, where {manifest.model} has {manifest.positions} positions",
            details={"limit": "positions", "asked": run.longest, "allowed": manifest.positions},
        )
    if not run.rows:
        raise BadArgument("nothing to run: no prompt was given")


def called_spec(points: Mapping[str, Any], given: Spec) -> Spec:
    """The shape of a module's output for an input other than the model's, where its layout tells.

    Known for modules that keep all dimensions but the last: linear maps, norms, activations.
    """
    inputs, output = points.get("inputs"), points.get("output")
    if not isinstance(given, TensorSpec) or not isinstance(output, Leaf) or not given.shape:
        return UNKNOWN
    first = leaves(inputs)[:1]
    if not first or first[0].dims[:-1] != output.dims[:-1] or not isinstance(output.dims[-1], int):
        return UNKNOWN
    if first[0].dims[-1] != given.shape[-1]:
        raise ShapeMismatch(f"called on a last dimension of {given.shape[-1]}, where it takes {first[0].dims[-1]}")
    return TensorSpec((*given.shape[:-1], output.dims[-1]), output.dtype)


def _module_flops(manifest: Manifest, path: str, given: Spec) -> int:
    inside = [info for name, info in manifest.modules.items() if name == path or name.startswith(path + ".")]
    weights = sum(_numel(param.shape) for info in inside for param in info.params.values())
    rows = _numel(given.shape[:-1]) if isinstance(given, TensorSpec) else 1
    return 2 * weights * rows


def _numel(shape: Sequence[int]) -> int:
    return TensorSpec(tuple(shape), "bool").numel


def _spec_of(layout: Any, rows: int, seq: int) -> Spec:
    if isinstance(layout, Leaf):
        return layout.spec(rows, seq) or UNKNOWN
    if isinstance(layout, tuple):
        return tuple(_spec_of(item, rows, seq) for item in layout)
    if isinstance(layout, dict):
        return {name: _spec_of(item, rows, seq) for name, item in layout.items()}
    return None


def _flat(spec: Spec) -> list[Spec]:
    if isinstance(spec, (tuple, list)):
        return [leaf for item in spec for leaf in _flat(item)]
    if isinstance(spec, dict):
        return [leaf for item in spec.values() for leaf in _flat(item)]
    return [spec]


def _nbytes(spec: Spec) -> int:
    return spec.nbytes if isinstance(spec, TensorSpec) else 0


def _most_alive(graph: Graph, known: Sequence[Known]) -> int:
    """Bytes of the graph's own values at the worst moment: each lives from its making to its last use."""
    order = sorted(graph.nodes, key=lambda node: (known[node.id].moment, node.id))
    last: dict[int, int] = {}
    for position, node in enumerate(order):
        for ref in refs((*node.args, *node.kwargs.values())):
            last[ref] = position
    dies: dict[int, int] = {}
    for ref, position in last.items():
        dies[position] = dies.get(position, 0) + known[ref].bytes
    alive = most = 0
    for position, node in enumerate(order):
        alive += known[node.id].bytes
        most = max(most, alive + known[node.id].peak)
        alive -= dies.get(position, 0)
        if node.id not in last and node.op != "save":
            alive -= known[node.id].bytes
    return most


def _arity(node: Node, count: int) -> None:
    if len(node.args) != count or node.kwargs:
        raise InvalidGraph(f"{node.op} takes {count} arguments, {len(node.args)} given")
