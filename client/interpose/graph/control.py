"""Control flow, gradients and generation in a graph: the ops whose meaning isn't in their arguments alone.

Control nodes own a body, the nodes whose `when` names them:

    steps(start, stop)                a body that runs at every step of a generation; stop None: to the end
    branch(pred, wanted)              a body that runs if `pred` is `wanted`
    choose(then, else, a, b)          `a` if branch `then` was taken, else `b`
    loop(count, init)                 a body that runs up to `count` times; carry(k) and turn() in it
    end_loop(loop, outs, keep, each)  runs it, while `keep`: the last `outs`, and every turn's `each` stacked
    backward(loss)                    gradients of a scalar
    grad(value, backward)             the gradient of a value there
    set_grad(value, backward, views, index, new)   what goes on upstream of that value instead
    alive(step)                       which rows had not ended before a step; in a body of steps, before each
    tokens()                          all token ids of a generation, prompt and new ones, when it has ended
"""

from __future__ import annotations

from ..errors import BadArgument, InvalidGraph, LimitExceeded, ShapeMismatch
from .accesses import place, sizes
from .checker import LATE, Checker, Known, arity, handles
from .generation import new_tokens
from .model import Node
from .ops import UNKNOWN
from .specs import FLOATING, Spec, flat, nbytes
from .values import Ref, TensorSpec

MAX_TURNS = 100_000
MAX_CARRIES = 64
MAX_LOOPS = 256
TURN_FLOPS = 100_000
"""What a node of a loop's body costs each turn, even where it only looks: time of the interpreter's."""
_FLAG = TensorSpec((), "bool")


@handles("steps")
def steps(checker: Checker, node: Node) -> Known:
    arity(node, 2)
    start, stop = node.args
    if checker.run(node.run).kind != "generate":
        raise BadArgument("steps exist in generate; a trace has one forward")
    if node.when is not None:
        raise BadArgument("steps can't lie inside a condition, a loop or other steps")
    if type(start) is not int or start < 0 or not (stop is None or (type(stop) is int and stop > start)):
        raise BadArgument("steps are given as start and stop, whole numbers from 0, stop above start")
    return Known(None, (node.run, start, -1))


@handles("branch")
def branch(checker: Checker, node: Node) -> Known:
    arity(node, 2)
    pred, wanted = node.args
    spec = checker.tensor(pred)
    if type(wanted) is not bool:
        raise BadArgument("a branch is taken on true or on false")
    if isinstance(spec, TensorSpec) and spec.numel != 1:
        raise BadArgument(f"a condition is one value, not {list(spec.shape)}; reduce it with .any() or .all()")
    return Known(_FLAG, checker.moment(node.args))


@handles("choose")
def choose(checker: Checker, node: Node) -> Known:
    arity(node, 4)
    then, other, one, two = node.args
    for control in (then, other):
        if not isinstance(control, Ref) or checker.nodes[control.id].op != "branch":
            raise InvalidGraph("choose takes the bodies of two branches")
    spec = _either(checker.specs(one), checker.specs(two))
    return Known(spec, checker.moment(node.args), bytes=sum(map(nbytes, flat(spec))))


def _either(one: Spec, two: Spec) -> Spec:
    if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)) and len(one) == len(two):
        return tuple(_either(left, right) for left, right in zip(one, two, strict=True))
    if isinstance(one, (tuple, list)) or isinstance(two, (tuple, list)):
        raise ShapeMismatch("both ways of a condition must give the same number of values")
    if isinstance(one, TensorSpec) and isinstance(two, TensorSpec) and one.dtype != two.dtype:
        raise ShapeMismatch(f"one way of the condition gives {one.dtype}, the other {two.dtype}")
    return one if one == two else UNKNOWN


@handles("loop")
def loop(checker: Checker, node: Node) -> Known:
    arity(node, 2)
    count, init = node.args
    if type(count) is not int or not 1 <= count <= MAX_TURNS:
        raise BadArgument(f"a loop takes 1 to {MAX_TURNS:,} turns")
    if sum(other.op == "loop" for other in checker.nodes) > MAX_LOOPS:
        raise LimitExceeded(f"a graph holds at most {MAX_LOOPS} loops")
    if not isinstance(init, tuple) or len(init) > MAX_CARRIES:
        raise BadArgument(f"a loop carries a tuple of at most {MAX_CARRIES} tensors")
    for value in init:
        checker.tensor(value)
    return Known(_FLAG, checker.moment(init))


def _loop_of(checker: Checker, node: Node) -> Node:
    for control in reversed(checker.scope[node.id]):
        if checker.nodes[control].op == "loop":
            return checker.nodes[control]
    raise InvalidGraph(f"{node.op} exists only inside a loop")


@handles("carry")
def carry(checker: Checker, node: Node) -> Known:
    arity(node, 1)
    init = _loop_of(checker, node).args[1]
    if type(node.args[0]) is not int or not 0 <= node.args[0] < len(init):
        raise BadArgument("the loop carries no such value")
    return Known(checker.spec(init[node.args[0]].id), checker.moment(init))


@handles("turn")
def turn(checker: Checker, node: Node) -> Known:
    arity(node, 0)
    _loop_of(checker, node)
    return Known(TensorSpec((), "int64"), checker.moment(()))


@handles("end_loop")
def end_loop(checker: Checker, node: Node) -> Known:
    arity(node, 4)
    start, outs, keep, each = node.args
    if not isinstance(start, Ref) or checker.nodes[start.id].op != "loop":
        raise InvalidGraph("end_loop ends a loop")
    if start.id in checker.ended:
        raise InvalidGraph("a loop has one end")
    count, init = checker.nodes[start.id].args
    if not isinstance(outs, tuple) or not isinstance(each, tuple) or len(outs) != len(init):
        raise BadArgument("a loop's body gives as many values as it carries")
    if keep is not None:
        spec = checker.tensor(keep)
        if each:
            raise BadArgument("a loop that may end early can't stack what its turns give")
        if isinstance(spec, TensorSpec) and spec.numel != 1:
            raise BadArgument("a loop goes on by one value; reduce it with .any() or .all()")
    for before, after in zip(init, outs, strict=True):
        _steady(checker.spec(before.id), checker.tensor(after))
    stacked = tuple(_stacked(checker.tensor(value), count) for value in each)
    body = [checker.known[other.id] for other in checker.nodes if start.id in checker.scope[other.id]]
    spec = (*(checker.tensor(value) for value in outs), *stacked)
    checker.ended.add(start.id)
    return Known(
        spec,
        checker.moment(node.args),
        bytes=sum(map(nbytes, spec)),
        peak=sum(known.bytes + known.peak for known in body),
        flops=(count - 1) * sum(known.flops for known in body) + count * len(body) * TURN_FLOPS,
    )


def _steady(before: Spec, after: Spec) -> None:
    if isinstance(before, TensorSpec) and isinstance(after, TensorSpec) and before != after:
        raise ShapeMismatch(
            f"a loop carries {before.dtype}{list(before.shape)} in and {after.dtype}{list(after.shape)} out; "
            "they must be alike"
        )


def _stacked(spec: Spec, count: int) -> Spec:
    return TensorSpec((count, *spec.shape), spec.dtype) if isinstance(spec, TensorSpec) else UNKNOWN


@handles("backward")
def backward(checker: Checker, node: Node) -> Known:
    arity(node, 1)
    spec = checker.tensor(node.args[0])
    if checker.run(node.run).kind == "generate":
        raise BadArgument("gradients are taken in a trace; a generation has none")
    if isinstance(spec, TensorSpec) and (spec.numel != 1 or spec.dtype not in FLOATING):
        raise BadArgument(f"backward starts from one floating-point number, not {spec.dtype}{list(spec.shape)}")
    checker.gradients = True
    return Known(None, checker.moment(node.args))


@handles("grad")
def grad(checker: Checker, node: Node) -> Known:
    arity(node, 2)
    spec, moment = _gradient(checker, node)
    checker.upstream[node.id] = frozenset({node.run})
    return Known(spec, moment, bytes=nbytes(spec))


@handles("set_grad")
def set_grad(checker: Checker, node: Node) -> Known:
    arity(node, 5)
    spec, moment = _gradient(checker, node)
    place(checker, spec, *node.args[2:])
    return Known(None, moment, bytes=nbytes(spec))


def _gradient(checker: Checker, node: Node) -> tuple[Spec, tuple[int, int, int]]:
    target, back = node.args[:2]
    if not isinstance(back, Ref) or checker.nodes[back.id].op != "backward":
        raise InvalidGraph(f"{node.op} belongs to a backward")
    spec = checker.tensor(target)
    if isinstance(spec, TensorSpec) and spec.dtype not in FLOATING:
        raise BadArgument(f"a value of {spec.dtype} has no gradient")
    if checker.known[target.id].moment > checker.known[back.id].moment:
        raise BadArgument("the loss comes before this value in the forward, so it has no gradient there")
    return spec, checker.known[back.id].moment


@handles("alive")
def alive(checker: Checker, node: Node) -> Known:
    arity(node, 1)
    (step,) = node.args
    if checker.run(node.run).kind != "generate":
        raise BadArgument("rows end in generate; a trace has one forward")
    body = next((checker.nodes[at] for at in checker.scope[node.id] if checker.nodes[at].op == "steps"), None)
    if type(step) is not int or step < 0 or (body is not None and step):
        raise BadArgument("a step is a whole number from 0, and 0 in a body of steps")
    rows = sizes(checker, node).rows
    spec = UNKNOWN if rows is None else TensorSpec((rows,), "bool")
    return Known(spec, (node.run, step if body is None else body.args[0], -1))


@handles("tokens")
def tokens(checker: Checker, node: Node) -> Known:
    arity(node, 0)
    run = checker.run(node.run)
    if run.kind != "generate":
        raise BadArgument("only a generation makes tokens")
    bound = TensorSpec((run.rows, run.longest + new_tokens(run)), "int64")
    return Known(UNKNOWN, (node.run, LATE, LATE), bytes=bound.nbytes)
