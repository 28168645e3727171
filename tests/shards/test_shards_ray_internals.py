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

ACTOR = "ab" * 16


def died(reason: str) -> dict[str, Any]:
    messages: Any = common_pb2
    context = messages.ActorDiedErrorContext(reason=messages.ActorDiedErrorContext.Reason.Value(reason))
    return {"State": "DEAD", "DeathCause": messages.ActorDeathCause(actor_died_error_context=context)}


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
