"""What is known of each node of a graph before it runs: its shape, its moment in the forward, its cost.

A `Checker` takes nodes one by one, while a client records and again on the server. From what it knows follow wrong
order, wrong shapes and the bounds on memory and work, before anything is queued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ..errors import (
    BadArgument,
    InterposeError,
    InvalidGraph,
    LimitExceeded,
    ShapeMismatch,
    UnknownPoint,
    WrongOrder,
)
from . import ops
from .functions import no_such_point
from .manifest import ATTENTION, BATCH, BATCH_SEQ, EVENT, KEY, SEQ, Leaf, Manifest, leaves, walk
from .model import Node, Point, Run
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
class Sizes:
    """Rows, positions, and positions attention looks back on; None where they change from step to step."""

    rows: int | None
    seq: int | None
    key: int | None


Handler: TypeAlias = "Callable[[Checker, Node], Known]"

HANDLERS: dict[str, Handler] = {}
"""Ops that concern the model or the job, rather than tensors alone. The rest is `ops.OPS`."""

CONTROL = frozenset({"steps", "branch", "loop"})
"""Ops with a body: the nodes whose `when` names them."""

LEAVES_BODIES = frozenset({"choose", "end_loop"})
"""Ops that take values out of bodies."""

LOOP_REFUSES = frozenset({"read", "write", "save", "tell", "grad", "set_grad", "backward", "branch", "tokens"})
"""What a loop's body can't hold: the model passes each point once, not once a turn."""

MAX_NESTING = 8
MAX_PARTS = 1 << 18
"""Tensors that all ops of a graph which give several may give together: each is described one by one."""
_FLOATING = frozenset(name for name in DTYPES if name.startswith(("float", "bfloat")))


def handles(op: str) -> Callable[[Handler], Handler]:
    """Register what checks an op."""

    def register(handler: Handler) -> Handler:
        assert op not in ops.OPS, f"{op} is an operation on tensors"
        HANDLERS[op] = handler
        return handler

    return register


@dataclass
class Checker:
    """Checks nodes in creation order against a manifest.

    `runs` may grow while a client records; specs use the rows known when a node is added.

    Attributes:
        known, nodes, scope: of every node so far; its scope are the control nodes whose bodies hold it.
        attention: a point inside attention was touched.
        exclusive: something was asked for that no batch can be shared with.
        gradients: a backward was asked for.
        symbolic: there are no prompts yet, so numbers of rows and positions aren't known.
        parts: tensors given by ops that give several, so far.
        ended: loops whose end was seen.
        upstream: nodes that follow from gradients -> the runs of these.
    """

    manifest: Manifest
    runs: Sequence[Run] = ()
    attachments: Mapping[str, TensorSpec] = field(default_factory=dict)
    known: list[Known] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    scope: list[tuple[int, ...]] = field(default_factory=list)
    attention: bool = False
    exclusive: bool = False
    gradients: bool = False
    symbolic: bool = False
    parts: int = 0
    ended: set[int] = field(default_factory=set)
    upstream: dict[int, frozenset[int]] = field(default_factory=dict)

    def add(self, node: Node) -> Known:
        """Check one node. Raises a GraphError that names it."""
        count = len(self.known)
        try:
            if node.point is not None and node.op not in ("read", "write"):
                raise InvalidGraph("only reads and writes name a hook point")
            self._enter(node)
            self._trace_gradients(node)
            handler = HANDLERS.get(node.op)
            known = handler(self, node) if handler else self._pure(node)
            if isinstance(known.spec, tuple):
                self.parts += len(known.spec)
                if self.parts > MAX_PARTS:
                    raise LimitExceeded(f"the graph's operations give more than {MAX_PARTS:,} tensors")
            self.known.append(self._decided(node, known))
        except InterposeError as error:
            del self.nodes[count:], self.scope[count:]
            raise error.at(node.id, node.op, node.source) from None
        return self.known[-1]

    def _enter(self, node: Node) -> None:
        """Note a node's scope; what it refers to must be visible there."""
        scope: tuple[int, ...] = ()
        if node.when is not None:
            if self.nodes[node.when].op not in CONTROL:
                raise InvalidGraph(f"node {node.when} has no body")
            scope = (*self.scope[node.when], node.when)
        self.nodes.append(node)
        self.scope.append(scope)
        if len(scope) > MAX_NESTING:
            raise InvalidGraph(f"bodies nest deeper than {MAX_NESTING}")
        if node.op in LEAVES_BODIES:
            return
        for ref in refs((*node.args, *node.kwargs.values())):
            if self.scope[ref] != scope[: len(self.scope[ref])]:
                raise BadArgument(
                    "a value made inside a condition, loop or step exists only there; let it return it"
                )

    def _trace_gradients(self, node: Node) -> None:
        """Note what follows from a gradient. If the same forward needs it, it can't wait for others' losses."""
        sources = (*refs((*node.args, *node.kwargs.values())), *(() if node.when is None else (node.when,)))
        runs = frozenset[int]().union(*(self.upstream.get(source, ()) for source in sources))
        if runs and node.op not in ("grad", "set_grad"):
            self.upstream[node.id] = runs
            self.exclusive |= node.op in ("read", "write") and node.run in runs

    def _decided(self, node: Node, known: Known) -> Known:
        """A node in a body exists once that is decided."""
        if node.when is None or known.moment[2] == LATE:
            return known
        control = self.nodes[node.when]
        if control.op == "loop" and node.op in LOOP_REFUSES:
            raise BadArgument(f"{node.op} can't be repeated in a loop: take the value before it")
        decided = self.known[node.when].moment
        if control.op == "branch" and decided > known.moment and node.op in ("read", "write"):
            raise WrongOrder("the condition is known only after the model has passed this point")
        return replace(known, moment=max(known.moment, decided))

    def spec(self, ref: int) -> Spec:
        spec = self.known[ref].spec
        if spec is None:
            raise InvalidGraph(f"node {ref} makes no value that another could use")
        return spec

    def moment(self, values: object) -> Moment:
        """When the last of some arguments exists."""
        return max((self.known[ref].moment for ref in refs(values)), default=ALWAYS)

    # -- parts -------------------------------------------------------------------------------------------------

    def run(self, index: int) -> Run:
        if index >= len(self.runs):
            raise InvalidGraph(f"there is no run {index}")
        return self.runs[index]

    def _sizes(self, node: Node) -> Sizes:
        """Rows and positions that a node's invoke has at its step; unknown positions inside a body of steps."""
        if self.symbolic:
            return Sizes(None, None, None)
        whole = self.run(node.run)
        if node.invoke is not None and node.invoke >= len(whole.invokes):
            raise InvalidGraph(f"run {node.run} has no invoke {node.invoke}")
        of = whole if node.invoke is None else whole.invokes[node.invoke]
        rows = whole.rows if node.invoke is None else len(whole.invokes[node.invoke].rows)
        if any(self.nodes[control].op == "steps" for control in self.scope[node.id]):
            return Sizes(rows, None, None)
        if node.point is None or not node.point.step:
            return Sizes(rows, of.longest, of.longest)
        keys = of.longest + node.point.step
        window = self.manifest.window(node.point.module)
        return Sizes(rows, 1, keys if window is None else min(keys, window))

    def _layout(self, point: Point) -> Any:
        info = self.manifest.module(point.module)
        where = point.module or "the model"
        if point.name not in info.points:
            raise UnknownPoint(no_such_point(info, point.name, where))
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
        bodies = (self.nodes[control] for control in self.scope[node.id])
        step = next((body.args[0] for body in bodies if body.op == "steps"), point.step)
        return node.run, step, LATE if moment is None else moment

    def _touch(self, node: Node) -> tuple[Point, Any]:
        """The node's point and layout; notes what touching it means for sharing a batch."""
        point = node.point
        if point is None:
            raise InvalidGraph(f"{node.op} names no hook point")
        layout = self._layout(point)
        if point.step and self.run(node.run).kind != "generate":
            raise BadArgument("a trace has one forward; steps exist in generate")
        if point.step and any(self.nodes[control].op == "steps" for control in self.scope[node.id]):
            raise BadArgument("a body of steps is for all of them; its points name no step of their own")
        if point.name in ATTENTION:
            self.attention = True
        found = leaves(layout)
        if not found:
            raise UnknownPoint(f"{point} holds no tensor")
        if not all(leaf.shared for leaf in found):
            self.exclusive = True
        return point, layout

    def read(self, node: Node) -> Known:
        arity(node, 0)
        point, layout = self._touch(node)
        spec = _spec_of(layout, self._sizes(node))
        return Known(spec, self._when(node, point), bytes=sum(map(nbytes, flat(spec))))

    def write(self, node: Node) -> Known:
        arity(node, 3)
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
        spec = _spec_of(layout, self._sizes(node))
        self.place(spec, chain, index, value)
        size = nbytes(spec)
        return Known(None, max(moment, ready), bytes=2 * size, peak=size)

    def update(self, node: Node) -> Known:
        arity(node, 4)
        base, chain, index, value = node.args
        spec = self.tensor(base)
        self.place(spec, chain, index, value)
        return Known(spec, self.moment(node.args), bytes=nbytes(spec), peak=nbytes(spec))

    def place(self, spec: Spec, chain: Any, index: Any, value: Any) -> None:
        """Check that `value` fits where a chain of views and an index lead within a tensor."""
        if not isinstance(chain, tuple) or len(chain) > MAX_CHAIN:
            raise InvalidGraph(f"a write's views are a tuple of at most {MAX_CHAIN}")
        for step in chain:
            if not isinstance(step, tuple) or not step or not isinstance(step[0], str):
                raise InvalidGraph("a view in a write is an op and its arguments")
            op = ops.lookup(step[0])
            if not op.view:
                raise InvalidGraph(f"{op.name} is no view: what is written there would be lost")
            spec = ops.infer(op.name, (spec, *self.specs(step[1:])), {})
        if isinstance(spec, tuple):
            raise BadArgument("a write ends in one tensor")
        given = self.specs(value)
        if index is None:
            if isinstance(given, TensorSpec) and isinstance(spec, TensorSpec) and given.shape != spec.shape:
                raise ShapeMismatch(
                    f"replaced with shape {list(given.shape)}, where {list(spec.shape)} is expected"
                )
            if not isinstance(given, TensorSpec) and given is not UNKNOWN:
                raise BadArgument("a value is replaced by a tensor")
        else:
            ops.infer("setitem", (spec, self.specs(index), given), {})

    def specs(self, value: Any) -> Any:
        return substitute(value, self.spec)

    def tensor(self, value: Any) -> Spec:
        if not isinstance(value, Ref):
            raise BadArgument("a tensor of this graph is expected")
        spec = self.spec(value.id)
        if not isinstance(spec, TensorSpec) and spec is not UNKNOWN:
            raise BadArgument("one tensor is expected, not a nest")
        return spec

    def save(self, node: Node) -> Known:
        arity(node, 1)
        spec = self.specs(node.args[0])
        return Known(
            spec, self.moment(node.args), bytes=sum(nbytes(item) or plain_bytes(item) for item in flat(spec))
        )

    def tell(self, node: Node) -> Known:
        if not node.args or len(node.args) > 16:
            raise BadArgument("one to sixteen values can be logged")
        return Known(None, self.moment(node.args))

    def attachment(self, node: Node) -> Known:
        arity(node, 1)
        sha = node.args[0]
        spec = self.attachments.get(sha) if isinstance(sha, str) else None
        if spec is None:
            raise InvalidGraph("it names an attachment that the graph doesn't list")
        return Known(spec, ALWAYS, bytes=spec.nbytes)

    def param(self, node: Node) -> Known:
        arity(node, 2)
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
        arity(node, 2)
        info = self.manifest.module(node.args[0])
        given = self.tensor(node.args[1])
        spec = called_spec(info.points, given)
        flops = module_flops(self.manifest, info.path, given)
        return Known(spec, self.moment(node.args), bytes=nbytes(spec), peak=4 * nbytes(spec), flops=flops)

    def attention_mask(self, node: Node) -> Known:
        arity(node, 0)
        sizes = self._sizes(node)
        spec: Spec = UNKNOWN
        if sizes.rows is not None and sizes.seq is not None:
            spec = TensorSpec((sizes.rows, sizes.seq), "int64")
        return Known(spec, (node.run, 0, -1))

    def _pure(self, node: Node) -> Known:
        op = ops.lookup(node.op)
        args = self.specs(node.args)
        kwargs = {name: self.specs(arg) for name, arg in node.kwargs.items()}
        spec = ops.infer(op.name, args, kwargs)
        cost = ops.cost(op.name, args, kwargs)
        moment = self.moment((*node.args, *node.kwargs.values()))
        if cost is None:
            return Known(spec, moment)
        return Known(spec, moment, cost.kept_bytes, cost.peak_bytes, cost.flops)


for _op in ("read", "write", "update", "save", "tell", "attachment", "param", "call", "attention_mask"):
    handles(_op)(getattr(Checker, _op))


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


def module_flops(manifest: Manifest, path: str, given: Spec) -> int:
    """Floating-point operations of a module called on a value: each weight once for each row."""
    weights = manifest.weights(path)
    rows = _numel(given.shape[:-1]) if isinstance(given, TensorSpec) else 1
    return 2 * weights * rows


def _numel(shape: Sequence[int]) -> int:
    return TensorSpec(tuple(shape), "bool").numel


def _spec_of(layout: Any, sizes: Sizes) -> Spec:
    if isinstance(layout, Leaf):
        if sizes.rows is None or sizes.seq is None:
            moving = {SEQ, KEY, BATCH_SEQ} | ({BATCH} if sizes.rows is None else set())
            return UNKNOWN if moving & set(layout.dims) else layout.spec(sizes.rows or 0, 0) or UNKNOWN
        return layout.spec(sizes.rows, sizes.seq, sizes.key) or UNKNOWN
    if isinstance(layout, tuple):
        return tuple(_spec_of(item, sizes) for item in layout)
    if isinstance(layout, dict):
        return {name: _spec_of(item, sizes) for name, item in layout.items()}
    return None


def flat(spec: Spec) -> list[Spec]:
    if isinstance(spec, (tuple, list)):
        return [leaf for item in spec for leaf in flat(item)]
    if isinstance(spec, dict):
        return [leaf for item in spec.values() for leaf in flat(item)]
    return [spec]


def plain_bytes(value: object) -> int:
    """What a value that is no tensor takes in a save, roughly."""
    return len(value) if isinstance(value, str) else 8 if isinstance(value, (bool, int, float)) else 0


def nbytes(spec: Spec) -> int:
    return spec.nbytes if isinstance(spec, TensorSpec) else 0


def arity(node: Node, count: int) -> None:
    if len(node.args) != count or node.kwargs:
        raise InvalidGraph(f"{node.op} takes {count} arguments, {len(node.args)} given")
