"""How many copies each model gets: the rules one by one, then any models and any load on a played cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpose_server.models.lifecycle import decide
from interpose_server.models.packing import packs
from interpose_server.models.rules import Figures, Memory, Room, Rules, Wanted
from interpose_server.models.spec import ModelSpec, Replicas

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp()
ONE = Room((1.0,))
RULES = Rules()


def spec(name: str = "a", least: int = 0, most: int = 1, **rest: object) -> ModelSpec:
    return ModelSpec(name=name, replicas=Replicas(min=least, max=most), **rest)


def model(name: str = "a", *, least: int = 0, most: int = 1, **rest: object) -> Figures:
    named = {key: rest.pop(key) for key in ("pinned", "idle_s_most", "schedule") if key in rest}
    if "idle_s_most" in named:
        named["idle_s"] = named.pop("idle_s_most")
    return Figures(spec(name, least, most, **named), **rest)


def long_loaded(*names: str) -> Memory:
    return Memory(loaded_s=dict.fromkeys(names, NOW - 10_000))


def copies(*models: Figures, room: Room = ONE, memory: Memory | None = None) -> dict[str, int]:
    return dict(decide(models, room, NOW, memory).copies)


def test_nobody_asks_and_nothing_is_loaded() -> None:
    assert copies(model()) == {"a": 0}


@pytest.mark.parametrize("asked", [{"waiting": 1}, {"wished": True}, {"working": 1}])
def test_a_model_somebody_asks_for_gets_a_copy(asked: dict[str, int]) -> None:
    assert copies(model(**asked)) == {"a": 1}


def test_the_least_is_there_unasked_and_the_most_is_kept_to() -> None:
    assert copies(model(least=2, most=3), room=Room((4,))) == {"a": 2}
    assert copies(model(ready=4, most=3, waiting=1000, oldest_wait_s=1000), room=Room((9,))) == {"a": 3}


def test_an_idle_model_goes_and_one_in_use_stays() -> None:
    assert copies(model(ready=2, most=2, idle_s=901)) == {"a": 0}
    assert copies(model(ready=1, idle_s=899)) == {"a": 1}
    assert copies(model(ready=1, idle_s=899, idle_s_most=60.0)) == {"a": 0}
    assert copies(model(ready=1, idle_s=901, working=1)) == {"a": 1}
    assert copies(model(ready=3, least=1, most=3, idle_s=901), room=Room((4,))) == {"a": 1}
    assert copies(model(ready=1, idle_s=math.inf, pinned=True)) == {"a": 1}
    assert copies(model(loading=1, idle_s=901)) == {"a": 1}, "it is on its way"


def test_schedules() -> None:
    hours = ("mon-fri 08:00-20:00",)
    assert copies(model(schedule=hours)) == {"a": 1}
    assert copies(model(schedule=hours, ready=1, idle_s=1e6)) == {"a": 1}
    evening = decide([model(schedule=hours, ready=1, idle_s=1e6)], ONE, NOW + 9 * 3600)
    assert evening.copies == {"a": 0}


def test_the_least_recently_used_idle_model_makes_way() -> None:
    held = [
        model("b", ready=1, idle_s=10),
        model("c", ready=1, idle_s=20),
        model("d", ready=1, idle_s=99, working=1),
    ]
    wanted = decide([model("a", waiting=1), *held], Room((3,)), NOW, long_loaded("b", "c", "d"))
    assert wanted.copies == {"a": 1, "b": 1, "c": 0, "d": 1}
    assert wanted.why["c"] == "it makes way for a" and not wanted.crowded


@pytest.mark.parametrize(
    "holder",
    [
        model("b", ready=1, idle_s=10, pinned=True),
        model("b", ready=1, idle_s=10, waiting=1),
        model("b", ready=1, idle_s=10, working=1),
        model("b", ready=1, idle_s=10, least=1),
        model("b", ready=1, idle_s=10, schedule=("mon 00:00-24:00",)),
        model("b", loading=1, idle_s=10),
    ],
)
def test_what_never_makes_way(holder: Figures) -> None:
    wanted = decide([model("a", waiting=1), holder], ONE, NOW, long_loaded("b"))
    assert wanted.copies == {"a": 0, "b": 1} and "no room" in wanted.why["a"] and wanted.crowded == {"a"}


def test_a_model_just_loaded_does_not_make_way() -> None:
    both = [model("a", waiting=1), model("b", ready=1, idle_s=30)]
    assert decide(both, ONE, NOW, Memory(loaded_s={"b": NOW - RULES.hold_s + 1})).copies == {"a": 0, "b": 1}
    assert decide(both, ONE, NOW, Memory(loaded_s={"b": NOW - RULES.hold_s})).copies == {"a": 1, "b": 0}


def test_no_more_makes_way_than_is_needed() -> None:
    held = [model("b", ready=1, idle_s=90, parts=(0.25,)), model("c", ready=1, idle_s=50, parts=(2,))]
    wanted = decide([model("a", waiting=1, parts=(2,)), *held], Room((2, 1)), NOW, long_loaded("b", "c"))
    assert wanted.copies == {"a": 1, "b": 1, "c": 0}


def test_nothing_makes_way_in_vain() -> None:
    held = [model("b", ready=1, idle_s=90), model("c", ready=1, working=1)]
    wanted = decide([model("a", waiting=1, parts=(2,)), *held], Room((2,)), NOW, long_loaded("b", "c"))
    assert wanted.copies == {"a": 0, "b": 1, "c": 1}


def test_another_models_further_copy_makes_way_but_not_its_last() -> None:
    busy = model("b", ready=2, most=2, working=2, waiting=5)
    assert copies(model("a", waiting=1), busy, room=Room((2,)), memory=long_loaded("b")) == {"a": 1, "b": 1}
    busy = replace(busy, ready=1)
    assert copies(model("a", waiting=1), busy, room=ONE, memory=long_loaded("b")) == {"a": 0, "b": 1}


def test_who_waits_longest_comes_first_and_wishes_come_after_jobs() -> None:
    first = [
        model("a", wished=True),
        model("b", waiting=9, oldest_wait_s=5),
        model("c", waiting=1, oldest_wait_s=9),
    ]
    assert copies(*first) == {"a": 0, "b": 0, "c": 1}


def test_room_is_kept_for_one_who_has_waited_very_long() -> None:
    large = model("a", waiting=1, oldest_wait_s=RULES.patience_s, parts=(2,))
    rest = [model("b", ready=1, working=1), model("c", waiting=1, oldest_wait_s=1)]
    assert copies(large, *rest, room=Room((2,))) == {"a": 0, "b": 1, "c": 0}
    assert copies(replace(large, oldest_wait_s=1), *rest, room=Room((2,))) == {"a": 0, "b": 1, "c": 1}


def test_room_that_is_of_no_use_to_one_who_has_waited_very_long_is_given_to_others() -> None:
    waited = {"waiting": 1, "oldest_wait_s": RULES.patience_s}
    fast, slow = {"resources": {"fast": 1.0}}, {"resources": {"slow": 1.0}}
    large = model("a", parts=(2,), **waited)
    busy = Figures(spec("b", **fast), ready=1, working=1, parts=(2,))
    asks = Figures(spec("c", **slow), waiting=1, oldest_wait_s=1)
    room = Room((2, 1), resources=({"fast": 9}, {"slow": 9}))
    assert copies(large, busy, asks, room=room) == {"a": 0, "b": 1, "c": 1}, "the other node is too small for a"
    alike = Figures(spec("a", **fast), parts=(2,), **waited)
    wide = replace(room, nodes=(2, 2))
    held = [busy, Figures(spec("d", **slow), ready=1, working=1)]
    assert copies(alike, *held, asks, room=wide) == {"a": 0, "b": 1, "c": 1, "d": 1}, "it hasn't what a takes"

    assert copies(large, *held, asks, room=wide)["c"] == 0, "a could lie there"
    assert copies(large, busy, asks, room=Room((2, 1)))["c"] == 0, "nobody knows what the nodes have"
    assert copies(large, busy, replace(asks, spec=spec("c")), room=room)["c"] == 0, "c could lie on a's"
    held[0] = replace(busy, parts=(1,))
    assert copies(large, *held, asks, room=room)["c"] == 0, "what is free isn't there"


def test_room_is_not_kept_for_one_that_will_never_have_it() -> None:
    large = model("a", waiting=1, oldest_wait_s=RULES.patience_s, parts=(2,))
    rest = [model("b", ready=1, pinned=True), model("c", waiting=1, oldest_wait_s=1)]
    wanted = decide([large, *rest], Room((2,)), NOW)
    assert wanted.copies == {"a": 0, "b": 1, "c": 1} and "pinned" in wanted.why["a"]


BUSY = {"ready": 1, "working": 1, "waiting": 9, "oldest_wait_s": 1e6}


def test_who_has_waited_too_long_has_a_busy_model_make_way() -> None:
    busy, memory = model("b", **BUSY), replace(long_loaded("b"), asked={"a": 0, "b": 1})
    for waited, expected in ((RULES.patience_s - 1, 0), (RULES.patience_s, 1)):
        for asks in ({"waiting": 1}, {"wished": True}, {"least": 1}):
            wanted = decide([model("a", **asks), busy], ONE, NOW, replace(memory, starved_s={"a": NOW - waited}))
            assert wanted.copies == {"a": expected, "b": 1 - expected}
    assert wanted.why["b"] == "it makes way for a, which has waited 300 s" and not wanted.crowded
    assert wanted.memory.starved_s == {"a": NOW - RULES.patience_s}, "it has no copy yet"


@pytest.mark.parametrize(
    "stays", [{"pinned": True}, {"least": 1}, {"schedule": ("mon 00:00-24:00",)}, {"ready": 0, "loading": 1}]
)
def test_some_make_way_for_nobody_however_long_that_waits(stays: dict[str, object]) -> None:
    holder = model("b", **BUSY | stays)
    memory = replace(long_loaded("b"), starved_s={"a": NOW - 1e6})
    assert decide([model("a", waiting=1), holder], ONE, NOW, memory).copies == {"a": 0, "b": 1}


def test_a_busy_model_has_its_turn_which_is_longer_than_its_loading() -> None:
    both = [model("a", waiting=1), model("b", **BUSY)]
    for took_s in (0.0, 100.0):
        turn = RULES.turn_s(took_s)
        assert turn >= max(RULES.hold_s, 2 * took_s)
        for had, expected in ((turn - 1, 0), (turn, 1)):
            memory = Memory(loaded_s={"b": NOW - had}, took_s={"b": took_s}, starved_s={"a": NOW - 1e6})
            wanted = decide(both, ONE, NOW, memory)
            assert wanted.copies == {"a": expected, "b": 1 - expected}
            assert wanted.crowded == ({"a"} if not expected else set())


def test_the_longest_there_makes_way_and_a_last_copy_after_all_others() -> None:
    asks, starved = model("a", waiting=1), {"a": NOW - RULES.patience_s}
    held = [model("b", **BUSY), model("c", **BUSY), model("d", **BUSY)]
    loaded = {"b": NOW - 400, "c": NOW - 500, "d": NOW - 450}
    memory = Memory(loaded_s=loaded, starved_s=starved)
    assert decide([asks, *held], Room((3,)), NOW, memory).copies == {"a": 1, "b": 1, "c": 0, "d": 1}
    held[2] = model("d", most=2, **BUSY | {"ready": 2})
    assert decide([asks, *held], Room((4,)), NOW, memory).copies == {"a": 1, "b": 1, "c": 1, "d": 1}
    large = replace(asks, parts=(3,))
    assert decide([large, *held], Room((4,)), NOW, memory).copies == {"a": 1, "b": 1, "c": 0, "d": 0}


def test_what_it_waited_before_it_lost_its_copy_counts_for_nothing() -> None:
    """Else the model with the longest queue would never have to wait."""
    evicted = model("b", waiting=9, oldest_wait_s=1e6)
    both = [model("a", ready=1, working=1), evicted]
    memory = replace(long_loaded("a"), asked={"a": 1, "b": 0})
    wanted = decide(both, ONE, NOW, memory)
    assert wanted.copies == {"a": 1, "b": 0} and wanted.memory.starved_s == {"b": NOW}
    assert decide(both, ONE, NOW + RULES.patience_s, wanted.memory).copies == {"a": 0, "b": 1}


def test_nobody_is_taken_for_stuck_while_others_still_leave() -> None:
    three = [model("a", waiting=1), model("b", ready=1, idle_s=100), model("c", leaving=1)]
    memory = replace(long_loaded("b"), asked={"a": 1, "b": 1}, pending_s={"a": NOW - RULES.stuck_s})
    wanted = decide(three, Room((2,)), NOW, memory)
    assert wanted.copies["b"] == 1 and wanted.memory.pending_s["a"] == NOW


def press(seconds: float, room: Room, **figures: object) -> Wanted:
    """What is decided after a press of so many seconds."""
    memory = Memory(pressed_s={"a": NOW - seconds})
    return decide([model(most=8, working=1, **figures)], room, NOW, memory)


def test_a_press_that_lasts_brings_copies() -> None:
    assert press(RULES.press_s - 1, Room((8,)), ready=1, waiting=65).copies == {"a": 1}
    assert press(RULES.press_s, Room((8,)), ready=1, waiting=65).copies == {"a": 2}
    assert press(RULES.press_s, Room((8,)), ready=1, waiting=1, oldest_wait_s=11).copies == {"a": 2}
    assert press(RULES.press_s, Room((8,)), ready=1, waiting=1, oldest_wait_s=9).copies == {"a": 1}
    assert press(RULES.press_s, Room((8,)), ready=3, waiting=1000).copies == {"a": 6}, "at most twice as many"
    assert press(RULES.press_s, Room((4,)), ready=3, waiting=1000).copies == {"a": 4}, "as far as there is room"
    assert press(RULES.press_s, Room((8,)), ready=1, loading=1, waiting=1000).copies == {"a": 2}, "one is coming"


def test_further_copies_go_when_fewer_do_for_long() -> None:
    three = model(ready=3, most=3, working=1, busy=0.3)
    for since, expected in ((NOW - 899, 3), (NOW - 900, 2)):
        assert decide([three], Room((3,)), NOW, Memory(slack_s={"a": since})).copies == {"a": expected}
    assert decide([replace(three, busy=0.5)], Room((3,)), NOW, Memory(slack_s={"a": 0})).copies == {"a": 3}


def test_by_hand() -> None:
    assert copies(model(ready=1, idle_s=1, evicted=True)) == {"a": 0}
    assert copies(model(ready=1, idle_s=1, evicted=True, working=1)) == {"a": 1}
    assert copies(model(ready=1, idle_s=1, evicted=True, pinned=True)) == {"a": 1}


def test_a_failed_model_is_left_alone_and_a_removed_one_finishes() -> None:
    assert copies(model(least=1, wished=True, failed=True)) == {"a": 0}
    assert copies(model(ready=1, most=2, waiting=500, failed=True)) == {"a": 1}
    assert copies(model(ready=1, least=1, draining=True)) == {"a": 0}
    assert copies(model(ready=1, waiting=1, draining=True)) == {"a": 1}
    assert copies(model(waiting=1, draining=True)) == {"a": 1}


def test_what_is_larger_than_all_devices_is_told_whether_or_not_anybody_asks() -> None:
    for asks in ({"waiting": 1}, {}):
        big = model(parts=(2.0,) * 3, **asks)
        told = decide([big], Room((4, 1)), NOW, Memory(nodes=(1, 4)))
        assert told.copies == {"a": 0} and told.impossible.keys() == {"a"}
        assert (
            "3 parts of 2 devices, 6 in all; the cluster has 5 devices, its largest node 4" in told.impossible["a"]
        )
        failed = decide([replace(big, failed=True, too_large=True)], Room((4, 1)), NOW, told.memory)
        assert not failed.impossible, "it is told"
        for room in (Room((4, 2)), Room((4, 1), grows=True), Room(None)):
            fits = decide([big], room, NOW, Memory(nodes=room.nodes and tuple(sorted(room.nodes))))
            assert fits.copies == {"a": len(asks)} and not fits.impossible


def test_a_cluster_whose_nodes_are_joining_is_not_yet_too_small() -> None:
    """Its head is there first, with no devices at all: who waits then is told nothing that is over in a moment."""
    big, memory, told = model(waiting=1, parts=(4.0,)), Memory(), {}
    nodes = {0: (), 10: (2,), 25: (2, 1), 44: (1, 2), 45: (1, 2), 46: (2, 1, 1)}
    for now, there in nodes.items():
        wanted = decide([big], Room(there), NOW + now, memory)
        assert wanted.copies == {"a": 0} and wanted.crowded == {"a"}
        memory, told[now] = wanted.memory, bool(wanted.impossible)
    assert told == {0: False, 10: False, 25: False, 44: False, 45: True, 46: False}


@pytest.mark.parametrize(
    "room, mended", [(Room((4, 1)), set()), (Room((4, 2)), {"a"}), (Room((4,), grows=True), {"a"})]
)
def test_that_is_over_once_there_is_room(room: Room, mended: set[str]) -> None:
    big = model(waiting=1, parts=(2.0,) * 3, failed=True, too_large=True)
    assert decide([big, model("b", failed=True)], room, NOW).mended == mended


def test_jobs_of_a_model_that_was_loaded_before_wait_for_a_node_that_is_away() -> None:
    big = replace(model(waiting=1, parts=(2.0,) * 3), loaded=True)
    told = decide([big], Room((4, 1)), NOW, Memory(nodes=(1, 4)))
    assert not told.impossible and told.crowded == {"a"} and "the cluster has 5 devices" in told.why["a"]


def test_a_copy_that_finds_no_room_has_another_make_way() -> None:
    both = [model("a", waiting=1), model("b", ready=1, idle_s=100)]
    memory = replace(long_loaded("b"), asked={"a": 1, "b": 1}, pending_s={"a": NOW - RULES.stuck_s})
    wanted = decide(both, Room((2,)), NOW, memory)
    assert wanted.copies == {"a": 1, "b": 0} and wanted.memory.pending_s == {"a": NOW}
    soon = replace(memory, pending_s={"a": NOW - RULES.stuck_s + 1})
    assert decide(both, Room((2,)), NOW, soon).copies == {"a": 1, "b": 1}


def test_a_copy_that_finds_none_is_given_up_for_those_who_wait() -> None:
    both = [model("a", waiting=1), model("b", waiting=1)]
    memory = Memory(asked={"a": 1}, pending_s={"a": NOW - RULES.stuck_s}, starved_s={"a": NOW - 500, "b": NOW - 9})
    first = decide(both, ONE, NOW, memory)
    assert first.copies == {"a": 0, "b": 0} and "no place" in first.why["a"] and first.crowded == {"a", "b"}
    then = decide(both, ONE, NOW + 1, first.memory)
    assert then.copies == {"a": 0, "b": 1}, "it comes first no more"
    alone = replace(memory, starved_s={"a": NOW - 500})
    assert decide([both[0], model("b")], ONE, NOW, alone).copies == {"a": 1, "b": 0}, "nobody minds"


def test_one_that_was_given_up_comes_again_soon_if_it_asks_for_something_else() -> None:
    given_up = decide(
        [model("a", waiting=1), model("b", waiting=1)],
        ONE,
        NOW,
        Memory(asked={"a": 1}, pending_s={"a": NOW - RULES.stuck_s}, starved_s={"a": NOW - 500, "b": NOW - 9}),
    ).memory
    for times, one in (
        (1, given_up),
        (2, replace(given_up, given_up={"a": replace(given_up.given_up["a"], times=2)})),
    ):
        assert RULES.again_s(times) == RULES.patience_s * times
        assert decide([model("a", waiting=1)], ONE, NOW + 9, one).copies == {"a": 0}
        assert decide([model("a", waiting=1)], Room((2.0,)), NOW + 9, one).copies == {"a": 1}, (
            "there are more nodes"
        )
        mended = Figures(spec("a", resources={"there": 1.0}), waiting=1)
        assert decide([mended], ONE, NOW + 9, one).copies == {"a": 1}
    assert decide([model("a", waiting=1)], ONE, NOW + RULES.patience_s, given_up).copies == {"a": 1}
    assert RULES.again_s(99) == RULES.again_s(50) < 2 * 3600


def test_copies_that_fall_silent_for_a_moment_stay_asked_for() -> None:
    memory = Memory(asked={"a": 1})
    first = decide([model(idle_s=5)], ONE, NOW, memory)
    assert first.copies == {"a": 1}
    assert decide([model(idle_s=5)], ONE, NOW + RULES.stuck_s, first.memory).copies == {"a": 0}
    pinned = decide([model(idle_s=5, pinned=True)], ONE, NOW + RULES.stuck_s, first.memory)
    assert pinned.copies == {"a": 1}


@pytest.mark.parametrize(
    "parts, nodes, expected",
    [
        ([(1.0,)] * 3, (2, 1), True),
        ([(2.0,), (2.0,)], (3, 1), False),
        ([(1.0, 1.0, 1.0)], (2, 1), True),
        ([(0.5,), (0.6,)], (1,), False),
        ([(0.5,), (0.5,), (0.1,) * 3], (1, 1), True),
        ([(1 / 3,)] * 3, (1,), True),
        ([(2.0,), (0.5,)], (2,), False),
        ([(0.5,)], (0.5,), True),
        ([(0.0,)] * 9, (), True),
        ([(1.0,)], (), False),
    ],
)
def test_packing(parts: list[tuple[float, ...]], nodes: tuple[float, ...], expected: bool) -> None:
    assert packs(parts, nodes) is expected


# -- any models, any load --------------------------------------------------------------------------------------


@dataclass
class Played:
    """One model of a cluster that is played: it does as it is told, with some delay."""

    spec: ModelSpec
    parts: tuple[float, ...]
    wanted: int = 0
    ready: int = 0
    since_s: float = math.inf
    """Since when a copy has been ready."""
    loading: list[float] = field(default_factory=list)
    """When each copy under way will be ready."""
    leaving: list[float] = field(default_factory=list)
    """When each copy that was told to go will have ended what it runs."""
    starved_s: float = math.inf
    """Since when it has had no copy, though jobs wait."""
    longest_s: float = 0.0
    """It had none for."""
    jobs: list[float] = field(default_factory=list)
    """When each waiting job came."""
    ends: list[float] = field(default_factory=list)
    used_s: float = -math.inf
    loads: list[float] = field(default_factory=list)
    """When it went from no copy to one."""


class Cluster:
    """Serves jobs one at a time a copy, and checks what is promised at each step."""

    def __init__(self, models: list[Played], nodes: tuple[float, ...], load_s: float, job_s: float) -> None:
        self.models = {played.spec.name: played for played in models}
        self.room = Room(nodes)
        self.load_s, self.job_s = load_s, job_s
        self.now = NOW
        self.step_s = 0.0
        self.memory = Memory()

    def figures(self, played: Played) -> Figures:
        return Figures(
            played.spec,
            ready=played.ready,
            loading=len(played.loading),
            leaving=len(played.leaving),
            waiting=len(played.jobs),
            working=len(played.ends),
            oldest_wait_s=self.now - min(played.jobs, default=self.now),
            idle_s=self.now - played.used_s,
            busy=min(len(played.ends) / played.ready, 1.0) if played.ready else 0.0,
            parts=played.parts,
        )

    def step(self, arrivals: dict[str, int], by_s: float = 1.0) -> Wanted:
        self.now += by_s
        self.step_s = max(self.step_s, by_s)
        for played in self.models.values():
            came = [at for at in played.loading if at <= self.now]
            played.loading = [at for at in played.loading if at > self.now]
            played.leaving = [at for at in played.leaving if at > self.now]
            played.since_s = self.now if came and not played.ready else played.since_s
            played.ready += len(came)
            played.used_s = self.now if came or played.ends or played.jobs else played.used_s
            played.ends = [at for at in played.ends if at > self.now]
            played.jobs += [self.now] * arrivals.get(played.spec.name, 0)
            while played.jobs and len(played.ends) < played.ready:
                played.jobs.pop(0)
                played.ends.append(self.now + self.job_s)
            waits = played.jobs and not played.ready
            played.starved_s = min(played.starved_s, self.now) if waits else math.inf
            played.longest_s = max(played.longest_s, self.now - played.starved_s)
        told = [self.figures(played) for played in self.models.values()]
        wanted = decide(told, self.room, self.now, self.memory)
        self.check(told, wanted)
        self.memory = wanted.memory
        for name, count in wanted.copies.items():
            self.obey(self.models[name], count)
        for played in self.models.values():
            self.begin(played)
        return wanted

    def check(self, told: list[Figures], wanted: Wanted) -> None:
        for figures in told:
            count, held = wanted.copies[figures.name], figures.held
            assert 0 <= count <= figures.spec.replicas.max
            if held and not count:
                assert not figures.spec.pinned and not figures.spec.replicas.min
            if figures.ready and not count and figures.work:
                # It may have loaded for a step longer than was seen.
                turn_s = RULES.turn_s(max(self.load_s - self.step_s, 0.0))
                assert self.now - self.models[figures.name].since_s >= turn_s, "its turn"
                assert self.impatient(), "nobody had waited for long"
        parts = [figures.parts for figures in told for _ in range(wanted.copies[figures.name])]
        assert packs(parts, self.room.nodes or ())

    def impatient(self) -> bool:
        """Whether somebody has waited too long for a copy, but for the step in which that was seen."""
        return any(self.now - one.starved_s >= RULES.patience_s - self.step_s for one in self.models.values())

    def obey(self, played: Played, count: int) -> None:
        played.wanted = count
        while played.ready + len(played.loading) > count:
            if played.loading:
                played.loading.pop()
            else:
                played.ready -= 1
                played.leaving.append(max(played.ends, default=self.now))

    def begin(self, played: Played) -> None:
        """Load what is wanted, where there is room by now; none has further resources."""
        while played.ready + len(played.loading) < played.wanted and not played.spec.resources:
            there = [
                one.parts
                for one in self.models.values()
                for _ in range(one.ready + len(one.loading) + len(one.leaving))
            ]
            if not packs([*there, played.parts], self.room.nodes or ()):
                return
            if not (played.ready or played.loading):
                played.loads.append(self.now)
            played.loading.append(self.now + self.load_s)


PARTS = st.sampled_from([(1.0,), (0.5,), (0.25,), (2.0,), (1.0, 1.0), (0.0,)])


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    nodes = tuple(draw(st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=1, max_size=3)))
    models = []
    for name in "abcd"[: draw(st.integers(1, 4))]:
        least = draw(st.sampled_from([0, 0, 0, 1]))
        most = draw(st.integers(max(least, 1), 3))
        pinned, idle_s = draw(st.booleans()), draw(st.sampled_from([5.0, 60.0, 900.0]))
        models.append(Played(spec(name, least, most, pinned=pinned, idle_s=idle_s), draw(PARTS)))
    return Cluster(models, nodes, draw(st.sampled_from([0.5, 3.0, 30.0])), draw(st.sampled_from([0.5, 4.0])))


@settings(max_examples=60, deadline=None)
@given(clusters(), st.data())
def test_nothing_with_work_goes_nor_anything_pinned_and_all_fits(cluster: Cluster, data: st.DataObject) -> None:
    names = sorted(cluster.models)
    for _ in range(data.draw(st.integers(5, 40))):
        arrivals = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from([1, 5, 200]), max_size=2))
        cluster.step(arrivals, data.draw(st.sampled_from([1.0, 7.0, 100.0])))


@settings(max_examples=60, deadline=None)
@given(clusters(), st.data())
def test_whoever_waits_is_served_in_the_end(cluster: Cluster, data: st.DataObject) -> None:
    """Each job is run, unless what holds the room is there to stay, or the room was never enough."""
    names = sorted(cluster.models)
    for _ in range(data.draw(st.integers(1, 15))):
        cluster.step(data.draw(st.dictionaries(st.sampled_from(names), st.integers(1, 5), max_size=3)))
    for _ in range(4 * 150):
        cluster.step({}, 2.0)
        if not any(played.jobs for played in cluster.models.values()):
            return
    staying = [
        played.parts
        for played in cluster.models.values()
        for _ in range(max(played.spec.replicas.min, played.spec.pinned and min(played.ready, 1)))
    ]
    for played in cluster.models.values():
        assert not played.jobs or not packs([*staying, played.parts], cluster.room.nodes or ())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.5, 5.0]))
def test_two_models_that_want_one_device_take_turns_no_faster_than_the_hold(seed: int, load_s: float) -> None:
    cluster = Cluster([Played(spec("a"), (1.0,)), Played(spec("b"), (1.0,))], (1.0,), load_s, 0.5)
    chosen = seed
    for _ in range(1000):
        chosen = (1103515245 * chosen + 12345) % 2**31
        waiting = {name: 1 for name, bit in (("a", 8), ("b", 9)) if chosen >> bit & 1 and chosen >> 12 & 1}
        cluster.step(waiting)
    loads = sorted(cluster.models["a"].loads + cluster.models["b"].loads)
    assert len(loads) > 5, "both come to be loaded"
    assert all(later - earlier >= RULES.hold_s for earlier, later in pairwise(loads))


@pytest.mark.parametrize(
    "devices, contend, pinned, load_s, job_s",
    [(1, 2, 0, 0.5, 0.5), (1, 3, 0, 60.0, 0.5), (2, 4, 1, 20.0, 40.0), (2, 3, 0, 20.0, 0.5), (3, 6, 0, 60.0, 40.0)],
)
def test_nobody_waits_longer_than_said_however_much_the_others_have_to_do(
    devices: int, contend: int, pinned: int, load_s: float, job_s: float
) -> None:
    """More models than devices, each under a load that never ends, of which no copy ever has enough."""
    names = [f"m{index}" for index in range(pinned + contend)]
    models = [Played(spec(name, most=2, pinned=index < pinned), (1.0,)) for index, name in enumerate(names)]
    cluster = Cluster(models, (float(devices),), load_s, job_s)
    for name in names:
        cluster.step({name: 1}, 3.0)  # The pinned come first.
    for _ in range(2400):
        cluster.step({played.spec.name: 3 for played in models if len(played.jobs) < 3}, 3.0)
    free, others = devices - pinned, models[pinned:]
    turn = RULES.turn_s(load_s) + load_s + job_s + 9
    bound = RULES.patience_s + math.ceil((contend - free) / free) * turn + load_s + job_s
    longest = max(played.longest_s for played in models)
    assert RULES.patience_s <= longest <= bound
    assert all(len(played.loads) == 1 for played in models[:pinned])
    assert all(len(played.loads) > 2 for played in others), "each has its turns"
    turns = sum(len(played.loads) for played in others)
    most = (cluster.now - NOW) / RULES.turn_s(load_s - cluster.step_s)
    assert turns <= free * (1 + most), "and they are long"


@pytest.mark.parametrize("devices, others", [(1, 1), (2, 2), (3, 5)])
def test_what_ray_has_no_place_for_costs_the_others_little(devices: int, others: int) -> None:
    odd = Played(spec("odd", resources={"nobody-has": 1.0}), (1.0,))
    models = [Played(spec(f"m{index}"), (1.0,)) for index in range(others)]
    cluster = Cluster([odd, *models], (float(devices),), 5.0, 0.5)
    held, steps = 0, 4 * 3600 // 3
    for _ in range(steps):
        cluster.step({played.spec.name: 1 for played in (odd, *models) if len(played.jobs) < 3}, 3.0)
        held += sum(played.ready for played in models)
    assert not odd.loads and all(len(played.jobs) <= 3 for played in models)
    assert held > 0.8 * steps * min(devices, others)
    assert max(played.longest_s for played in models) < 1800
