"""A graph compiled for execution: what waits for what, and which nodes run at which moment of which forward."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

from ..graph.manifest import ATTENTION, EVENT
from ..graph.model import Graph, Node, Run
from ..graph.trim import live
from ..graph.values import refs

Place: TypeAlias = tuple[str, str, int]
"""Module path, event, call: where within one forward."""

ACCESSES = frozenset({"read", "write"})
MOMENTS = ACCESSES | {"grad", "set_grad", "attention_mask", "tokens", "alive"}
"""Ops that run when the model comes to their moment, and not when their arguments are there."""

GIVEN = frozenset({"attention_mask", "tokens", "alive"})
"""Ops whose value the engine provides."""


@dataclass(frozen=True)
class Plan:
    """Pure data, so that one plan serves every execution of its graph.

    Attributes:
        needs: node -> the nodes whose values it takes, or that decide over it.
        users: node -> nodes that need it.
        scope: node -> the control nodes whose bodies hold it, outermost first.
        live: ids of the nodes that matter.
        sent: those whose values are needed elsewhere, in a part of a plan whose other parts run there.
    """

    graph: Graph
    needs: tuple[frozenset[int], ...]
    users: tuple[tuple[int, ...], ...]
    scope: tuple[tuple[int, ...], ...]
    live: frozenset[int]
    sent: frozenset[int] = frozenset()

    def of(self, runs: Sequence[Run]) -> Plan:
        """The plan of the same nodes with other prompts of the same lengths; what was found out is shared."""
        for name in _FOUND:
            getattr(self, name)
        plan = copy.copy(self)
        object.__setattr__(plan, "graph", replace(self.graph, runs=tuple(runs)))
        return plan

    def part(self, mine: frozenset[int], sent: frozenset[int]) -> Plan:
        """These nodes alone; what they need of others comes from outside, and `sent` goes there."""
        users = tuple(tuple(user for user in users if user in mine) for users in self.users)
        return Plan(self.graph, self.needs, users, self.scope, mine, sent)

    @cached_property
    def divisions(self) -> dict[int, Any]:
        """How this was divided, kept by those who divide it."""
        return {}

    def nodes(self, *wanted: str) -> Iterator[Node]:
        """The live nodes of some ops, in the user's order."""
        found = [nodes for op in wanted if (nodes := self._by_op.get(op))]
        return iter(found[0]) if len(found) == 1 else heapq.merge(*found, key=_id)

    @cached_property
    def _by_op(self) -> Mapping[str, list[Node]]:
        found: dict[str, list[Node]] = {}
        for node in self.graph.nodes:
            if node.id in self.live:
                found.setdefault(node.op, []).append(node)
        return found

    @cached_property
    def accesses(self) -> Mapping[tuple[int, int], Mapping[Place, tuple[Node, ...]]]:
        """(run, step) -> place -> reads and writes there, in the user's order; those of every step are apart."""
        found: dict[tuple[int, int], dict[Place, list[Node]]] = {}
        for node in self.nodes(*ACCESSES):
            if self.template_of(node.id) is None:
                assert node.point is not None
                found.setdefault((node.run, node.point.step), {}).setdefault(place_of(node), []).append(node)
        return {key: {place: tuple(here) for place, here in places.items()} for key, places in found.items()}

    @cached_property
    def templates(self) -> Mapping[int, tuple[Node, ...]]:
        """Control node of op "steps" -> all nodes of its body, nested ones included."""
        found: dict[int, list[Node]] = {node.id: [] for node in self.graph.nodes if node.op == "steps"}
        for node in self.graph.nodes:
            template = self.template_of(node.id)
            if template is not None and node.id in self.live:
                found[template].append(node)
        return {control: tuple(nodes) for control, nodes in found.items()}

    def template_of(self, node: int) -> int | None:
        """The "steps" node whose body holds a node, if one does."""
        scope = self.scope[node]
        return scope[0] if scope and self.graph.nodes[scope[0]].op == "steps" else None

    def active(self, run: int, step: int) -> list[int]:
        """The "steps" nodes whose bodies run at one step of a run."""
        return [
            control
            for control in self.templates
            if (node := self.graph.nodes[control]).run == run
            and node.args[0] <= step
            and (node.args[1] is None or step < node.args[1])
        ]

    def alive(self, run: int, step: int) -> list[Node]:
        """What asks which rows of a run have not ended at one step."""
        active = self.active(run, step)
        return [
            node
            for node in self.nodes("alive")
            if node.run == run
            and (step_of(node) == step if (body := self.template_of(node.id)) is None else body in active)
        ]

    def at(self, run: int, step: int) -> Mapping[Place, tuple[Node, ...]]:
        """Place -> everything read and written there at one step, in the user's order."""
        own = self.accesses.get((run, step), {})
        active = self.active(run, step)
        if not active:
            return own
        found = {place: list(nodes) for place, nodes in own.items()}
        for control in active:
            for node in self.templates[control]:
                if node.op in ACCESSES:
                    found.setdefault(place_of(node), []).append(node)
        return {place: tuple(sorted(nodes, key=_id)) for place, nodes in found.items()}

    @cached_property
    def first(self) -> tuple[int, ...]:
        """Nodes that need nothing and serve somebody: they run before the model does."""
        return tuple(
            node.id
            for node in self.graph.nodes
            if node.id in self.live
            and not self.needs[node.id]
            and not (node.op in ("attachment", "param") and not self.users[node.id] and node.id not in self.sent)
            and self.template_of(node.id) is None
            and self.startable(node)
        )

    def startable(self, node: Node) -> bool:
        """Whether a node runs as soon as its needs are there: not at the model's moments, not in a loop's turn."""
        return node.op not in MOMENTS and node.id not in self.looped

    @cached_property
    def kept(self) -> frozenset[int]:
        """Values that live to the end: those that a body of steps takes from outside, once a step."""
        return frozenset(ref for body in self.templates.values() for node in body for ref in self.needs[node.id])

    @cached_property
    def late(self) -> frozenset[int]:
        """Calls of modules that no moment of the model's waits for, nor any step: they may come when it is over."""
        early: set[int] = set()
        for node in reversed(self.graph.nodes):
            own = node.op in MOMENTS or node.op == "backward" or self.template_of(node.id) is not None
            if own or node.id in self.looped or not early.isdisjoint(self.users[node.id]):
                early.add(node.id)
        return frozenset(node.id for node in self.nodes("call")) - early

    @cached_property
    def moments_within(self) -> Mapping[int, tuple[int, ...]]:
        """Branch -> the nodes of its body, nested ones included, that run at moments of the model's."""
        found: dict[int, list[int]] = {}
        for node in self.nodes(*MOMENTS):
            for control in self.scope[node.id]:
                found.setdefault(control, []).append(node.id)
        return {control: tuple(nodes) for control, nodes in found.items()}

    @cached_property
    def bodies(self) -> Mapping[int, tuple[Node, ...]]:
        """Control node -> the nodes directly in its body."""
        found: dict[int, list[Node]] = {}
        for node in self.graph.nodes:
            if node.when is not None and node.id in self.live:
                found.setdefault(node.when, []).append(node)
        return {control: tuple(nodes) for control, nodes in found.items()}

    @cached_property
    def looped(self) -> frozenset[int]:
        """Ids of nodes inside loops: their loop runs them."""
        return frozenset(
            node.id
            for node in self.graph.nodes
            if any(self.graph.nodes[control].op == "loop" for control in self.scope[node.id])
        )

    @cached_property
    def gradients(self) -> Mapping[int, Mapping[int, tuple[Node, ...]]]:
        """Watched node -> backward node -> gradient reads and writes there, in the user's order."""
        found: dict[int, dict[int, list[Node]]] = {}
        for node in self.nodes("grad", "set_grad"):
            target, backward = node.args[0].id, node.args[1].id
            found.setdefault(target, {}).setdefault(backward, []).append(node)
        return {target: {back: tuple(nodes) for back, nodes in by.items()} for target, by in found.items()}

    @cached_property
    def backwards(self) -> tuple[int, ...]:
        return tuple(node.id for node in self.nodes("backward"))

    @cached_property
    def upstream(self) -> frozenset[int]:
        """What replaced gradients are computed from: it runs while the backward does."""
        found: set[int] = set()
        for node in reversed(self.graph.nodes):
            if node.op == "set_grad" or node.id in found:
                found |= self.needs[node.id]
        return frozenset(found)

    def flows(self, backward: Node, target: int) -> bool:
        """Whether a backward can come to a read's own prompt: if not, zeros would be all that arrives."""
        node = self.graph.nodes[target]
        if node.op != "read":
            return True
        prompts = self._prompts[backward.id]
        return any(run == node.run and invoke in (None, node.invoke) for run, invoke in prompts) or (
            node.invoke is None and any(run == node.run for run, _ in prompts)
        )

    @cached_property
    def _prompts(self) -> Mapping[int, set[tuple[int, int | None]]]:
        """Backward -> (run, invoke) of every prompt its loss is computed from, by way of writes too."""
        found: dict[int, set[tuple[int, int | None]]] = {}
        for backward in self.backwards:
            prompts: set[tuple[int, int | None]] = set()
            seen, todo = set(), [backward]
            while todo:
                node = self.graph.nodes[todo.pop()]
                seen.add(node.id)
                if node.op == "read" and (node.run, node.invoke) not in prompts:
                    prompts.add((node.run, node.invoke))
                    todo += [
                        write.id
                        for write in self.nodes("write")
                        if write.run == node.run
                        and (None in (write.invoke, node.invoke) or write.invoke == node.invoke)
                    ]
                todo += [ref for ref in self.needs[node.id] if ref not in seen]
            found[backward] = prompts
        return found

    @cached_property
    def last_step(self) -> Mapping[int, int | None]:
        """Run -> the last step anybody asks for; None if that is the end of the generation."""
        found: dict[int, int | None] = dict.fromkeys(range(len(self.graph.runs)), -1)
        for node in self.nodes(*ACCESSES, "tokens", "alive", "save", "tell"):
            template = self.template_of(node.id)
            stop = self.graph.nodes[template].args[1] if template is not None else None
            if node.op == "tokens" or (template is not None and stop is None):
                found[node.run] = None
                continue
            last = stop - 1 if stop is not None else step_of(node)
            known = found[node.run]
            found[node.run] = None if known is None else max(known, last)
        return found

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Runs in groups: those of a group need nothing of one another, only of groups before."""
        return _levels(self.graph)

    def idle(self, run: int) -> bool:
        """Whether a run serves nobody."""
        return run not in self._busy

    @cached_property
    def _busy(self) -> frozenset[int]:
        return frozenset(node.run for node in self.nodes(*ACCESSES, *GIVEN, "steps"))

    def attention(self, run: int) -> bool:
        """Whether a run looks inside attention."""
        return run in self._attentive

    @cached_property
    def _attentive(self) -> frozenset[int]:
        return frozenset(node.run for node in self.nodes(*ACCESSES) if place_of(node)[1] in ATTENTION)


_FOUND = tuple(name for name, made in vars(Plan).items() if isinstance(made, cached_property))
"""What a plan finds out of its nodes alone."""


def place_of(node: Node) -> Place:
    """Where within one forward a read or a write lies."""
    assert node.point is not None
    return node.point.module, EVENT.get(node.point.name, node.point.name), node.point.call


def step_of(node: Node) -> int:
    """The step of a node that lies in no body of steps."""
    if node.op == "alive":
        step: int = node.args[0]
        return step
    return node.point.step if node.point else 0


def _constant(graph: Graph, node: Node) -> bool:
    """Whether a node of a body of steps gives the same at each of them, and is run once for all."""
    body = None if node.when is None else graph.nodes[node.when]
    return node.op in ("param", "attachment") and body is not None and body.op == "steps" and body.when is None


def _taken(node: Node) -> set[int]:
    """The nodes whose values a node takes: what it refers to, and for a gradient only the value it writes."""
    if node.op in ("grad", "set_grad"):
        return set(refs(node.args[2:]))
    return set(node.refs)


def compile_graph(graph: Graph) -> Plan:
    """The plan of a graph, without the nodes that no save, log or write needs."""
    matter = frozenset(live(graph.nodes))
    scope: list[tuple[int, ...]] = []
    needed: list[set[int]] = []
    for node in graph.nodes:
        scope.append(() if node.when is None or _constant(graph, node) else (*scope[node.when], node.when))
        needed.append(_taken(node))
    for node in graph.nodes:
        for control in scope[node.id]:
            # A branch decides over its body; a loop needs beforehand what its body takes from outside.
            if graph.nodes[control].op == "branch":
                needed[node.id].add(control)
        if node.op == "end_loop":
            inside = {other.id for other in graph.nodes if node.args[0].id in scope[other.id]}
            taken = {ref for other in inside for ref in needed[other]}
            needed[node.id] = (needed[node.id] | taken | needed[node.args[0].id]) - inside
    users: list[list[int]] = [[] for _ in graph.nodes]
    for node in graph.nodes:
        if node.id in matter:
            for ref in needed[node.id]:
                users[ref].append(node.id)
    return Plan(graph, tuple(map(frozenset, needed)), tuple(map(tuple, users)), tuple(scope), matter)


def _levels(graph: Graph) -> tuple[tuple[int, ...], ...]:
    """Topological groups of runs. Which runs a value comes from is kept as one bit a run."""
    comes_from: list[int] = []
    wanted = [0] * len(graph.runs)
    for node in graph.nodes:
        # What decides over a node counts like what it takes.
        source = 0 if node.when is None else comes_from[node.when]
        for ref in node.refs:
            source |= comes_from[ref]
        if node.op in MOMENTS:
            wanted[node.run] |= source & ~(1 << node.run)
            source |= 1 << node.run
        comes_from.append(source)
    level: list[int] = []
    for bits in wanted:
        level.append(max((level[other] + 1 for other in range(len(level)) if bits >> other & 1), default=0))
    return tuple(
        tuple(run for run, at in enumerate(level) if at == group) for group in range(max(level, default=-1) + 1)
    )


def _id(node: Node) -> int:
    return node.id
