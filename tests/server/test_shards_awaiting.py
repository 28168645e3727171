"""What `deploy up` says of models on their way, and how long it waits for them."""

from __future__ import annotations

import asyncio

import pytest
from interpose_server.broker.connect import Broker
from interpose_server.models.spec import ModelSpec, Replicas
from interpose_server.shards import awaiting
from interpose_server.shards.awaiting import Loading

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
