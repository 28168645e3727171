"""How many copies each model should have: a pure decision from figures, room and the clock.

On demand: a model somebody waits for gets a copy. Idleness: one that nobody used for its `idle_s` goes. Need: where
there is no room, the least recently used idle model makes way, never one that is pinned, or has work, or was loaded
less long than `hold_s` ago. Turns: who has waited longer than `patience_s` takes the devices of one that has work,
once that has had its turn. Pins and schedules keep copies. Long queues and long waits bring further ones, while
there is room. Nothing here imports Ray, Redis or torch, or looks at a clock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .inventory import outgrown
from .packing import Parts
from .rules import Figures, GivenUp, Memory, Room, Rules, Wanted
from .schedule import scheduled
from .spec import ModelSpec

JOINING_S = 20.0
"""So long the nodes must have been the same before the users of a model that is larger than all of them are told:
a cluster's head is there before its nodes."""

NO_PLACE = (
    "Ray has found no place for it, though it has devices enough: see its `resources`, cores, and what else runs "
    "on the cluster; others come first meanwhile"
)


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
        self._lasting: set[str] = set()
        self._least = {model.name: self._least_of(model) for model in models}
        self._pressed = self._since(memory.pressed_s, self._is_pressed)
        self._slack = self._since(memory.slack_s, self._is_slack)
        # While copies leave, what they had is about to be free.
        leaving = any(model.leaving for model in models)
        self._pending = self._since(memory.pending_s, lambda model: self._asked(model) > model.held and not leaving)
        self._starved = self._since_when_starved(memory)
        self._nodes = None if room.nodes is None else tuple(sorted(room.nodes))
        self._same_s = memory.same_s if memory.nodes == self._nodes else now_s
        self._outgrown = {name for name, model in self._models.items() if self._is_outgrown(model)}
        self._in_vain = Counter(memory.in_vain)
        self._given_up = {name: one for name, one in memory.given_up.items() if self._stays_given_up(name, one)}
        self._reserved: list[Figures] = []
        """Those who have waited so long that room is kept for them alone."""

    def made(self) -> Wanted:
        own = {name: self._own(model) for name, model in self._models.items()}
        # What is asked for already has its place; who needs less gives it back at once.
        self._copies = {name: min(count, self._asked(self._models[name])) for name, count in own.items()}
        for model in sorted(self._models.values(), key=self._urgency):
            if model.name not in self._gone:
                self._grow(model, own[model.name])
        return Wanted(
            self._copies,
            self._why,
            lasting=frozenset(self._lasting),
            crowded=frozenset(self._crowded),
            impossible={
                model.name: self._size(model) for model in self._models.values() if self._is_impossible(model)
            },
            mended=frozenset(name for name, model in self._models.items() if self._is_mended(model)),
            memory=self._remember(),
        )

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
        self._told(model, count, _asking(model))
        if self._lasted(self._pressed, model, self._rules.press_s):
            by_queue = math.ceil(model.waiting / self._rules.scale_jobs)
            count = max(count, model.ready + max(1, min(model.ready, by_queue - model.ready)))
            self._pressed.pop(model.name)
            self._told(model, min(count, most), f"{model.waiting} jobs wait, one {model.oldest_wait_s:.0f} s")
        elif count > max(least, 1) and self._lasted(self._slack, model, model.spec.idle_s):
            count -= 1
            self._slack.pop(model.name)
            self._told(model, count, "fewer copies do")
        return count if count <= most else self._told(model, most, f"{most} at most")

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
        return self._told(model, max(asked, kept), f"{kept} kept, whether or not anybody asks")

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

    def _starves(self, model: Figures) -> bool:
        asked_for = model.waiting or model.wished or self._least[model.name]
        return bool(asked_for) and not model.held and not model.failed

    def _since_when_starved(self, memory: Memory) -> dict[str, float]:
        """Not since its first job came, which may have waited while it ran. But nobody knows better at first."""
        first = {
            name: self._now_s if name in memory.asked else self._now_s - model.oldest_wait_s
            for name, model in self._models.items()
        }
        return self._since(first | dict(memory.starved_s), self._starves)

    def _waited_s(self, model: Figures) -> float:
        """How long it has had no copy, though somebody waits for one."""
        return self._now_s - self._starved.get(model.name, self._now_s)

    def _impatient(self, model: Figures) -> bool:
        return self._lasted(self._starved, model, self._rules.patience_s)

    def _is_outgrown(self, model: Figures) -> bool:
        return not (model.held or self._room.grows or self._room.fits([model.parts]))

    def _is_impossible(self, model: Figures) -> bool:
        """Whether its users are told that it is too large. A node may be away: one that was loaded before waits."""
        gone = model.draining and not model.work
        lasts = self._now_s - self._same_s >= JOINING_S
        return lasts and model.name in self._outgrown and not (model.loaded or model.failed or gone)

    def _is_mended(self, model: Figures) -> bool:
        return model.too_large and model.name not in self._outgrown

    def _size(self, model: Figures) -> str:
        told = outgrown(model.parts, self._room.nodes or (), "device")
        return f"{told}. `devices` says how many each part takes"

    # -- who gets the room -------------------------------------------------------------------------------------

    def _urgency(self, model: Figures) -> tuple[int, float, str]:
        """First those who have no copy and were waited for too long, whoever waits; then those with jobs, and those
        that are wished for; the longest wait first. Last those who have a copy."""
        if self._copies[model.name]:
            return 4, 0.0, model.name
        kind = 0 if self._impatient(model) else 1 if model.waiting else 2 if model.wished else 3
        return kind, -self._waited_s(model), model.name

    def _grow(self, model: Figures, wanted: int) -> None:
        name = model.name
        if wanted and name in self._outgrown:
            self._copies[name] = 0
            self._wait(name, self._size(model))
            return
        if name in self._given_up and self._now_s < self._given_up[name].until_s:
            if wanted:
                self._wait(name, NO_PLACE)
            return
        if self._copies[name] and not model.held and self._lasted(self._pending, model, self._rules.stuck_s):
            self._press_on(model)
            return
        while self._copies[name] < wanted:
            first = self._copies[name] == 0
            if self._reserved and any(model.parts) and not self._apart(model):
                if first:
                    self._wait(name, "another model has waited longer for the room")
                return
            self._copies[name] += 1
            if self._room.grows or self._fits():
                continue
            if first and not self._reserved and self._others_go(model):
                continue
            self._copies[name] -= 1
            if first:
                self._wait(name, self._hopes(model))
            return

    def _press_on(self, model: Figures) -> None:
        """By the figures there is room, and yet the copy found none: one more makes way.

        But Ray may never have a place for it, as others use its devices, or it needs what no node has. So it is
        given up for a while where somebody waits for what it can't use.
        """
        name = model.name
        self._pending[name] = self._now_s
        more = self._in_vain[name] < self._rules.in_vain
        if (more and self._make_way(model, at_once=True, busy=self._impatient(model))) or not (
            self._starved.keys() - {name}
        ):
            return
        times = self._given_up[name].times + 1 if name in self._given_up else 1
        self._given_up[name] = GivenUp(self._asking_for(model), times, self._now_s + self._rules.again_s(times))
        self._copies[name] = 0
        self._wait(name, NO_PLACE)

    def _asking_for(self, model: Figures) -> tuple[ModelSpec, Parts, tuple[float, ...] | None]:
        return model.spec, model.parts, self._room.nodes

    def _stays_given_up(self, name: str, found: GivenUp) -> bool:
        model = self._models.get(name)
        return model is not None and not model.held and found.asked == self._asking_for(model)

    def _wait(self, name: str, why: str) -> None:
        """There is no room for its first copy."""
        self._why[name] = why
        self._lasting.add(name)
        self._crowded.add(name)

    def _hopes(self, model: Figures) -> str:
        """When there will be room for a model for which there is none. Keeps that for who has waited too long."""
        if not self._impatient(model):
            return "there is no room for it, and nothing idle that could make way"
        if not self._possible(model):
            return "there is no room for it beside what is pinned or always kept"
        self._reserved.append(model)
        return "there is no room for it until what has just been loaded has had its turn"

    def _apart(self, model: Figures) -> bool:
        """Whether a copy more finds a place on nodes that are of no use to those for whom room is kept."""
        own = self._room.of_use(model)
        others = [other for other in self._models.values() if own & self._room.of_use(other)]
        there = [other.parts for other in others for _ in range(self._copies[other.name])]
        return not any(other in self._reserved for other in others) and self._room.fits([*there, model.parts], own)

    def _possible(self, model: Figures) -> bool:
        """Whether it would fit if all others went that ever do."""
        stay = [model.parts]
        for other in self._models.values():
            pinned = min(self._copies[other.name], 1) if other.spec.pinned else 0
            stay += [other.parts] * (max(self._least[other.name], pinned) if other.name != model.name else 0)
        return self._room.fits(stay)

    def _others_go(self, model: Figures) -> bool:
        return self._make_way(model) or (self._impatient(model) and self._make_way(model, busy=True))

    def _make_way(self, model: Figures, *, at_once: bool = False, busy: bool = False) -> bool:
        """Let others go until all fits, or with `at_once` one. Whether that was possible; else none goes.

        Args:
            busy: also those that have work, and had their turn.
        """
        before, gone = dict(self._copies), []
        for victim in self._victims(model, busy=busy):
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
                waited = f", which has waited {self._waited_s(model):.0f} s" if busy else ""
                self._why[victim] = f"it makes way for {model.name}{waited}"
        self._in_vain[model.name] += 1
        return True

    def _victims(self, model: Figures, *, busy: bool) -> list[str]:
        """Copies that may go for a model that has none, by their model's name.

        The least recently used first; then those of models that would have others left, the most numerous first;
        with `busy` at last those whose turn is over, the longest there first.
        """
        others = [other for other in self._models.values() if other.name != model.name and other.ready]
        settled = [other for other in others if self._settled(other)]
        idle = [other for other in settled if not other.demand and not other.spec.pinned]
        over = [other for other in others if busy and other not in idle and self._had_its_turn(other)]
        extra = [other for other in others if (other in settled or other in over) and other not in idle]
        found = []
        for other in sorted(idle, key=lambda other: (-other.idle_s, other.name)):
            found += [other.name] * (self._copies[other.name] - self._least[other.name])
        for other in sorted(extra, key=lambda other: (-self._copies[other.name], other.name)):
            found += [other.name] * (self._copies[other.name] - max(self._least[other.name], 1))
        for other in sorted(over, key=lambda other: (-self._held_s(other), other.name)):
            last = self._copies[other.name] and not self._least[other.name] and not other.spec.pinned
            found += [other.name] if last else []
        return found

    def _held_s(self, model: Figures) -> float:
        """How long it has had a copy that is loaded."""
        return self._now_s - self._before.loaded_s.get(model.name, self._now_s)

    def _settled(self, model: Figures) -> bool:
        """Whether its copies are loaded, and have been for long enough to be let go when they are idle."""
        return not model.loading and self._held_s(model) >= self._rules.hold_s

    def _had_its_turn(self, model: Figures) -> bool:
        return self._held_s(model) >= self._rules.turn_s(self._before.took_s.get(model.name, 0.0))

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
        loaded = self._since(self._before.loaded_s, lambda model: model.ready > 0)
        coming = self._since(self._before.coming_s, lambda model: model.loading > 0 and not model.ready)
        came = self._before.coming_s.keys() & (loaded.keys() - self._before.loaded_s.keys())
        took = {name: took for name, took in self._before.took_s.items() if name in self._models}
        took |= {name: self._now_s - self._before.coming_s[name] for name in came}
        return Memory(
            asked=dict(self._copies),
            loaded_s=loaded,
            coming_s=coming,
            took_s=took,
            starved_s=self._starved,
            pressed_s=self._pressed,
            slack_s=self._slack,
            pending_s=pending,
            in_vain={name: self._in_vain[name] for name in pending if not self._models[name].held},
            given_up=self._given_up,
            nodes=self._nodes,
            same_s=self._same_s,
        )


def _asking(model: Figures) -> str:
    """Who wants a model that nobody had asked for before."""
    if model.work:
        return (
            f"{model.waiting + model.working} jobs for it" if model.waiting + model.working > 1 else "a job for it"
        )
    return "somebody asked for it"
