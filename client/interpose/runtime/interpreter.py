"""One job's graph while it runs: values come, nodes that waited for them run, values nobody needs go."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import (
    BadArgument,
    InternalError,
    InterposeError,
    JobCancelled,
    NotReached,
    OpFailed,
    ShapeMismatch,
    WrongOrder,
)
from ..graph import ops
from ..graph.checker import HANDLERS as CHECKED
from ..graph.checker import Known, nbytes
from ..graph.limits import Limits
from ..graph.manifest import Manifest
from ..graph.model import Node
from ..graph.values import TensorSpec, substitute
from . import kernels, nests
from .calls import called, check_call
from .gradients import Gradients
from .held import Held, compact
from .hooks import no_hooks
from .plan import ACCESSES, GIVEN, MOMENTS, Plan
from .rows import Span
from .slots import RunValues, Touched, assign


class Sink(Protocol):
    """Where a job's values go, and what stops it. Called on the engine's thread."""

    def save(self, node: int, value: Any) -> None:
        """A saved value, final: a nest of tensors and plain scalars that nothing changes any more."""

    def log(self, node: int, text: str) -> None:
        """A line the user asked to see."""

    def tokens(self, run: int, step: int, ids: Sequence[int | None]) -> None:
        """The new token of each row of a generation; None where a row had ended. Asked for by `stream`."""

    def cancelled(self) -> bool:
        """Whether to give up; asked before every node. May raise the error to end with."""


@dataclass(frozen=True, slots=True)
class World:
    """What a graph may reach of the model."""

    modules: Mapping[str, nn.Module]
    device: torch.device
    manifest: Manifest


class _Skipped:
    """The value of a node in a branch that wasn't taken."""


SKIPPED = _Skipped()

MOST_TOLD = 16
"""Items of one nest that a log line shows."""


class Interpreter:
    """Executes the nodes of one job. After `fail` it ignores everything."""

    def __init__(
        self,
        plan: Plan,
        known: Sequence[Known],
        attachments: Mapping[str, torch.Tensor],
        sink: Sink,
        limits: Limits,
        world: World,
        saved: set[int],
        seeds: dict[tuple[int, int], int],
        *,
        exclusive: bool = False,
    ) -> None:
        self.plan = plan
        self.nodes = plan.graph.nodes
        self.known = known
        self.attachments = attachments
        self.sink = sink
        self.limits = limits
        self.world = world
        self.saved = saved
        self.seeds = seeds
        self.exclusive = exclusive
        self.error: InterposeError | None = None
        self.doubtful = False
        self.result_bytes = 0
        self.flops = 0
        self.held = Held(limits)
        self.gradients = Gradients(self)
        self._values: dict[int, Any] = {}
        self._waits = list(map(len, plan.needs))
        self._uses = [len(users) for users in plan.users]
        self._ready: list[int] = []
        self._kept = _kept(plan)
        self._lists: dict[int, list[Any]] = {}

    def begin(self) -> None:
        """Run what needs nothing from the model."""
        with self.guard():
            for node in self.nodes:
                if node.id in self.plan.live and not self._waits[node.id] and self._free(node):
                    heapq.heappush(self._ready, node.id)
            self._drain()

    def begin_step(self, run: int, step: int) -> None:
        """Make the bodies of "steps" that hold this step ready to run once more."""
        for control in self.plan.active(run, step):
            body = self.plan.templates[control]
            inside = {node.id for node in body}
            for node in body:
                self._let_go(node.id)
                needed = self.plan.needs[node.id]
                self._waits[node.id] = sum(ref in inside or ref not in self._values for ref in needed)
                self._uses[node.id] = len(self.plan.users[node.id])
            with self.guard():
                for node in body:
                    if not self._waits[node.id] and self._startable(node):
                        heapq.heappush(self._ready, node.id)
                self._drain()

    def end_run(self, run: int) -> None:
        """Hand out what was gathered over the steps of a run."""
        with self.guard():
            for node in self.plan.nodes("save"):
                if node.run == run and self.plan.template_of(node.id) is not None and self.error is None:
                    self._emit(node, self._lists.pop(node.id, []))

    def go_on(self) -> None:
        """Run what became ready while it couldn't run."""
        self._drain()

    def provide(self, node: int, value: Any, only: frozenset[int] | None = None) -> None:
        """A value exists: run everything that waited for it alone; with `only`, what isn't in it stays ready."""
        self._give(node, value)
        self._drain(only)

    def fire(self, nodes: Sequence[Node], touched: Touched, span: Span, invokes: Sequence[Span]) -> None:
        """Serve this job's reads and writes at one moment, in the user's order."""
        with self.guard():
            self._check_wanted()
            values = RunValues(touched, span)
            whole = Span.whole(span.rows, span.length, span.keys)
            views = [whole if node.invoke is None else invokes[node.invoke] for node in nodes]
            for node, view in zip(nodes, views, strict=True):
                if node.op == "read" and node.id in self.plan.gradients and not self.skips(node):
                    # Before any read, so that all who read here are seen by the gradient.
                    assert node.point is not None
                    values.watch(node.point.path, view)
            for node, view in zip(nodes, views, strict=True):
                self._access(node, values, view)
            values.finish()

    def guard(self) -> _Guard:
        """A context that turns whatever is raised inside into this job's failure."""
        return _Guard(self)

    def fail(self, error: InterposeError) -> None:
        if self.error is None:
            self.error = error
        self._values.clear()
        self._ready.clear()

    def doubt(self) -> None:
        """What came of sharing a forward can't be told from another job's doing: to be run again alone."""
        self.doubtful = True
        self.fail(InternalError("its part of a shared backward can't be told"))

    def arguments(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Arguments with references replaced by values."""
        return tuple([substitute(arg, self._values.__getitem__) for arg in args])

    def waits(self, node: Node) -> bool:
        return self._waits[node.id] > 0

    def release(self, node: Node) -> None:
        """A node has run: let go of the values that only it still needed."""
        for ref in self.plan.needs[node.id]:
            self._uses[ref] -= 1
            if not self._uses[ref] and ref not in self._kept:
                self._let_go(ref)

    def _let_go(self, node: int) -> None:
        value = self._values.pop(node, None)
        if value is not None and self._unknown(node):
            self.held.drop(value)

    def _unknown(self, node: int) -> bool:
        """Whether no shape told the size of a node's value, so that it is counted while it lives."""
        return self.known[node].spec is ops.UNKNOWN

    # -- the model's moments -----------------------------------------------------------------------------------

    def _access(self, node: Node, values: RunValues, view: Span) -> None:
        assert node.point is not None
        if self._values.get(node.id) is SKIPPED or self.skips(node):
            return
        try:
            if self._waits[node.id]:
                raise WrongOrder("what this needs exists only later in the forward")
            if node.op == "write":
                chain, index, new = self.arguments(node.args)
                values.write(node.point.path, view, chain, index, new)
                self.release(node)
                return
            value = self._read(node, values, view)
        except Exception as error:
            raise located(error, node) from error
        self.provide(node.id, value)

    def _read(self, node: Node, values: RunValues, view: Span) -> Any:
        assert node.point is not None
        if node.id in self.plan.gradients:
            tensor, part, shared = values.watch(node.point.path, view)
            self.gradients.watch(node.id, tensor, part, shared=shared)
        value = values.read(node.point.path, view)
        spec = self.known[node.id].spec
        if isinstance(spec, TensorSpec) and tuple(value.shape) != spec.shape:
            raise ShapeMismatch(f"the value has shape {list(value.shape)}, where {list(spec.shape)} was measured")
        return value

    def skips(self, node: Node) -> bool:
        """Whether a node lies in a branch that wasn't taken."""
        return any(self._values.get(control) is False for control in self.plan.scope[node.id])

    # -- running nodes -----------------------------------------------------------------------------------------

    def _free(self, node: Node) -> bool:
        """Whether a node without needs may run at the start, and somebody will use it."""
        idle = node.op in ("attachment", "param") and not self.plan.users[node.id]
        return not idle and self.plan.template_of(node.id) is None and self._startable(node)

    def _startable(self, node: Node) -> bool:
        """Whether a node runs as soon as its needs are there: not at the model's moments, not in a loop's turn."""
        return node.op not in MOMENTS and node.id not in self.plan.looped

    def _give(self, node: int, value: Any) -> None:
        users = self.plan.users[node]
        if users:
            self._values[node] = value
            if self._unknown(node):
                self.held.add(value)
        for user in users:
            self._waits[user] -= 1
            if not self._waits[user] and self._startable(self.nodes[user]):
                heapq.heappush(self._ready, user)

    def _check_wanted(self) -> None:
        """Raises JobCancelled, or the sink's own error, if the job is to end here."""
        if self.sink.cancelled():
            raise JobCancelled("cancelled while running")

    def _drain(self, only: frozenset[int] | None = None) -> None:
        later = []
        while self._ready:
            # A graph may compute for hours without coming to another hook point.
            self._check_wanted()
            node = self.nodes[heapq.heappop(self._ready)]
            if only is not None and node.id not in only:
                later.append(node.id)
                continue
            try:
                value = self._pass(node) if self.skips(node) else self._run(node)
            except Exception as error:
                raise located(error, node) from error
            self.release(node)
            self._give(node.id, value)
        for ready in later:
            heapq.heappush(self._ready, ready)

    def _pass(self, node: Node) -> _Skipped:
        """What a node of a branch that wasn't taken comes to: a save once a step keeps the step's place."""
        if node.op == "save" and self.plan.template_of(node.id) is not None:
            self._lists.setdefault(node.id, []).append(None)
        return SKIPPED

    def _run(self, node: Node) -> Any:
        handler = HANDLERS.get(node.op)
        value: Any
        if node.op == "end_loop":
            value = self._loop(node, self._values.__getitem__)
        elif handler is not None:
            value = handler(self, node, self.arguments(node.args))
        else:
            value = self.compute(node, self._values.__getitem__)
        if node.id in self.plan.gradients:
            value = self.gradients.watch_value(node.id, value)
        return value

    def compute(self, node: Node, look: Callable[[int], Any]) -> Any:
        """The result of a node of the op table."""
        args = tuple([substitute(arg, look) for arg in node.args])
        kwargs = {name: substitute(arg, look) for name, arg in node.kwargs.items()}
        if self._unknown(node.id):
            self._bound(node, args, kwargs)
        return kernels.execute(node.op, args, kwargs, device=self.world.device)

    def _bound(self, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check an op whose size no shape told in advance, now that its inputs are here."""
        cost = ops.cost(node.op, described(args), {name: described(arg) for name, arg in kwargs.items()})
        if cost is not None:
            self._afford(cost.peak_bytes, cost.flops)

    def _afford(self, peak_bytes: int, flops: int) -> None:
        """Raises LimitExceeded if there is no room for so much more beside what is held."""
        self.flops += flops
        self.limits.check("memory_bytes", self.held.bytes + peak_bytes)
        self.limits.check("flops", self.flops)

    def save(self, node: Node, args: tuple[Any, ...]) -> None:
        value = nests.transform(args[0], lambda tensor: compact(tensor.detach()))
        self.result_bytes += sum(tensor.nbytes for _, tensor in nests.tensors(value))
        self.limits.check("result_bytes", self.result_bytes)
        if self.plan.template_of(node.id) is None:
            self._emit(node, value)
        else:
            self._lists.setdefault(node.id, []).append(value)

    def _emit(self, node: Node, value: Any) -> None:
        if node.id not in self.saved:
            self.saved.add(node.id)
            self.sink.save(node.id, value)

    def tell(self, node: Node, args: tuple[Any, ...]) -> None:
        # A job that has to be run again says nothing twice; in a body of steps it may say something new.
        if node.id not in self.saved or self.plan.template_of(node.id) is not None:
            self.saved.add(node.id)
            self.sink.log(node.id, " ".join(map(_told, args)))

    def attachment(self, node: Node, args: tuple[Any, ...]) -> torch.Tensor:
        return self.attachments[args[0]].to(self.world.device)

    def param(self, node: Node, args: tuple[Any, ...]) -> torch.Tensor:
        path, name = args
        return self.world.modules[path].get_parameter(name).detach()

    def call(self, node: Node, args: tuple[Any, ...]) -> torch.Tensor:
        path, value = args
        check_call(self.world.manifest, self.world.modules[path], path, value, self.limits)
        if self._unknown(node.id) and isinstance(value, torch.Tensor):
            spec, flops = called(self.world.manifest, path, described(value))
            self._afford(5 * nbytes(spec), flops)
        with no_hooks():
            output = self.world.modules[path](value)
        if not isinstance(output, torch.Tensor):
            raise BadArgument(f"{path} returns no single tensor, so it can't be called on a value")
        return output

    def update(self, node: Node, args: tuple[Any, ...]) -> torch.Tensor:
        base, chain, index, value = args
        if self._unknown(node.id):
            self._afford(base.nbytes, 0)
        fresh: torch.Tensor = base.clone()
        assign(fresh, chain, index, value)
        return fresh

    def branch(self, node: Node, args: tuple[Any, ...]) -> bool:
        """Whether the body runs; if not, everything in it is skipped."""
        pred, wanted = args
        taken = truth(pred) is wanted
        if not taken:
            for other in self.plan.moments_within.get(node.id, ()):
                self._give(other, SKIPPED)
        return taken

    def choose(self, node: Node, args: tuple[Any, ...]) -> Any:
        then, _, one, two = args
        return one if then else two

    def _loop(self, end: Node, look: Callable[[int], Any]) -> tuple[Any, ...]:
        """Run a loop to its end, turn by turn, in a scope of its own."""
        start, outs, keep, each = end.args
        count, init = self.nodes[start.id].args
        carried = [look(ref.id) for ref in init]
        gathered: list[list[Any]] = [[] for _ in each]
        for turn in range(count):
            self._check_wanted()
            inside = self._turn(start.id, carried, turn, look)

            def seen(ref: int, inside: dict[int, Any] = inside) -> Any:
                return inside[ref] if ref in inside else look(ref)

            if keep is not None and not truth(seen(keep.id)):
                break
            carried = [seen(ref.id) for ref in outs]
            for values, ref in zip(gathered, each, strict=True):
                values.append(compact(seen(ref.id)))
                if self._unknown(ref.id):
                    self.held.add(values[-1])
            self._drop_turn(inside)
        for values, ref in zip(gathered, each, strict=True):
            if self._unknown(ref.id):
                self._afford(sum(value.nbytes for value in values), 0)
                self.held.drop(values)
        return (*carried, *map(torch.stack, gathered))

    def _drop_turn(self, inside: Mapping[int, Any]) -> None:
        for node, value in inside.items():
            if self._unknown(node):
                self.held.drop(value)

    def _turn(self, loop: int, carried: Sequence[Any], turn: int, look: Callable[[int], Any]) -> dict[int, Any]:
        """The values of one turn of a loop's body."""
        inside: dict[int, Any] = {}

        def seen(ref: int) -> Any:
            return inside[ref] if ref in inside else look(ref)

        for node in self.plan.bodies.get(loop, ()):
            try:
                if node.op == "carry":
                    inside[node.id] = carried[node.args[0]]
                elif node.op == "turn":
                    inside[node.id] = torch.tensor(turn, device=self.world.device)
                elif node.op == "end_loop":
                    inside[node.id] = self._loop(node, seen)
                elif node.op == "loop":
                    continue
                elif node.op in HANDLERS:
                    args = tuple(substitute(arg, seen) for arg in node.args)
                    inside[node.id] = HANDLERS[node.op](self, node, args)
                else:
                    inside[node.id] = self.compute(node, seen)
                if self._unknown(node.id):
                    self.held.add(inside[node.id])
            except Exception as error:
                raise located(error, node) from error
        return inside

    def backward(self, node: Node, args: tuple[Any, ...]) -> None:
        self.gradients.ask(node, args[0])

    def nothing(self, node: Node, args: tuple[Any, ...]) -> None:
        """Control nodes do nothing themselves."""


HANDLERS: Mapping[str, Callable[[Interpreter, Node, tuple[Any, ...]], Any]] = {
    "save": Interpreter.save,
    "tell": Interpreter.tell,
    "attachment": Interpreter.attachment,
    "param": Interpreter.param,
    "call": Interpreter.call,
    "update": Interpreter.update,
    "steps": Interpreter.nothing,
    "branch": Interpreter.branch,
    "choose": Interpreter.choose,
    "loop": Interpreter.nothing,
    "backward": Interpreter.backward,
}
assert set(HANDLERS) | MOMENTS | {"carry", "turn", "end_loop"} == set(CHECKED)
assert GIVEN | ACCESSES < MOMENTS


class _Guard:
    def __init__(self, job: Interpreter) -> None:
        self.job = job

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, InterposeError):
            self.job.fail(error)
        return isinstance(error, InterposeError)


def _kept(plan: Plan) -> frozenset[int]:
    """Values that live to the end: those that a body of steps takes from outside, once a step."""
    return frozenset(ref for body in plan.templates.values() for node in body for ref in plan.needs[node.id])


def truth(value: Any) -> bool:
    """A condition's value. Raises BadArgument if it is more than one."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise BadArgument(f"a condition is one value, not {list(value.shape)}")
        return bool(value.item())
    return bool(value)


def located(error: Exception, node: Node) -> Exception:
    """The error as one of ours that names the node; torch's own become OpFailed with their first line."""
    if isinstance(error, InterposeError):
        return error.at(node.id, node.op, node.source)
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)):
        return error
    reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
    return OpFailed(reason, node=node.id, op=node.op, source=node.source)


def unreached(node: Node) -> NotReached:
    """The error of a node whose point the forward never came to."""
    return NotReached(f"this forward never came to {node.point}", node=node.id, op=node.op, source=node.source)


def described(value: Any) -> Any:
    """Arguments with every tensor replaced by its shape and dtype."""
    if isinstance(value, torch.Tensor):
        return TensorSpec(tuple(value.shape), kernels.dtype_name(value.dtype))
    if isinstance(value, (tuple, list)):
        return type(value)(described(item) for item in value)
    return value


def _told(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return repr(value.detach().cpu()) if value.numel() <= 64 else f"tensor{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_told(value[key])}' for key in islice(value, MOST_TOLD))}}}"
    if isinstance(value, (tuple, list)):
        more = ", ..." if len(value) > MOST_TOLD else ""
        return f"({', '.join(map(_told, value[:MOST_TOLD]))}{more})"
    return str(value)
