"""Which site runs which node of a graph, where a model's blocks lie on several.

A read or write runs where its module is. Everything else runs where, of what it needs, the last comes into being;
so values travel the way the forward goes, and most don't travel at all. Home takes what only it can do: its own
modules called on values (as late as the graph allows), tokens and masks, and backwards, which begin there. Where a
block waits for what a module elsewhere makes of its own values, its shard asks for that (`calling.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias

from ...errors import WrongOrder
from ...graph.manifest import Manifest
from ...graph.model import Node
from ..interpreter import TOO_LATE
from ..plan import ACCESSES, Plan, place_of, step_of
from .route import HOME, Route

Moment: TypeAlias = tuple[int, float, float]
"""When: level of runs, step, position. A block's is twice its number; home's lie between blocks, at odd ones."""

BEGIN: Moment = (-1, 0, 0)
"""Before any forward."""

EVERY = float("1e9")
"""The step of nodes that run once a step: later than any that is named."""

END = float("1e10")


def block_of(path: str, blocks: Container[str]) -> str | None:
    """The path of the block that a module is or lies in, if it is one of these."""
    while path and path not in blocks:
        path = path.rpartition(".")[0]
    return path or None


@dataclass(frozen=True)
class Sites:
    """Where modules are.

    Args:
        blocks: path of a block -> its site, 1 to `count`; in order.
    """

    blocks: Mapping[str, int]
    manifest: Manifest
    numbers: Mapping[str, int] = field(init=False)
    """Path of a block -> its number, from 1 on."""
    _ends: tuple[int, ...] = field(init=False)
    """The moment at which each block ends, by number; ascending."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", {path: number for number, path in enumerate(self.blocks, 1)})
        moments = [self.manifest.moment(path, "output", 0) or 0 for path in self.blocks]
        object.__setattr__(self, "_ends", tuple(accumulate(moments, max)))

    @property
    def count(self) -> int:
        """How many shards there are."""
        return max(self.blocks.values())

    @property
    def last(self) -> int:
        """Home's position after all blocks."""
        return 2 * len(self.blocks) + 1

    def block(self, path: str) -> int:
        """The number of the block that a module is or lies in, 0 for one of home's."""
        block = block_of(path, self.numbers)
        return 0 if block is None else self.numbers[block]

    def of(self, path: str) -> int:
        """The site of a module."""
        return self.at(self.block(path))

    def outside(self, path: str) -> bool:
        """Whether a module is home's, and no block lies in it."""
        return (
            bool(path) and not self.block(path) and not any(block.startswith(f"{path}.") for block in self.blocks)
        )

    def at(self, block: int) -> int:
        """The site of a block by its number."""
        return self._sites[block] if block < len(self._sites) else HOME

    @cached_property
    def _sites(self) -> tuple[int, ...]:
        return (HOME, *self.blocks.values())

    def end(self, block: int) -> float:
        """The moment at which a block by its number has ended, and the next hasn't begun."""
        if block == 0:
            return -math.inf
        return math.inf if block >= len(self._ends) else self._ends[block - 1] + 1

    def position(self, node: Node) -> int:
        """When in a forward an access comes."""
        module, event, call = place_of(node)
        block = self.block(module)
        if block:
            return 2 * block
        moment = self.manifest.moment(module, event, call)
        return self.last if moment is None else 2 * bisect_left(self._ends, moment) + 1


@dataclass(frozen=True)
class Split:
    """A model whose blocks lie on shards, as home knows it.

    Attributes:
        route: the way to the shards.
        sites: where the modules of the model are.
    """

    route: Route
    sites: Sites

    @property
    def last(self) -> int:
        """The last block's number."""
        return len(self.sites.numbers)


@dataclass(frozen=True)
class Division:
    """A plan, divided.

    Attributes:
        site: node -> where it runs; live nodes alone.
        sent: site -> node run there -> the other sites that need its value.
        stops: (run, step, block): after that block, home has something to do before the next.
        first: the shards that have something to do before any forward.
    """

    plan: Plan
    site: Mapping[int, int]
    sent: Mapping[int, Mapping[int, tuple[int, ...]]]
    stops: frozenset[tuple[int, float, int]]
    first: frozenset[int]
    parts: dict[int, Plan] = field(default_factory=dict)

    def part(self, site: int) -> Plan:
        """The nodes of one site as a plan of their own; others' values come to it from outside."""
        if site not in self.parts:
            mine = frozenset(node for node, at in self.site.items() if at == site)
            self.parts[site] = self.plan.part(mine, frozenset(self.sent.get(site, {})))
        return self.parts[site].of(self.plan.graph.runs)

    @property
    def used(self) -> frozenset[int]:
        """Every shard that runs a node."""
        return frozenset(self.site.values()) - {HOME}


def divide(plan: Plan, sites: Sites) -> Division:
    """Made once for all plans of the same nodes."""
    found = plan.divisions.get(sites.count)
    if found is None:
        found = plan.divisions[sites.count] = _Divider(plan, sites).divided()
    division: Division = found
    return Division(plan, division.site, division.sent, division.stops, division.first, division.parts)


class _Divider:
    def __init__(self, plan: Plan, sites: Sites) -> None:
        self.plan = plan
        self.sites = sites
        self.nodes = plan.graph.nodes
        self.level = {run: level for level, runs in enumerate(plan.levels) for run in runs}
        self.when: dict[int, Moment] = {}
        self.site: dict[int, int] = {}
        self.runs: dict[int, frozenset[int]] = {}
        """The runs of a node's own level that it comes from."""
        self.stops: set[tuple[int, float, int]] = set()
        self.first: set[int] = set()
        self.waited = self._upstream(plan.nodes(*ACCESSES))
        """Nodes that a moment of some forward waits for."""
        self.losses = self._upstream(plan.nodes("backward"))
        self.after: set[int] = set()
        """Nodes that come of gradients."""
        self.loops = self._loops()
        self.awaited: dict[Moment, set[int]] = {}
        """What the accesses of a moment come from, of those it was asked of."""

    def divided(self) -> Division:
        for node in self.nodes:
            if node.id in self.plan.live and node.id not in self.site:
                self._settle(node)
        sent: dict[int, dict[int, set[int]]] = {}
        for user, at in self.site.items():
            for need in self.plan.needs[user]:
                if self.site.get(need, at) != at:
                    sent.setdefault(self.site[need], {}).setdefault(need, set()).add(at)
        return Division(
            self.plan,
            self.site,
            {site: {node: tuple(sorted(to)) for node, to in nodes.items()} for site, nodes in sent.items()},
            frozenset(self.stops),
            frozenset(self.first),
        )

    def _upstream(self, ends: Iterable[Node]) -> set[int]:
        """All that some nodes come from."""
        wanted, found = {node.id for node in ends}, set[int]()
        for node in reversed(self.nodes):
            if node.id in self.plan.live and (node.id in wanted or node.id in found):
                found |= self.plan.needs[node.id]
                if node.op in ("grad", "set_grad"):
                    found |= {node.args[0].id, node.args[1].id}
        return found

    def _loops(self) -> dict[int, tuple[Node, list[Node]]]:
        """Outermost loop -> the node of its end, and all nodes within."""
        found: dict[int, tuple[Node, list[Node]]] = {}
        for end in self.nodes:
            if end.op == "end_loop" and end.id in self.plan.live:
                start = end.args[0].id
                if not any(self.nodes[control].op == "loop" for control in self.plan.scope[start]):
                    within = [node for node in self.nodes if start in self.plan.scope[node.id]]
                    found[start] = end, within
        return found

    def _settle(self, node: Node) -> None:
        if node.op == "loop" and node.id in self.loops:
            self._settle_loop(node)
            return
        when, site, runs = self._placed(node)
        if node.op in ("grad", "set_grad") or not self.after.isdisjoint(self.plan.needs[node.id]):
            self.after.add(node.id)
        self._note(node, when, site, runs)

    def _note(self, node: Node, when: Moment, site: int, runs: frozenset[int]) -> None:
        self.when[node.id], self.site[node.id], self.runs[node.id] = when, site, runs

    def _placed(self, node: Node) -> tuple[Moment, int, frozenset[int]]:
        own = frozenset({node.run})
        level = self.level.get(node.run, 0)
        if node.op in ACCESSES:
            moment = self._moment(node)
            self._check(node, moment)
            return moment, self._site(moment[2]), own
        if node.op in ("attention_mask", "alive"):
            return (level, self._step(node), 1), HOME, own
        if node.op == "tokens":
            return (level, END, self.sites.last), HOME, own
        if node.op in ("grad", "set_grad"):
            return self._gradient(node)
        when, site, runs = self._latest(node)
        body = self.plan.template_of(node.id)
        if body is not None and all(self.plan.template_of(need) != body for need in self.plan.needs[node.id]):
            return (level, EVERY, 1), HOME, own  # it runs once a step, of what was there before
        if node.op == "param" and not self.plan.needs[node.id]:
            site = self.sites.of(node.args[0])
            self.first |= {site} - {HOME}
            return BEGIN, site, runs
        # What comes of a backward travels as a mere value; another's loss is made of it where gradients can follow.
        second = node.id in self.losses and not self.after.isdisjoint(self.plan.needs[node.id])
        if node.op == "backward" or second or (self._calls_out(node, site) and not self._asks([node], node, when)):
            return self._at_home(node, when, runs)
        return when, site, runs

    def _calls_out(self, node: Node, site: int) -> bool:
        """Whether a node needs a module that isn't where its arguments are."""
        return node.op in ("call", "param") and self.sites.of(node.args[0]) != site

    def _asks(self, nodes: Sequence[Node], last: Node, when: Moment) -> bool:
        """Whether nodes that call out run where their arguments are, and ask: their block waits for what they make.

        Else home, which can reach all, has its turn soon enough.

        Args:
            last: the node that gives what the others make.
        """
        asked = [self.sites.block(node.args[0]) or self.sites.outside(node.args[0]) for node in nodes]
        return all(asked) and self._awaited(last, when)

    def _awaited(self, node: Node, when: Moment) -> bool:
        """Whether an access of that moment comes from a node."""
        accesses = self.accesses.get(when, ())
        if not accesses or accesses[-1].id < node.id:
            return False
        if when not in self.awaited:
            self.awaited[when] = self._upstream(accesses)
        return node.id in self.awaited[when]

    @cached_property
    def accesses(self) -> Mapping[Moment, Sequence[Node]]:
        """By their moments."""
        found: dict[Moment, list[Node]] = {}
        for node in self.plan.nodes(*ACCESSES):
            found.setdefault(self._moment(node), []).append(node)
        return found

    def _moment(self, node: Node) -> Moment:
        """Of an access."""
        return self.level.get(node.run, 0), self._step(node), self.sites.position(node)

    def _check(self, node: Node, when: Moment) -> None:
        """Home has no turn within a block. Raises WrongOrder where an access that surely comes would need one."""
        if not self.plan.scope[node.id] and any(
            when < self.when.get(need, BEGIN) < (*when[:2], END) for need in self.plan.needs[node.id]
        ):
            raise WrongOrder(TOO_LATE).at(node.id, node.op, node.source)

    def _step(self, node: Node) -> float:
        return EVERY if self.plan.template_of(node.id) is not None else step_of(node)

    def _site(self, position: float) -> int:
        return HOME if position % 2 else self.sites.at(int(position) // 2)

    def _latest(self, node: Node, needs: frozenset[int] | None = None) -> tuple[Moment, int, frozenset[int]]:
        """When and where the last of what a node needs comes into being."""
        known = [need for need in (self.plan.needs[node.id] if needs is None else needs) if need in self.site]
        if not known:
            return BEGIN, HOME, frozenset()
        when = max(self.when[need] for need in known)
        last = [need for need in known if self.when[need] == when]
        runs = frozenset[int]().union(*(self.runs[need] for need in known if self.when[need][0] == when[0]))
        if when[0] >= 0 and len(runs) > 1:
            # Which of the runs comes first isn't known; home has word of both.
            return (when[0], END, self.sites.last), HOME, runs
        sites = {self.site[need] for need in last}
        if len(sites) > 1:
            return self._at_home(node, when, runs)
        return when, sites.pop(), runs

    def _at_home(self, node: Node, when: Moment, runs: frozenset[int]) -> tuple[Moment, int, frozenset[int]]:
        level, step, position = when
        if level < 0:
            return (-1, 0, 1), HOME, runs
        if node.id not in self.waited:
            return (level, step, max(position, self.sites.last)), HOME, runs
        if position < self.sites.last and self._site(int(position)) != HOME:
            position = int(position) + 1
            self.stops |= {(run, step, int(position) // 2) for run in runs}
        return (level, step, position), HOME, runs

    def _gradient(self, node: Node) -> tuple[Moment, int, frozenset[int]]:
        """A gradient comes after its backward began, the sooner the later in the forward its value was made."""
        target, back = node.args[0].id, node.args[1].id
        level, step, position = self.when.get(back, BEGIN)
        before = 1 - min(max(self.when[target][2], 0), self.sites.last) / (self.sites.last + 1)
        return (level, step, position + before / 2), self.site[target], self.runs.get(back, frozenset())

    def _settle_loop(self, start: Node) -> None:
        """A loop runs as one, where the last of what it takes is made."""
        end, within = self.loops[start.id]
        inside = {start.id, *(node.id for node in within)}
        needs = (self.plan.needs[end.id] | self.plan.needs[start.id]) - inside
        when, site, runs = self._latest(end, frozenset(needs))
        out = [node for node in within if self._calls_out(node, site)]
        if out and not self._asks(out, end, when):
            when, site, runs = self._at_home(end, when, runs)
        for node in (start, *within, end):
            if node.id in self.plan.live:
                self._note(node, when, site, runs)
