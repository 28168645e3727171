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
    WrongOrder,
)
from . import ops
from .manifest import Manifest
from .model import Node, Run
from .ops import UNKNOWN
from .specs import Sizes, Spec
from .values import Ref, TensorSpec, refs, substitute

Moment: TypeAlias = tuple[int, int, int]
"""Run, step, event within the forward. Lexicographic order is time."""

ALWAYS: Moment = (-1, 0, 0)
LATE = 2**62
"""Stands for the moment of a call that the measured forward never made."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a node before it runs."""

    spec: Spec
    moment: Moment
    bytes: int = 0
    peak: int = 0
    flops: int = 0


Handler: TypeAlias = "Callable[[Checker, Node], Known]"

HANDLERS: dict[str, Handler] = {}
"""Ops that concern the model or the job, rather than tensors alone. The rest is `ops.OPS`."""

CONTROL = frozenset({"steps", "branch", "loop"})
"""Ops with a body: the nodes whose `when` names them."""

LEAVES_BODIES = frozenset({"choose", "end_loop"})
"""Ops that take values out of bodies."""

LOOP_REFUSES = frozenset(
    ("read", "write", "save", "tell", "grad", "set_grad", "backward", "branch", "tokens", "alive", "attention_mask")
)
"""What a loop's body can't hold: the model passes each point once, not once a turn."""

MAX_NESTING = 8
MAX_PARTS = 1 << 18
"""Tensors that all ops of a graph which give several may give together: each is described one by one."""


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
        sizes: (run, invoke) -> what rows and positions it has at its first step, and the run as it then was.
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
    sizes: dict[tuple[int, int | None], tuple[Run, Sizes]] = field(default_factory=dict)

    def add(self, node: Node) -> Known:
        """Check one node. Raises a GraphError that names it."""
        count = len(self.known)
        try:
            if node.point is not None and node.op not in ("read", "write"):
                raise InvalidGraph("only reads and writes name a hook point")
            self._enter(node)
            if self.upstream:
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
        for ref in node.refs:
            if self.scope[ref] != scope[: len(self.scope[ref])]:
                raise BadArgument(
                    "a value made inside a condition, loop or step exists only there; let it return it"
                )

    def _trace_gradients(self, node: Node) -> None:
        """Note what follows from a gradient. If the same forward needs it, it can't wait for others' losses."""
        sources = (*node.refs, *(() if node.when is None else (node.when,)))
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
        return known if known.moment >= decided else replace(known, moment=decided)

    def spec(self, ref: int) -> Spec:
        spec = self.known[ref].spec
        if spec is None:
            raise InvalidGraph(f"node {ref} makes no value that another could use")
        return spec

    def moment(self, values: object) -> Moment:
        """When the last of some arguments exists."""
        return max((self.known[ref].moment for ref in refs(values)), default=ALWAYS)

    def moment_of(self, node: Node) -> Moment:
        """When the last of a node's arguments exists."""
        return max([self.known[ref].moment for ref in node.refs], default=ALWAYS)

    def run(self, index: int) -> Run:
        if index >= len(self.runs):
            raise InvalidGraph(f"there is no run {index}")
        return self.runs[index]

    def specs(self, value: Any) -> Any:
        return substitute(value, self.spec)

    def tensor(self, value: Any) -> Spec:
        if not isinstance(value, Ref):
            raise BadArgument("a tensor of this graph is expected")
        spec = self.spec(value.id)
        if not isinstance(spec, TensorSpec) and spec is not UNKNOWN:
            raise BadArgument("one tensor is expected, not a nest")
        return spec

    def _pure(self, node: Node) -> Known:
        op = ops.lookup(node.op)
        args = self.specs(node.args)
        kwargs = {name: self.specs(arg) for name, arg in node.kwargs.items()}
        spec, cost = ops.measure(op.name, args, kwargs)
        moment = self.moment_of(node)
        if cost is None:
            return Known(spec, moment)
        return Known(spec, moment, cost.kept_bytes, cost.peak_bytes, cost.flops)


def arity(node: Node, count: int) -> None:
    """Raises InvalidGraph unless a node has so many arguments, by position."""
    if len(node.args) != count or node.kwargs:
        raise InvalidGraph(f"{node.op} takes {count} arguments, {len(node.args)} given")
