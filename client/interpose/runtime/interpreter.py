"""One job's graph while it runs: values come, nodes that waited for them run, values nobody needs go."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InternalError, InterposeError, JobCancelled, NotReached, ShapeMismatch, WrongOrder
from ..graph import ops
from ..graph.checker import Known
from ..graph.limits import Limits
from ..graph.manifest import Leaf
from ..graph.model import Node
from ..graph.specs import FLOATING
from ..graph.values import TensorSpec, substitute
from . import kernels
from .absences import Absences
from .adapters import chosen
from .failures import Guard, located
from .gradients import Gradients
from .handlers import HANDLERS
from .held import Held
from .indices import check_written
from .loops import run_loop
from .plan import Plan
from .products import Products
from .rows import Span
from .saving import Saves
from .sink import Sink
from .skipped import ABSENT, LATER, SKIPPED, NoValue
from .slots import RunValues, Touched
from .spent import Spent
from .world import World

if TYPE_CHECKING:
    from .split.away import Away


LATE = "what this needs exists only later in the forward"

TOO_LATE = (
    "this model's blocks lie on several shards: what a backward, or a module that holds blocks, makes of a block's "
    "values can be written, or decide, from the next block on"
)


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
        own: Plan | None = None,
        site: int = 0,
    ) -> None:
        self.plan = plan
        self.own = own or plan
        """What of the plan runs here; the rest does at other sites."""
        self.posted: list[tuple[int, Any, tuple[bool, Any]]] = []
        """(node, value, what of it is absent), for other sites."""
        self.nodes = plan.graph.nodes
        self.known = known
        self.attachments = attachments
        self.sink = sink
        self.saves = Saves(self.own, sink, limits, saved)
        self.limits = limits
        self.world = world
        self.seeds = seeds
        self.exclusive = exclusive
        self.error: InterposeError | None = None
        self.doubtful = False
        self.narrowed: frozenset[int] = frozenset()
        """Reads that are given the last position alone."""
        self.spent = Spent(limits, site)
        self.held = Held(limits)
        self.gradients = Gradients(self)
        self.away: Away | None = None
        """What of it runs on shards, where the model is split."""
        self.products: Products | None = None
        """Where layers called on values wait for other jobs' calls, while a forward is shared."""
        self.absences = Absences()
        self._values: dict[int, Any] = {}
        self._waits = list(map(len, plan.needs))
        self._uses = [len(users) for users in self.own.users]
        self._ready: list[int] = []
        self._stepping: set[int] = set()
        """The bodies of steps whose turn has come."""

    def begin(self) -> None:
        """Run what needs nothing from the model."""
        with self.guard():
            self._ready = [*self.own.first]
            self._drain()
            if self.away is not None:
                self.away.begin()

    def arrived(self, node: int, value: Any, marks: tuple[bool, Any], only: frozenset[int] | None = None) -> None:
        """The value of a node that another site ran; with `only`, what isn't in it stays ready."""
        with self.guard():
            if self.error is not None or not self.own.users[node]:
                return
            self.absences.mark(node, marks)
            branch = self.nodes[node]
            if branch.op == "branch" and value is not True:
                self.pass_over(branch, SKIPPED if value is False else value)
            self.provide(node, value, only)

    def begin_step(self, run: int, step: int, ended: Sequence[bool]) -> None:
        """Make the bodies of "steps" that hold this step ready to run once more; `ended` is of the run's rows."""
        self.absences.begin_step(run, ended)
        for control in self.own.active(run, step):
            self._stepping.add(control)
            body = self.own.templates[control]
            inside = {node.id for node in self.plan.templates[control]}
            for ref in inside:
                self._let_go(ref)
                self._uses[ref] = len(self.own.users[ref])
            for node in body:
                needed = self.plan.needs[node.id]
                self._waits[node.id] = sum(ref in inside or ref not in self._values for ref in needed)
            with self.guard():
                for node in body:
                    if not self._waits[node.id] and self.own.startable(node):
                        heapq.heappush(self._ready, node.id)
                self._drain()
        for node in self.own.alive(run, step):
            with self.guard():
                if self.error is None:
                    own = torch.tensor(ended, device=self.world.device)[self._rows(node)]
                    self.provide(node.id, ~own)

    def _rows(self, node: Node) -> slice:
        """The rows of its run that a node is about."""
        if node.invoke is None:
            return slice(None)
        counts = [len(invoke.rows) for invoke in self.plan.graph.runs[node.run].invokes]
        first = sum(counts[: node.invoke])
        return slice(first, first + counts[node.invoke])

    def end_run(self, run: int) -> None:
        """Hand out what was gathered over the steps of a run."""
        with self.guard():
            if self.error is None:
                self.saves.end_run(run)
                if self.away is not None:
                    self.away.end_run(run)

    def go_on(self) -> None:
        """Run what became ready while it couldn't run."""
        self._drain()

    def provide(self, node: int, value: Any, only: frozenset[int] | None = None) -> None:
        """A value exists: run everything that waited for it alone; with `only`, what isn't in it stays ready."""
        self.give(node, value)
        self._drain(only)

    def fire(self, nodes: Sequence[Node], touched: Touched, span: Span, invokes: Sequence[Span]) -> None:
        """Serve this job's reads and writes at one moment, in the user's order."""
        with self.guard():
            self.check_wanted()
            values = RunValues(touched, span)
            views = [values.itself if node.invoke is None else invokes[node.invoke] for node in nodes]
            for node, view in zip(nodes, views, strict=True) if self.plan.gradients else ():
                if node.op == "read" and node.id in self.plan.gradients and not self.skips(node):
                    # Before any read, so that all who read here are seen by the gradient.
                    assert node.point is not None
                    values.watch(node.point.path, view)
            for node, view in zip(nodes, views, strict=True):
                self._access(node, values, view)
            values.finish()

    def settle(self, node: Node, value: Any) -> None:
        """The value of a node that had to wait for others' calls; what waited for it runs."""
        with self.guard():
            if self.error is not None:
                return
            try:
                value = self._followed(node, value)
            except Exception as error:
                raise located(error, node) from error
            self.release(node)
            self.provide(node.id, value)

    def guard(self) -> Guard:
        """A context that turns whatever is raised inside into this job's failure."""
        return Guard(self)

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

    def adapter(self, node: Node) -> AbstractContextManager[None]:
        """A context in which the model is as the node's run has chosen it, whichever run it is computed in."""
        return chosen(self.world.adapters, self.choice(node))

    def choice(self, node: Node) -> str | None:
        """The adapter that the node's run has chosen."""
        return self.plan.graph.runs[node.run].adapter

    def waits(self, node: Node) -> bool:
        return self._waits[node.id] > 0

    def release(self, node: Node) -> None:
        """A node has run: let go of the values that only it still needed."""
        for ref in self.plan.needs[node.id]:
            self._uses[ref] -= 1
            if not self._uses[ref] and ref not in self.own.kept:
                self._let_go(ref)

    def _let_go(self, node: int) -> None:
        value = self._values.pop(node, None)
        self.absences.forget(node)
        if value is not None and self.unknown(node):
            self.held.drop(value)

    def unknown(self, node: int) -> bool:
        """Whether no shape told the size of a node's value, so that it is counted while it lives."""
        return self.known[node].spec is ops.UNKNOWN

    # -- the model's moments -----------------------------------------------------------------------------------

    def _access(self, node: Node, values: RunValues, view: Span) -> None:
        assert node.point is not None
        if isinstance(self._values.get(node.id), NoValue) or self.skips(node):
            return
        try:
            if self._waits[node.id]:
                raise WrongOrder(LATE if self.own is self.plan else TOO_LATE)
            if node.op == "write":
                self._write(node, values, view)
                self.release(node)
                return
            value = self._read(node, values, view)
        except Exception as error:
            raise located(error, node) from error
        self.provide(node.id, value)

    def _write(self, node: Node, values: RunValues, view: Span) -> None:
        assert node.point is not None
        if self.absences.over(node.run, view):
            return
        if self.lacks(node):
            raise NotReached("what is written comes from a prompt that has ended by this step")
        chain, index, new = self.arguments(node.args)
        path = node.point.path
        layout = values.layout(path)
        counts = isinstance(layout, Leaf) and layout.dtype not in FLOATING
        if not counts and not self.absences.concerns(node.args):
            values.write(path, view, chain, index, new)
            return
        before = values.read(path, view)
        values.write(path, view, chain, index, new)
        after = values.read(path, view)
        self.absences.check_written(node, layout, view, before, after)
        check_written(self.world.modules, node.point, before, after)

    def _read(self, node: Node, values: RunValues, view: Span) -> Any:
        assert node.point is not None
        if node.id in self.plan.gradients:
            tensor, part, shared = values.watch(node.point.path, view)
            self.gradients.watch(node.id, tensor, part, shared=shared)
        value = values.read(node.point.path, view)
        spec = self.known[node.id].spec
        if isinstance(spec, TensorSpec) and tuple(value.shape) != spec.shape and node.id not in self.narrowed:
            raise ShapeMismatch(f"the value has shape {list(value.shape)}, where {list(spec.shape)} was measured")
        return self.absences.read(node, values.layout(node.point.path), view, value)

    def skips(self, node: Node) -> bool:
        """Whether a node lies in a branch that wasn't taken."""
        scope = self.plan.scope[node.id]
        return bool(scope) and any(self._values.get(control) is False for control in scope)

    def lacks(self, node: Node) -> bool:
        """Whether a node needs what is absent."""
        look = self._values.get
        return any(look(ref) is ABSENT for ref in self.plan.needs[node.id])

    # -- running nodes -----------------------------------------------------------------------------------------

    def give(self, node: int, value: Any) -> None:
        if node in self.own.sent:
            self.posted.append((node, value, self.absences.marks(node)))
        users = self.own.users[node]
        if users:
            self._values[node] = value
            if self.unknown(node):
                self.held.add(value)
        for user in users:
            self._waits[user] -= 1
            if not self._waits[user] and self.own.startable(self.nodes[user]) and self._due(user):
                heapq.heappush(self._ready, user)

    def _due(self, node: int) -> bool:
        """Whether it is a node's turn: those of a body of steps have theirs at each step."""
        body = self.plan.template_of(node)
        return body is None or body in self._stepping

    def check_wanted(self) -> None:
        """Raises JobCancelled, or the sink's own error, if the job is to end here."""
        if self.sink.cancelled():
            raise JobCancelled("cancelled while running")

    def _drain(self, only: frozenset[int] | None = None) -> None:
        later = []
        while self._ready:
            # A graph may compute for hours without coming to another hook point.
            self.check_wanted()
            node = self.nodes[heapq.heappop(self._ready)]
            if only is not None and node.id not in only:
                later.append(node.id)
                continue
            try:
                value = self._run(node)
            except Exception as error:
                raise located(error, node) from error
            if value is not LATER:
                self.release(node)
                self.give(node.id, value)
        for ready in later:
            heapq.heappush(self._ready, ready)

    def _run(self, node: Node) -> Any:
        absent = self.lacks(node)
        if absent or self.skips(node):
            return self._pass(node, ABSENT if absent else SKIPPED)
        look = self._values.__getitem__
        value = self.execute(node, look)
        return value if value is LATER else self._followed(node, value)

    def _followed(self, node: Node, value: Any) -> Any:
        """A node's result, with what is to be noted of it."""
        value = self.absences.follow(node, value, self._values.__getitem__)
        return self.gradients.watch_value(node.id, value) if node.id in self.plan.gradients else value

    def _pass(self, node: Node, value: NoValue) -> NoValue:
        """What a node comes to that lies in a branch not taken, or needs what is absent."""
        if node.op == "save":
            self.saves.skip(node)
        if node.op == "branch":
            self.pass_over(node, value)
        return value

    def pass_over(self, branch: Node, value: NoValue) -> None:
        """Let nothing wait for the moments of a body that won't run."""
        for other in self.own.moments_within.get(branch.id, ()):
            self.give(other, value)

    def execute(self, node: Node, look: Callable[[int], Any]) -> Any:
        """The result of a node; `look` gives the values it refers to."""
        if node.op == "end_loop":
            return run_loop(self, node, look)
        handler = HANDLERS.get(node.op)
        if handler is None:
            return self._compute(node, look)
        return handler(self, node, tuple([substitute(arg, look) for arg in node.args]))

    def _compute(self, node: Node, look: Callable[[int], Any]) -> Any:
        """The result of a node of the op table."""
        args = tuple([substitute(arg, look) for arg in node.args])
        kwargs = {name: substitute(arg, look) for name, arg in node.kwargs.items()}
        if self.unknown(node.id):
            self._bound(node, args, kwargs)
        return kernels.execute(node.op, args, kwargs, device=self.world.device)

    def _bound(self, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check an op whose size no shape told in advance, now that its inputs are here."""
        cost = ops.cost(
            node.op, kernels.described(args), {name: kernels.described(arg) for name, arg in kwargs.items()}
        )
        if cost is not None:
            self.afford(cost.peak_bytes, cost.flops)

    def afford(self, peak_bytes: int, flops: int) -> None:
        """Raises LimitExceeded if there is no room for so much more beside what is held."""
        self.limits.check("memory_bytes", self.held.bytes + peak_bytes)
        self.spent.add(flops)
