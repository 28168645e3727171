"""What `deploy up` says of models on their way, and how long it waits for them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from interpose.errors import ConfigError
from interpose_server.broker.connect import Broker
from interpose_server.broker.states import ModelState
from interpose_server.models.inventory import HeldBack
from interpose_server.models.spec import ModelSpec, Replicas
from interpose_server.shards import awaiting
from interpose_server.shards.awaiting import Loading
from rig import tiny_manifest

SPEC = ModelSpec(name="big", replicas=Replicas(min=1))


async def test_a_model_without_room_is_told_of_and_not_waited_for_for_ever(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    loading = Loading([SPEC], told.append, dict)
    await broker.specs.put(SPEC)
    await broker.models.note({"big": "11-26 05:50 0 wanted: a copy takes 3 devices; the nodes have 2"})
    await broker.models.crowd({"big": True})
    assert not await loading.over(broker)
    assert told == ["big: cold: a copy takes 3 devices; the nodes have 2"]
    monkeypatch.setattr(awaiting, "NO_ROOM_S", 0.0)
    await asyncio.sleep(0.01)
    assert await loading.over(broker)
    assert loading.failed == ["big"]
    assert "loads it as soon as there is; interpose deploy status shows" in told[1]


@dataclass
class Serve:
    """What Serve says of the one application."""

    status: str
    message: str = ""
    held_back: HeldBack | None = None

    def states(self) -> dict[str, Serve]:
        return {"big": self}


async def updating(broker: Broker) -> tuple[Loading, Serve, list[str]]:
    """A new version on its way, while a copy of the one before runs jobs; and what is told of it."""
    told: list[str] = []
    serve = Serve("DEPLOYING")
    await broker.specs.put(SPEC)
    await broker.models.publish("big", "old", tiny_manifest(), "")
    return Loading([SPEC], told.append, serve.states), serve, told


async def test_it_is_ready_once_the_version_that_is_wanted_is(broker: Broker) -> None:
    loading, serve, told = await updating(broker)
    assert not await loading.over(broker) and not told
    serve.status = "RUNNING"
    assert await loading.over(broker)
    assert told == ["big: ready"] and not loading.failed


async def test_a_version_that_fails_beside_the_one_before_is_told_with_the_reason(broker: Broker) -> None:
    loading, serve, told = await updating(broker)
    assert not await loading.over(broker)
    await broker.models.announce("big", "new", ModelState.FAILED, ConfigError("there is no folder /nowhere"))
    serve.status = "DEPLOY_FAILED"
    assert await loading.over(broker)
    assert loading.failed == ["big"]
    (line,) = told
    assert (
        line.startswith("big: failed: ")
        and "there is no folder /nowhere" in line
        and "of before, still runs" in line
    )


@pytest.mark.parametrize(
    "served, then", [(True, "The version before is served on"), (False, "It can be loaded once")]
)
async def test_an_entry_that_cannot_be_is_told_at_once_and_what_was_before_is_not_taken_for_it(
    broker: Broker, served: bool, then: str
) -> None:
    loading, serve, told = await updating(broker)
    size = "a copy takes 9 cores; the cluster has 4 cores"
    serve.status, serve.held_back = "RUNNING", HeldBack("too_large", size, served)
    assert await loading.over(broker) and loading.failed == ["big"]
    (line,) = told
    assert line.startswith(f"big: failed (too_large): {size}. {then}")
    on_demand = Loading([ModelSpec(name="big")], told.append, serve.states)
    assert await on_demand.over(broker) and on_demand.failed == ["big"] * served and told[1] == line


async def test_what_is_waited_for_is_said_and_not_for_ever(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, _, told = await updating(broker)
    monkeypatch.setattr(awaiting, "SLOW_S", 0.0)
    assert not await loading.over(broker)
    await asyncio.sleep(0.01)
    assert not await loading.over(broker) and not await loading.over(broker)
    assert told == ["big: a copy runs; waiting until others of it are replaced, or have stopped"]
    monkeypatch.setattr(awaiting, "NO_NEWS_S", 0.0)
    assert await loading.over(broker)
    assert loading.failed == ["big"] and "no news for 0 s; a copy runs; waiting" in told[1]
