"""One job's graph while it runs: values come, nodes that waited for them run, values nobody needs go."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .. import errors
from ..errors import BadArgument, InterposeError, JobCancelled, OpFailed, WrongOrder
from ..graph import ops
from ..graph.limits import Limits
from ..graph.model import Node
from ..graph.validate import STRUCTURE, Known
from ..graph.values import TensorSpec, refs, substitute
from . import kernels, nests
from .hooks import no_hooks
from .plan import Plan
from .rows import Span
from .slots import RunValues, Touched, assign


class Sink(Protocol):
    """Where a job's values go, and what stops it. Called on the engine's thread."""

    def save(self, node: int, value: Any) -> None:
        """A saved value, final: a nest of tensors and plain scalars that nothing changes any more."""

    def log(self, node: int, text: str) -> None:
        """A line the user asked to see."""

    def cancelled(self) -> bool:
        """Whether to give up; asked at every hook point. May raise the error to end with."""


@dataclass(frozen=True, slots=True)
class World:
    """What a graph may reach of the model."""

    modules: Mapping[str, nn.Module]
    device: torch.device


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
        self.exclusive = exclusive
        self.error: InterposeError | None = None
        self.result_bytes = 0
        self._values: dict[int, Any] = {}
        self._waits = list(plan.waits)
        self._uses = [len(users) for users in plan.users]
        self._ready: list[int] = []

    def begin(self) -> None:
        """Run what needs nothing from the model."""
        with self.guard():
            for node in self.nodes:
                idle = node.op in EFFECT_FREE_STARTS and not self.plan.users[node.id]
                if not self._waits[node.id] and node.point is None and node.op != "attention_mask" and not idle:
                    heapq.heappush(self._ready, node.id)
            self._drain()

    def provide(self, node: int, value: Any) -> None:
        """A value exists: run everything that waited for it alone."""
        self._give(node, value)
        self._drain()

    def fire(self, nodes: Iterable[Node], touched: Touched, span: Span, invokes: Sequence[Span]) -> None:
        """Serve this job's reads and writes at one moment, in the user's order."""
        with self.guard():
            if self.sink.cancelled():
                raise JobCancelled("cancelled while running")
            values = RunValues(touched, span)
            whole = Span(0, span.rows, 0, span.length)
            for node in nodes:
                view = whole if node.invoke is None else invokes[node.invoke]
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

    # -- parts -------------------------------------------------------------------------------------------------

    def _access(self, node: Node, values: RunValues, view: Span) -> None:
        assert node.point is not None
        try:
            if node.op == "read":
                value = values.read(node.point.path, view)
                self._expect(node, value)
            elif self._waits[node.id]:
                raise WrongOrder("what is written here exists only later in the forward")
            else:
                chain, index, new = (substitute(arg, self._values.__getitem__) for arg in node.args)
                values.write(node.point.path, view, chain, index, new)
                self._release(node)
                return
        except Exception as error:
            raise located(error, node) from error
        self.provide(node.id, value)

    def _expect(self, node: Node, value: Any) -> None:
        spec = self.known[node.id].spec
        if isinstance(spec, TensorSpec) and tuple(value.shape) != spec.shape:
            raise errors.ShapeMismatch(
                f"{node.point} has shape {list(value.shape)} here, where {list(spec.shape)} was measured"
            )

    def _give(self, node: int, value: Any) -> None:
        users = self.plan.users[node]
        if users:
            self._values[node] = value
        for user in users:
            self._waits[user] -= 1
            if not self._waits[user] and self.nodes[user].point is None:
                heapq.heappush(self._ready, user)

    def _drain(self) -> None:
        while self._ready:
            node = self.nodes[heapq.heappop(self._ready)]
            try:
                value = self._run(node)
            except Exception as error:
                raise located(error, node) from error
            self._release(node)
            self._give(node.id, value)

    def _run(self, node: Node) -> Any:
        look = self._values.__getitem__
        args = tuple([substitute(arg, look) for arg in node.args])
        handler = HANDLERS.get(node.op)
        if handler is not None:
            return handler(self, node, args)
        kwargs = {name: substitute(arg, look) for name, arg in node.kwargs.items()}
        if self.known[node.id].spec is ops.UNKNOWN:
            self._bound(node, args, kwargs)
        return kernels.execute(node.op, args, kwargs, device=self.world.device)

    def _bound(self, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check an op whose size no shape told in advance, now that its inputs are here."""
        cost = ops.cost(node.op, described(args), {name: described(arg) for name, arg in kwargs.items()})
        if cost is not None:
            self.limits.check("memory_bytes", cost.out_bytes + cost.peak_bytes)
            self.limits.check("flops", cost.flops)

    def _release(self, node: Node) -> None:
        for ref in set(refs((*node.args, *node.kwargs.values()))):
            self._uses[ref] -= 1
            if not self._uses[ref]:
                self._values.pop(ref, None)

    def save(self, node: Node, args: tuple[Any, ...]) -> None:
        value = nests.transform(args[0], torch.Tensor.detach)
        self.result_bytes += sum(tensor.nbytes for _, tensor in nests.tensors(value))
        self.limits.check("result_bytes", self.result_bytes)
        if node.id not in self.saved:
            self.saved.add(node.id)
            self.sink.save(node.id, value)

    def log(self, node: Node, args: tuple[Any, ...]) -> None:
        self.sink.log(node.id, " ".join(map(_told, args)))

    def attachment(self, node: Node, args: tuple[Any, ...]) -> torch.Tensor:
        return self.attachments[args[0]].to(self.world.device)

    def param(self, node: Node, args: tuple[Any, ...]) -> torch.Tensor:
        path, name = args
        return self.world.modules[path].get_parameter(name).detach()

    def call(self, node: Node, args: tuple[Any, ...]) -> torch.Tensor:
        path, value = args
        with no_hooks():
            output = self.world.modules[path](value)
        if not isinstance(output, torch.Tensor):
            raise BadArgument(f"{path} returns no single tensor, so it can't be called on a value")
        return output

    def update(self, node: Node, args: tuple[Any, ...]) -> torch.Tensor:
        base, chain, index, value = args
        fresh: torch.Tensor = base.clone()
        assign(fresh, chain, index, value)
        return fresh


EFFECT_FREE_STARTS = frozenset({"attachment", "param"})

HANDLERS: Mapping[str, Callable[[Interpreter, Node, tuple[Any, ...]], Any]] = {
    "save": Interpreter.save,
    "log": Interpreter.log,
    "attachment": Interpreter.attachment,
    "param": Interpreter.param,
    "call": Interpreter.call,
    "update": Interpreter.update,
}
assert set(HANDLERS) | {"read", "write", "attention_mask"} == set(STRUCTURE)


class _Guard:
    def __init__(self, job: Interpreter) -> None:
        self.job = job

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, InterposeError):
            self.job.fail(error)
        return isinstance(error, InterposeError)


def located(error: Exception, node: Node) -> Exception:
    """The error as one of ours that names the node; torch's own become OpFailed with their first line."""
    if isinstance(error, InterposeError):
        return error.at(node.id, node.op, node.source)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return error
    reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
    return OpFailed(reason, node=node.id, op=node.op, source=node.source)


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
    return str(value)
