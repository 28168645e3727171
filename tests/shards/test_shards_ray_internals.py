"""What is used of Ray beyond its public names: it is there, and if it isn't, that is said."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from interpose.errors import ConfigError
from interpose_server.shards import orphans, ray_internals
from interpose_server.shards.ray_internals import RAY, Death
from ray._private import state
from ray.core.generated import common_pb2
from ray.exceptions import RayActorError

ACTOR = "ab" * 16


def died(reason: str) -> dict[str, Any]:
    messages: Any = common_pb2
    context = messages.ActorDiedErrorContext(reason=messages.ActorDiedErrorContext.Reason.Value(reason))
    return {"State": "DEAD", "DeathCause": messages.ActorDeathCause(actor_died_error_context=context)}


SERVES_OWN = pytest.mark.filterwarnings("ignore::DeprecationWarning")
"""Warnings of Serve, as it is imported."""


@SERVES_OWN
def test_this_ray_has_all_of_it() -> None:
    RAY.check()


@pytest.mark.parametrize(
    ("found", "death"),
    [
        ({}, None),
        ({"State": "ALIVE"}, None),
        (died("RAY_KILL"), Death.KILLED),
        (died("WORKER_DIED"), Death.FAILED),
        (died("NODE_DIED"), Death.FAILED),
    ],
)
def test_how_an_actor_died(monkeypatch: pytest.MonkeyPatch, found: Mapping[str, Any], death: Death | None) -> None:
    monkeypatch.setattr(state, "actors", lambda actor_id: found)
    assert ray_internals.death(ACTOR) is death


def test_another_form_of_answer_costs_the_haste_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(state, "actors", lambda actor_id: {"State": "DEAD", "DeathCause": SimpleNamespace()})
    with pytest.raises(ConfigError, match=r"how actors died in another form.*tried with ray 2\.60"):
        ray_internals.death(ACTOR)
    orphans._untold.cache_clear()
    assert orphans._death(f"node#{ACTOR}") is None
    assert orphans._death(f"node#{ACTOR}") is None
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "until their leases end" in caplog.text


def serve_tells(monkeypatch: pytest.MonkeyPatch, *replicas: Mapping[str, Any]) -> None:
    from ray.serve.schema import ApplicationStatus

    tiny = {"status": ApplicationStatus.RUNNING, "deployments": {"model": {"replicas": replicas}}}
    told = {
        "applications": {"tiny": tiny, "interpose-gone": {"status": ApplicationStatus.DELETING, "deployments": {}}}
    }
    client = SimpleNamespace(get_serve_details=lambda: told)
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: client)


@SERVES_OWN
def test_replicas_that_serve_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Serve's own words, as its controller makes them."""
    from ray.serve._private.common import ReplicaState
    from ray.serve.schema import ReplicaDetails

    def told(actor: str, state: ReplicaState) -> Mapping[str, Any]:
        details = ReplicaDetails(
            actor_id=actor, actor_name=f"r{actor}", replica_id="r", state=state, start_time_s=0
        )
        return details.model_dump(exclude_unset=True)

    every = {f"{number:032x}": state for number, state in enumerate(ReplicaState)}
    serve_tells(monkeypatch, *(told(actor, state) for actor, state in every.items()))
    stopping = frozenset(actor for actor, state in every.items() if state is ReplicaState.STOPPING)
    assert ray_internals.stopping() == ({"interpose-gone"}, stopping, {f"r{actor}" for actor in stopping})
    assert len(stopping) == 1


@SERVES_OWN
def test_replicas_that_wait_for_a_place_and_are_wanted_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that has no process yet Serve tells no actor, and of an application that is deleted no replicas."""
    from ray.serve._private.common import ReplicaState
    from ray.serve.schema import ReplicaDetails

    names = {state: f"SERVE_REPLICA::interpose-a#model#{state.name.lower()}" for state in ReplicaState}
    ours, others = names[ReplicaState.STOPPING], "SERVE_REPLICA::shop#model#a"
    told = [(name, state) for state, name in names.items()] + [(others, ReplicaState.STOPPING)]
    details = [ReplicaDetails(actor_name=name, replica_id="r", state=state, start_time_s=0) for name, state in told]
    serve_tells(monkeypatch, *(one.model_dump(exclude_unset=True) for one in details))
    gone, stays = "SERVE_REPLICA::interpose-gone#model#a", "SERVE_REPLICA::interpose-gone-too#model#a"
    waiting = [*names.values(), others, gone, stays, "SERVE_REPLICA::gone#model#a", ""]
    assert orphans.unplaced(orphans._stopping(), waiting) == [ours, gone]


@SERVES_OWN
def test_where_serve_does_not_tell_none_is_ended_early(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serve_tells(monkeypatch, {"actor": ACTOR})
    orphans._untold.cache_clear()
    assert orphans._stopping() == orphans._stopping() == ray_internals.Stopping()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "ended after 600 s" in caplog.text


@SERVES_OWN
def test_while_serves_controller_is_away_none_is_ended_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise RayActorError

    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: SimpleNamespace(get_serve_details=away))
    assert orphans._stopping() == ray_internals.Stopping()
