"""How many copies each model should have: a pure decision from figures, room and the clock.

On demand: a model somebody waits for gets a copy. Idleness: one that nobody used for its `idle_s` goes. Need: where
there is no room, the least recently used idle model makes way, never one that is pinned, or has work, or was loaded
less long than `hold_s` ago. Pins and schedules keep copies. Long queues and long waits bring further ones, while
there is room. Nothing here imports Ray, Redis or torch, or looks at a clock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .packing import Parts, packs
from .schedule import scheduled
from .spec import ModelSpec

OUTGROWN_S = 20.0
"""So long a model must have been larger than all devices before its users are told."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One model now.

    Attributes:
        ready, loading: copies.
        waiting, working: jobs that wait, and that run.
        oldest_wait_s: how long the first of them has waited.
        idle_s: since a job last came or ended, or it was loaded.
        busy: the share of its copies' time that went into work lately, 0 to 1.
        wished: somebody wants it loaded, by no job.
        evicted: an operator wants it to go as soon as it has no work.
        failed: loading it failed, and it isn't time to try again.
        draining: it is being taken out of the catalogue.
        parts: what one copy takes.
        loaded: it has been ready before.
    """

    spec: ModelSpec
    ready: int = 0
    loading: int = 0
    waiting: int = 0
    working: int = 0
    oldest_wait_s: float = 0.0
    idle_s: float = math.inf
    busy: float = 0.0
    wished: bool = False
    evicted: bool = False
    failed: bool = False
    draining: bool = False
    parts: Parts = (1.0,)
    loaded: bool = False

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def held(self) -> int:
        return self.ready + self.loading

    @property
    def work(self) -> bool:
        return self.waiting + self.working > 0

    @property
    def demand(self) -> bool:
        return self.work or self.wished


@dataclass(frozen=True, slots=True)
class Room:
    """Attributes:
    nodes: how many devices each node has for models, those in use included; None where they don't count.
    grows: copies without room are asked for all the same, since that makes the cluster larger.
    """

    nodes: tuple[float, ...] | None = None
    grows: bool = False

    def fits(self, copies: Sequence[Parts]) -> bool:
        return self.nodes is None or packs(copies, self.nodes)


@dataclass(frozen=True, slots=True)
class Rules:
    """Attributes:
    hold_s: a model that was loaded makes way for none before.
    scale_jobs, scale_wait_s: more jobs than this waiting for each copy, or one for longer, are a press;
    press_s: one that has lasted so long brings another copy.
    stuck_s: a copy that was asked for, and isn't loading after so long, has found no room.
    turn_s: while a job has waited so long for a model without a copy, no other model gets the room it needs.
    """

    hold_s: float = 60.0
    scale_jobs: int = 64
    scale_wait_s: float = 10.0
    press_s: float = 5.0
    stuck_s: float = 120.0
    turn_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision leaves for the next, by model.

    Attributes:
        asked: copies that were asked for.
        loaded_s: since when it has had a ready copy.
        pressed_s, slack_s: since when it has wanted more copies than it has, and could do with fewer.
        pending_s: since when a copy that was asked for hasn't come.
    outgrown_s: since when a copy has been larger than all devices.
    """

    asked: Mapping[str, int] = field(default_factory=dict)
    loaded_s: Mapping[str, float] = field(default_factory=dict)
    pressed_s: Mapping[str, float] = field(default_factory=dict)
    slack_s: Mapping[str, float] = field(default_factory=dict)
    pending_s: Mapping[str, float] = field(default_factory=dict)
    outgrown_s: Mapping[str, float] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Memory:
        return cls(**plain)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Attributes:
    copies: how many each model should have.
    why: where that differs from before, or from what its users ask for, the reason, for the operator.
    crowded: models that are waited for, and that there is no room for.
    impossible: models whose copy finds no place even on empty devices, and what it takes.
    """

    copies: Mapping[str, int]
    why: Mapping[str, str]
    crowded: frozenset[str]
    impossible: Mapping[str, str]
    memory: Memory


def decide(
    models: Sequence[Figures], room: Room, now_s: float, memory: Memory | None = None, rules: Rules | None = None
) -> Wanted:
    """How many copies each model should have.

    Args:
        now_s: seconds since 1970; schedules go by it.
        memory: what the last decision left.
    """
    return _Decision(models, room, now_s, memory or Memory(), rules or Rules()).made()


class _Decision:
    def __init__(self, models: Sequence[Figures], room: Room, now_s: float, memory: Memory, rules: Rules) -> None:
        self._models = {model.name: model for model in models}
        self._room = room
        self._now_s = now_s
        self._before = memory
        self._rules = rules
        self._copies: dict[str, int] = {}
        self._gone: set[str] = set()
        """Models that make way, this time, for others."""
        self._crowded: set[str] = set()
        self._why: dict[str, str] = {}
        self._impossible: dict[str, str] = {}
        self._least = {model.name: self._least_of(model) for model in models}
        self._pressed = self._since(memory.pressed_s, self._is_pressed)
        self._slack = self._since(memory.slack_s, self._is_slack)
        self._pending = self._since(memory.pending_s, lambda model: self._asked(model) > model.held)
        self._outgrown = self._since(memory.outgrown_s, self._is_outgrown)
        self._reserved = False
        """Whether somebody has waited so long that room is kept for them alone."""

    def made(self) -> Wanted:
        own = {name: self._own(model) for name, model in self._models.items()}
        # What is asked for already has its place; who needs less gives it back at once.
        self._copies = {name: min(count, self._asked(self._models[name])) for name, count in own.items()}
        for model in sorted(self._models.values(), key=self._urgency):
            if model.name not in self._gone:
                self._grow(model, own[model.name])
        return Wanted(self._copies, self._why, frozenset(self._crowded), self._impossible, self._remember())

    # -- what a model wants for itself -------------------------------------------------------------------------

    def _own(self, model: Figures) -> int:
        """Copies it would have with all the room in the world."""
        asked, least = self._asked(model), self._least[model.name]
        if model.failed:
            return self._told(model, min(asked, model.ready), "it couldn't be loaded")
        if model.draining:
            keep = max(min(asked, model.spec.replicas.max), 1) if model.work else 0
            return self._told(model, keep, "it leaves the catalogue")
        most = model.spec.replicas.max
        if not model.demand:
            return min(self._unasked(model, asked, least), most)
        count = max(asked, least, 1)
        if self._lasted(self._pressed, model, self._rules.press_s):
            by_queue = math.ceil(model.waiting / self._rules.scale_jobs)
            count = max(count, model.ready + max(1, min(model.ready, by_queue - model.ready)))
            self._pressed.pop(model.name)
            self._told(model, min(count, most), f"{model.waiting} jobs wait, one {model.oldest_wait_s:.0f} s")
        elif count > max(least, 1) and self._lasted(self._slack, model, model.spec.idle_s):
            count -= 1
            self._slack.pop(model.name)
            self._told(model, count, "fewer copies do")
        return min(count, most)

    def _unasked(self, model: Figures, asked: int, least: int) -> int:
        """Copies of a model that nobody waits for: what it has, until it has been idle for long enough."""
        kept = max(least, min(asked, 1)) if model.spec.pinned else least
        if model.evicted and not model.spec.pinned:
            return self._told(model, least, "an operator let it go")
        if not model.held and self._lasted(self._pending, model, self._rules.stuck_s):
            return self._told(model, kept, "nobody waits for it any more")
        if model.held and model.idle_s >= model.spec.idle_s and not model.loading:
            return self._told(model, kept, f"nobody used it for {model.spec.idle_s:g} s")
        if asked > max(kept, 1) and self._lasted(self._slack, model, model.spec.idle_s):
            self._slack.pop(model.name)
            return self._told(model, asked - 1, "fewer copies do")
        return max(asked, kept)

    def _least_of(self, model: Figures) -> int:
        """Copies that stay whether or not anybody uses them."""
        if model.failed or model.draining:
            return 0
        least = model.spec.replicas.min
        return max(least, 1) if scheduled(model.spec.schedule, self._now_s) else least

    def _is_pressed(self, model: Figures) -> bool:
        settled = model.ready > 0 and not model.loading and self._asked(model) <= model.ready
        much = model.waiting > self._rules.scale_jobs * model.ready
        return settled and model.waiting > 0 and (much or model.oldest_wait_s > self._rules.scale_wait_s)

    def _is_slack(self, model: Figures) -> bool:
        """Whether half of the time of one copy fewer would do."""
        settled = model.ready > 1 and not model.loading
        return settled and not model.waiting and model.busy * model.ready < 0.5 * (model.ready - 1)

    def _is_outgrown(self, model: Figures) -> bool:
        return not (model.held or self._room.grows or self._room.fits([model.parts]))

    # -- who gets the room -------------------------------------------------------------------------------------

    def _urgency(self, model: Figures) -> tuple[int, float, str]:
        """First those who have no copy and are waited for, the longest wait first; last those who have one."""
        if self._copies[model.name]:
            return 3, 0.0, model.name
        kind = 0 if model.waiting else 1 if model.wished else 2
        return kind, -model.oldest_wait_s, model.name

    def _grow(self, model: Figures, wanted: int) -> None:
        name = model.name
        if wanted and name in self._outgrown:
            self._copies[name] = 0
            there = ", ".join(f"{node:g}" for node in self._room.nodes or ())
            self._why[name] = (
                f"a copy takes {_shown(model.parts)}; the nodes have {there or 'none'}. "
                "`devices` says how many each part takes"
            )
            # A node may be away: for long, where the model has been loaded before.
            if model.loaded:
                self._crowded.add(name)
            elif self._lasted(self._outgrown, model, OUTGROWN_S):
                self._impossible[name] = self._why[name]
            return
        if self._copies[name] and not model.held and self._lasted(self._pending, model, self._rules.stuck_s):
            # By the figures there is room, and yet the copy found none: one more makes way.
            self._pending[name] = self._now_s
            self._make_way(model, at_once=True)
        while self._copies[name] < wanted:
            first = self._copies[name] == 0
            if self._reserved and any(model.parts):
                self._why.setdefault(name, "another model has waited longer for the room")
                self._crowded |= {name} if first else set()
                return
            self._copies[name] += 1
            if self._room.grows or self._fits() or (first and self._make_way(model)):
                continue
            self._copies[name] -= 1
            if first:
                self._why[name] = "there is no room for it, and nothing idle that could make way"
                self._crowded.add(name)
                self._reserved = model.waiting > 0 and model.oldest_wait_s >= self._rules.turn_s
            return

    def _make_way(self, model: Figures, *, at_once: bool = False) -> bool:
        """Let idle models go until all fits, or with `at_once` one. Whether that was possible; else none goes."""
        before, gone = dict(self._copies), []
        for victim in self._victims(model):
            self._copies[victim] -= 1
            gone.append(victim)
            if at_once or self._fits():
                break
        else:
            self._copies = before
            return False
        for victim in gone:
            # Those that went in vain, being too small, stay.
            self._copies[victim] += 1
            if at_once or not self._fits():
                self._copies[victim] -= 1
        for victim in gone:
            if self._copies[victim] < before[victim]:
                self._gone.add(victim)
                self._why[victim] = f"it makes way for {model.name}"
        return True

    def _victims(self, model: Figures) -> list[str]:
        """Copies that may go for a model that has none, by their model's name: the least recently used first; then
        those of models that would have others left, of which there are the most."""
        others = [other for other in self._models.values() if other.name != model.name and self._settled(other)]
        idle = [other for other in others if not other.demand and not other.spec.pinned]
        extra = [other for other in others if other not in idle]
        found = []
        for other in sorted(idle, key=lambda other: (-other.idle_s, other.name)):
            found += [other.name] * (self._copies[other.name] - self._least[other.name])
        for other in sorted(extra, key=lambda other: (-self._copies[other.name], other.name)):
            found += [other.name] * (self._copies[other.name] - max(self._least[other.name], 1))
        return found

    def _settled(self, model: Figures) -> bool:
        """Whether its copies are loaded, and have been for long enough to be let go."""
        since = self._before.loaded_s.get(model.name, self._now_s)
        return model.ready > 0 and not model.loading and self._now_s - since >= self._rules.hold_s

    def _fits(self) -> bool:
        return self._room.fits(
            [model.parts for name, model in self._models.items() for _ in range(self._copies[name])]
        )

    # -- from one decision to the next -------------------------------------------------------------------------

    def _asked(self, model: Figures) -> int:
        return self._before.asked.get(model.name, model.held)

    def _since(self, before: Mapping[str, float], holds: Any) -> dict[str, float]:
        """Since when something has held of each model of which it holds."""
        return {name: before.get(name, self._now_s) for name, model in self._models.items() if holds(model)}

    def _lasted(self, since: Mapping[str, float], model: Figures, for_s: float) -> bool:
        return model.name in since and self._now_s - since[model.name] >= for_s

    def _told(self, model: Figures, count: int, why: str) -> int:
        if count != self._asked(model):
            self._why[model.name] = why
        return count

    def _remember(self) -> Memory:
        pending = {
            name: self._pending.get(name, self._now_s)
            for name, model in self._models.items()
            if self._copies[name] > model.held
        }
        return Memory(
            asked=dict(self._copies),
            loaded_s=self._since(self._before.loaded_s, lambda model: model.ready > 0),
            pressed_s=self._pressed,
            slack_s=self._slack,
            pending_s=pending,
            outgrown_s=self._outgrown,
        )


def _shown(parts: Parts) -> str:
    """As "1 device", or "2 parts of 1 device, one of 0.5: 2.5 devices in all"."""
    if len(parts) == 1:
        return _devices(parts[0])
    counts = Counter(parts)
    each = [f"{count if count > 1 else 'one'} of {_devices(part)}" for part, count in counts.most_common()]
    return f"{len(parts)} parts, {', '.join(each)}: {_devices(sum(parts))} in all"


def _devices(number: float) -> str:
    return f"{number:g} device{'' if number == 1 else 's'}"
