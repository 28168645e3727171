"""What a decision about the models' copies goes by, what it says, and what it leaves for the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import zip_longest

from .packing import Parts, packs
from .spec import ModelSpec

TURN_LOADS = 3.0
"""A turn is so many times as long as loading took, so that devices spend most of their time at work."""

LONGEST_AGAIN = 16
"""A copy that Ray has no place for is asked for again after `patience_s`, then after twice as long each time, up to
so many times as long."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One model now.

    Attributes:
        ready, loading, leaving: copies; those that leave finish what they run, on their devices.
        waiting, working: jobs that wait, and that run.
        oldest_wait_s: how long the first of them has waited.
        idle_s: since a job last came or ended, or it was loaded.
        busy: the share of its copies' time that went into work lately, 0 to 1.
        wished: somebody wants it loaded, by no job.
        evicted: an operator wants it to go as soon as it has no work.
        failed: loading it failed, and it isn't time to try again.
        too_large: so it did since a copy was larger than all devices.
        draining: it is being taken out of the catalogue.
        parts: what one copy takes.
        loaded: it has been ready before.
    """

    spec: ModelSpec
    ready: int = 0
    loading: int = 0
    leaving: int = 0
    waiting: int = 0
    working: int = 0
    oldest_wait_s: float = 0.0
    idle_s: float = math.inf
    busy: float = 0.0
    wished: bool = False
    evicted: bool = False
    failed: bool = False
    too_large: bool = False
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
    resources: what else each of them has, by its name; empty where that isn't known.
    grows: copies without room are asked for all the same, since that makes the cluster larger.
    """

    nodes: tuple[float, ...] | None = None
    grows: bool = False
    resources: tuple[Mapping[str, float], ...] = ()

    def fits(self, copies: Sequence[Parts], on: Set[int] | None = None) -> bool:
        """Whether all find a place. `on`: these nodes alone, by their index."""
        if self.nodes is None:
            return True
        return packs(copies, self.nodes if on is None else [self.nodes[index] for index in on])

    def of_use(self, model: Figures) -> frozenset[int]:
        """The nodes, by index, that are large enough for a part of a copy, and have the resources it takes."""
        # Of a copy in parts only one takes them.
        asked = model.spec.resources.items() if len(model.parts) == 1 else ()
        return frozenset(
            index
            for index, (devices, has) in enumerate(zip_longest(self.nodes or (), self.resources))
            if devices >= min(model.parts, default=0)
            and (has is None or all(has.get(name, 0) >= amount for name, amount in asked))
        )


@dataclass(frozen=True, slots=True)
class Rules:
    """Attributes:
    hold_s: a model that was loaded makes way for none before.
    patience_s: who has waited so long for a first copy takes the devices of one that has work, too.
    scale_jobs, scale_wait_s: more jobs than this waiting for each copy, or one for longer, are a press;
    press_s: one that has lasted so long brings another copy.
    stuck_s: a copy that was asked for, and isn't loading after so long, has found no room.
    in_vain: for such a copy no more than so many make way.
    """

    hold_s: float = 60.0
    scale_jobs: int = 64
    scale_wait_s: float = 10.0
    press_s: float = 5.0
    stuck_s: float = 120.0
    patience_s: float = 300.0
    in_vain: int = 3

    def turn_s(self, took_s: float) -> float:
        """How long a model that has work keeps its devices from those who wait.

        Args:
            took_s: how long its loading took.
        """
        return max(self.hold_s, TURN_LOADS * took_s)

    def again_s(self, times: int) -> float:
        """How long a copy isn't asked for that Ray had no place for, so many times in a row."""
        return self.patience_s * min(2.0 ** (times - 1), LONGEST_AGAIN)


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A copy that Ray had no place for, though by its devices there was room.

    Attributes:
        asked: what was asked for, and of which nodes: of anything else nothing is known.
        times: in a row.
        until_s: it isn't asked for again before.
    """

    asked: tuple[ModelSpec, Parts, tuple[float, ...] | None]
    times: int
    until_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision leaves for the next, by model.

    Attributes:
        asked: copies that were asked for.
        loaded_s: since when it has had a ready copy.
        coming_s: since when its first copy has been loading.
        took_s: how long that took, when it last did.
        starved_s: since when it has had no copy, though somebody waits for one.
        pressed_s, slack_s: since when it has wanted more copies than it has, and could do with fewer.
        pending_s: since when a copy that was asked for hasn't come.
        in_vain: how often others made way for a first copy since it was asked for, while it hasn't come.
        given_up: those whose first copy was asked for in vain.
        nodes, same_s: the devices of each node, the fewest first, and since when they have been these.
    """

    asked: Mapping[str, int] = field(default_factory=dict)
    loaded_s: Mapping[str, float] = field(default_factory=dict)
    coming_s: Mapping[str, float] = field(default_factory=dict)
    took_s: Mapping[str, float] = field(default_factory=dict)
    starved_s: Mapping[str, float] = field(default_factory=dict)
    pressed_s: Mapping[str, float] = field(default_factory=dict)
    slack_s: Mapping[str, float] = field(default_factory=dict)
    pending_s: Mapping[str, float] = field(default_factory=dict)
    in_vain: Mapping[str, int] = field(default_factory=dict)
    given_up: Mapping[str, GivenUp] = field(default_factory=dict)
    nodes: tuple[float, ...] | None = None
    same_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Attributes:
    copies: how many each model should have.
    why: where that differs from before, or from what its users ask for, the reason, for the operator.
    lasting: those of whom the reason holds as long as it is said, and is over then.
    crowded: models that are waited for, and that there is no room for.
    impossible: models whose copy finds no place even on empty devices, and what it takes.
    mended: models that failed for this reason, which is over.
    """

    copies: Mapping[str, int]
    why: Mapping[str, str]
    lasting: frozenset[str]
    crowded: frozenset[str]
    impossible: Mapping[str, str]
    mended: frozenset[str]
    memory: Memory
