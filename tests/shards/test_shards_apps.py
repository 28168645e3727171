"""Models are deployed, and taken down, on a Serve that is played."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest
from interpose.errors import ConfigError
from interpose_server.broker.failures import reason_of
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import Settings
from interpose_server.shards.choosing import Chosen, chosen
from interpose_server.shards.naming import app_name
from rig import Clock

if TYPE_CHECKING:
    from interpose_server.shards.apps import Applied, State

SERVES_OWN = pytest.mark.filterwarnings("ignore::DeprecationWarning")
"""Warnings of Serve, as it is imported."""


class Notes:
    def __init__(self) -> None:
        self.kept: Any = {"a": 1, "b": 2, "c": 3}

    def read(self, name: str) -> Any:
        return self.kept

    def write(self, name: str, value: Any) -> None:
        self.kept = value


class Serve:
    """A's copy goes in a moment, and B's hangs."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.applications = {app_name(model): None for model in "abc"}
        self.asked_at: dict[str, float] = {}

    def status(self) -> Serve:
        if self.clock.now > self.asked_at.get(app_name("a"), float("inf")) + 0.2:
            self.applications.pop(app_name("a"), None)
        return self

    def delete(self, name: str, _blocking: bool = True) -> None:
        assert not _blocking, "it would raise after a minute"
        self.asked_at[name] = self.clock.now


@SERVES_OWN
@pytest.mark.parametrize("models, wait_s, expected_s", [("ab", 0.6, 0.6), ("a", 5.0, 0.2), ("ab", 0.0, 0.0)])
def test_a_copy_that_hangs_is_waited_for_no_longer_than_said(
    monkeypatch: pytest.MonkeyPatch, models: str, wait_s: float, expected_s: float
) -> None:
    from interpose_server.shards import apps

    clock, notes = Clock(), Notes()
    serve = Serve(clock)
    monkeypatch.setattr(apps, "time", clock)
    monkeypatch.setattr(apps, "serve", serve)
    monkeypatch.setattr(apps, "Notes", lambda: notes)
    monkeypatch.setattr(apps, "states", lambda: {**notes.kept})
    began = clock.now
    apps.remove([*models, "unknown"], wait_s)
    assert expected_s <= clock.now - began < expected_s + 1
    assert {*serve.asked_at} == {app_name(model) for model in models}
    assert notes.kept.keys() == {*"abc"} - {*models}


class Lab:
    """A cluster that is played; of what was deployed a copy runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from interpose_server.shards import apps, cluster

        self.notes = Notes()
        self.notes.kept = {}
        self.nodes: dict[str, dict[str, float]] = {"n": {"CPU": 4.0}}
        self.status, self.running = "RUNNING", 1
        self.deployed: list[str] = []
        monkeypatch.setattr(apps, "Notes", lambda: self.notes)
        monkeypatch.setattr(apps, "states", lambda: dict.fromkeys(self.notes.kept, self._state()))
        monkeypatch.setattr(apps, "total", lambda: self.nodes)
        monkeypatch.setattr(cluster, "total", lambda: self.nodes)
        monkeypatch.setattr(apps, "has_room", lambda *_: False)
        monkeypatch.setattr(apps.serve, "run_many", self._run_many)

    def _state(self) -> State:
        from interpose_server.shards.apps import State

        return State(self.status, "", self.running, self.running, held_back=None)

    def _run_many(self, targets: Sequence[Any], **_: object) -> None:
        self.deployed += [target.name for target in targets]

    def apply(self, *specs: ModelSpec) -> Applied:
        from interpose_server.shards import apps

        self.deployed.clear()
        return apps.apply(specs, Settings())


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(monkeypatch)


def spec(name: str = "a", **changes: Any) -> ModelSpec:
    return ModelSpec(**{"name": name, "devices": 1, **changes})


@SERVES_OWN
@pytest.mark.parametrize(
    "odd", [{"resources": {"GPU": 1}}, {"resources": {"fast": -1}}, {"settings": {"worker_threads": 10**400}}]
)
def test_a_model_that_ray_does_not_take_holds_up_no_other(lab: Lab, odd: dict[str, Any]) -> None:
    """As an entry of an earlier version may say."""
    applied = lab.apply(*(spec(name, **(odd if name == "b" else {})) for name in "abc"))
    assert lab.deployed == [app_name("a"), app_name("c")] and applied.changed == ["a", "c"]
    assert lab.notes.kept.keys() == {"a", "c"} and not applied.held_back
    (refused,) = applied.refused.values()
    assert isinstance(refused, ConfigError) and "b asks for" in refused.message


@SERVES_OWN
def test_a_model_that_cannot_be_planned_holds_up_no_other(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from interpose_server.shards import apps

    def odd(spec: ModelSpec, cards: Any) -> Chosen:
        if spec.name == "b":
            raise AttributeError("a library's\nown")
        return chosen(spec, cards)

    monkeypatch.setattr(apps, "chosen", odd)
    applied = lab.apply(*map(spec, "abc"))
    assert applied.changed == ["a", "c"]
    assert reason_of(why := applied.refused["b"]) == "crashed"
    assert why.message == "where b lies can't be planned: AttributeError: a library's"


@SERVES_OWN
@pytest.mark.parametrize(
    "change, reason, words",
    [
        ({"devices": 5}, "too_large", "a copy takes 5 cores; the cluster has 4 cores, its largest node 4"),
        ({"placement": "blocks", "shards": 9}, "too_large", "9 parts of 1 core, 9 in all; the cluster has 4 cores"),
        ({"resources": {"a100": 1}}, "misconfigured", "no node has what a copy takes: 1 CPU, 1 a100"),
        ({"settings": {"worker_threads": 10**400}}, "unsupported", "Ray doesn't take what a copy of a asks for"),
    ],
)
@pytest.mark.parametrize("status", ["RUNNING", "DEPLOYING", "DEPLOY_FAILED"])
def test_what_cannot_be_replaces_nothing(
    lab: Lab, change: dict[str, Any], reason: str, words: str, status: str
) -> None:
    lab.apply(spec())
    before, lab.status = dict(lab.notes.kept["a"]), status
    applied = lab.apply(spec(**change), spec("b"))
    assert lab.deployed == [app_name("b")] and applied.changed == ["b"] and not applied.refused
    told = lab.notes.kept["a"]["held_back"]
    assert told["reason"] == reason and words in told["detail"] and words in applied.held_back["a"].message
    assert told["served"]
    assert lab.notes.kept["a"] == before | {"held_back": told}, "what is counted on is what is deployed"
    assert not lab.apply(spec(**change), spec("b")).held_back, "it is news once"

    lab.status = "RUNNING"
    assert lab.apply(spec(), spec("b")).changed == [], "corrected, it is what runs"
    assert lab.notes.kept["a"] == before


@SERVES_OWN
def test_what_could_not_be_is_deployed_once_there_is_room(lab: Lab) -> None:
    lab.apply(spec())
    large = spec(devices=5)
    assert lab.apply(large).held_back
    lab.nodes["m"] = {"CPU": 5.0}
    assert lab.apply(large).changed == ["a"]
    assert lab.notes.kept["a"]["held_back"] is None and lab.notes.kept["a"]["parts"] == [5]


@SERVES_OWN
@pytest.mark.parametrize("devices", [1, None])
def test_while_gpus_are_away_nothing_moves_to_cores(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, devices: float | None
) -> None:
    """Of one whose size says where it lies, nobody can say where that is."""
    from interpose_server.shards import apps

    there = {"n": {"CPU": 4.0}, "m": {"CPU": 8.0, "GPU": 2.0}}
    lab.nodes |= there
    planned = Chosen(spec(placement="blocks", shards=2), 0.2)
    monkeypatch.setattr(
        apps,
        "chosen",
        lambda one, cards: planned if one.devices is None and "m" in lab.nodes else chosen(one, lambda _: None),
    )
    lab.apply(spec(devices=devices))
    before = dict(lab.notes.kept["a"])
    del lab.nodes["m"]
    assert lab.apply(spec(devices=devices)).changed == []
    assert lab.notes.kept["a"]["mark"] == before["mark"]
    lab.nodes |= there
    assert lab.apply(spec(devices=devices)).changed == []
    assert lab.notes.kept["a"] == before


@SERVES_OWN
@pytest.mark.parametrize("change", [{"devices": 5}, {"resources": {"fast": 1}}])
def test_what_is_new_and_cannot_be_waits_for_nodes(lab: Lab, change: dict[str, Any]) -> None:
    applied = lab.apply(spec(**change))
    assert applied.changed == ["a"] and not applied.held_back, "it has copies as soon as there are nodes"
    told = lab.notes.kept["a"]["held_back"]
    assert told["detail"] and not told["served"]
    lab.running, lab.nodes["m"] = 0, {"CPU": 5.0, "fast": 1.0}
    assert not lab.apply(spec(**change)).changed and lab.notes.kept["a"]["held_back"] is None
    del lab.nodes["m"]
    assert not lab.apply(spec(**change)).changed and lab.notes.kept["a"]["held_back"] == told
    lab.running = 1
    assert not lab.apply(spec(**change)).changed and lab.notes.kept["a"]["held_back"] is None, "one runs"


@SERVES_OWN
def test_an_update_that_only_its_own_copies_are_in_the_way_of_is_deployed(lab: Lab) -> None:
    lab.apply(spec(devices=4), spec("b", devices=0.5))
    assert lab.apply(spec(devices=3), spec("b", devices=0.5)).changed == ["a"]


@SERVES_OWN
@pytest.mark.parametrize("kept", [{"pinned": True}, {"replicas": {"min": 1}}])
def test_what_others_always_keep_is_never_free(lab: Lab, kept: dict[str, Any]) -> None:
    lab.apply(spec(), spec("b", **kept))
    (why,) = lab.apply(spec(devices=4), spec("b", **kept)).held_back.values()
    assert "its largest node 4, and other models always keep 1 core of that" in why.message
    assert lab.apply(spec(devices=3), spec("b", **kept)).changed == ["a"]
    assert lab.apply(spec(devices=4), spec("b")).changed == ["a"], "it goes when it is idle"


@SERVES_OWN
def test_what_serve_did_not_take_is_deployed_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from interpose_server.shards import apps

    lab.apply(spec())

    def away(*_: object, **__: object) -> None:
        raise RuntimeError("the controller is away")

    with monkeypatch.context() as patched:
        patched.setattr(apps.serve, "run_many", away)
        with pytest.raises(RuntimeError):
            lab.apply(spec(devices=2))
    assert lab.apply(spec(devices=2)).changed == ["a"]
    assert lab.apply(spec(devices=2)).changed == []
