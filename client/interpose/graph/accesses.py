"""Reads and writes, of hook points and of computed values: what each may be, and when it happens."""

from __future__ import annotations

from typing import Any

from ..errors import BadArgument, InvalidGraph, ShapeMismatch, UnknownPoint, WrongOrder
from . import ops
from .checker import LATE, Checker, Known, Moment, arity, handles
from .functions import call_of, no_such_point, placing
from .inputs import counted
from .manifest import ATTENTION, EVENT, Leaf, leaves, walk
from .model import Node, Point, Run
from .ops import UNKNOWN
from .ops.dtypes import category
from .specs import FLOATING, Sizes, Spec, nbytes, spec_of, total
from .values import TensorSpec

MAX_CHAIN = 32


@handles("read")
def read(checker: Checker, node: Node) -> Known:
    arity(node, 0)
    point, layout = _touch(checker, node)
    spec = spec_of(layout, sizes(checker, node))
    return Known(spec, _when(checker, node, point), bytes=total(spec))


@handles("write")
def write(checker: Checker, node: Node) -> Known:
    arity(node, 3)
    point, layout = _touch(checker, node)
    if not isinstance(layout, Leaf):
        raise BadArgument(f"{point} is a nest; write one of its tensors")
    _check_writable(checker, point, layout)
    if layout.dtype not in FLOATING:
        checker.exclusive = True
    chain, index, value = node.args
    moment = _when(checker, node, point)
    ready = checker.moment(node.args)
    if ready > moment and moment[2] != LATE:
        raise WrongOrder(
            f"{point} is written with a value that exists only later in the forward; "
            "write a later point, or take the value from a run before"
        )
    spec = spec_of(layout, sizes(checker, node))
    place(checker, spec, chain, index, value)
    size = nbytes(spec)
    return Known(None, max(moment, ready), bytes=2 * size, peak=size)


def _check_writable(checker: Checker, point: Point, leaf: Leaf) -> None:
    """Raises BadArgument at functions that compute where things lie."""
    call = call_of(point.name)
    if call is None:
        return
    if category(leaf.dtype) == 1 or call in placing(checker.manifest.module(point.module)):
        raise BadArgument(
            f"{point} takes part in computing where things lie in memory, so it is read and not written; write "
            "what comes before the module, or after this"
        )


@handles("update")
def update(checker: Checker, node: Node) -> Known:
    arity(node, 4)
    base, chain, index, value = node.args
    spec = checker.tensor(base)
    place(checker, spec, chain, index, value)
    return Known(spec, checker.moment(node.args), bytes=nbytes(spec), peak=nbytes(spec))


def place(checker: Checker, spec: Spec, chain: Any, index: Any, value: Any) -> None:
    """Check that `value` fits where a chain of views and an index lead within a tensor."""
    if not isinstance(chain, tuple) or len(chain) > MAX_CHAIN:
        raise InvalidGraph(f"a write's views are a tuple of at most {MAX_CHAIN}")
    for step in chain:
        if not isinstance(step, tuple) or not step or not isinstance(step[0], str):
            raise InvalidGraph("a view in a write is an op and its arguments")
        op = ops.lookup(step[0])
        if not op.view:
            raise InvalidGraph(f"{op.name} is no view: what is written there would be lost")
        spec = ops.infer(op.name, (spec, *checker.specs(step[1:])), {})
    if isinstance(spec, tuple):
        raise BadArgument("a write ends in one tensor")
    given = checker.specs(value)
    if index is None:
        if isinstance(given, TensorSpec) and isinstance(spec, TensorSpec) and given.shape != spec.shape:
            raise ShapeMismatch(f"replaced with shape {list(given.shape)}, where {list(spec.shape)} is expected")
        if not isinstance(given, TensorSpec) and given is not UNKNOWN:
            raise BadArgument("a value is replaced by a tensor")
    else:
        ops.infer("setitem", (spec, checker.specs(index), given), {})


def _touch(checker: Checker, node: Node) -> tuple[Point, Any]:
    """The node's point and layout; notes what touching it means for sharing a batch."""
    point = node.point
    if point is None:
        raise InvalidGraph(f"{node.op} names no hook point")
    layout = _layout(checker, point)
    if point.step and checker.run(node.run).kind != "generate":
        raise BadArgument("a trace has one forward; steps exist in generate")
    if point.step and any(checker.nodes[control].op == "steps" for control in checker.scope[node.id]):
        raise BadArgument("a body of steps is for all of them; its points name no step of their own")
    if point.name in ATTENTION:
        checker.attention = True
    if isinstance(layout, Leaf):
        checker.exclusive |= not layout.shared
        return point, layout
    found = leaves(layout)
    if not found:
        raise UnknownPoint(f"{point} holds no tensor")
    if not all(leaf.shared for leaf in found):
        checker.exclusive = True
    return point, layout


def _layout(checker: Checker, point: Point) -> Any:
    info = checker.manifest.module(point.module)
    where = point.module or "the model"
    if point.name not in info.points:
        raise UnknownPoint(no_such_point(info, point.name, where))
    moments = info.events.get(EVENT.get(point.name, point.name), ())
    if moments and point.call >= len(moments):
        raise UnknownPoint(f"{where} is called {len(moments)} times in a forward; there is no call {point.call}")
    try:
        return walk(info.points[point.name], point.path)
    except KeyError as error:
        raise UnknownPoint(f"{point}: nothing is at {error.args[0]!r}") from None


def _when(checker: Checker, node: Node, point: Point) -> Moment:
    moment = checker.manifest.moment(point.module, point.name, point.call)
    step = point.step
    for control in checker.scope[node.id]:
        if checker.nodes[control].op == "steps":
            step = checker.nodes[control].args[0]
            break
    return node.run, step, LATE if moment is None else moment


def sizes(checker: Checker, node: Node) -> Sizes:
    """Rows and positions that a node's invoke has at its step; unknown positions inside a body of steps."""
    if checker.symbolic:
        return Sizes(None, None, None)
    whole = checker.run(node.run)
    first = not checker.scope[node.id] and (node.point is None or not node.point.step)
    known = checker.sizes.get((node.run, node.invoke)) if first else None
    if known is not None and known[0] is whole:
        return known[1]
    found = _sizes(checker, node, whole)
    if first:
        checker.sizes[node.run, node.invoke] = whole, found
    return found


def _sizes(checker: Checker, node: Node, whole: Run) -> Sizes:
    if node.invoke is not None and node.invoke >= len(whole.invokes):
        raise InvalidGraph(f"run {node.run} has no invoke {node.invoke}")
    of = whole if node.invoke is None else whole.invokes[node.invoke]
    rows = whole.rows if node.invoke is None else len(whole.invokes[node.invoke].rows)
    if any(checker.nodes[control].op == "steps" for control in checker.scope[node.id]):
        return Sizes(rows, None, None)
    if node.point is None or not node.point.step:
        seen = whole.invokes if node.invoke is None else (whole.invokes[node.invoke],)
        images = sum(counted(invoke, checker.manifest.inputs, checker.attachments) for invoke in seen)
        return Sizes(rows, of.longest, of.longest, images)
    keys = of.longest + node.point.step
    window = checker.manifest.window(node.point.module)
    return Sizes(rows, 1, keys if window is None else min(keys, window))
