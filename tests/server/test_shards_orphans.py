"""Which replicas the keeper ends because they say nothing any more."""

from __future__ import annotations

import asyncio

import pytest
from interpose_server.broker import keys
from interpose_server.broker.connect import Broker
from interpose_server.broker.states import ModelState
from interpose_server.shards import orphans
from interpose_server.shards.orphans import Hanging
from rig import tiny_manifest


async def test_only_copies_that_should_speak_and_stay_silent_are_ended(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[str] = []
    monkeypatch.setattr(orphans, "NOTICED_S", 0.3)
    monkeypatch.setattr(orphans, "_kill", lambda worker: killed.append(worker) or True)
    models, hanging = broker.models, Hanging()
    for worker in ("ready", "draining", "spoke"):
        await models.publish("tiny", worker, tiny_manifest(), "")
    await models.announce("tiny", "draining", ModelState.DRAINING)
    await models.announce("tiny", "loading", ModelState.LOADING)
    await models.announce("tiny", "failed", ModelState.FAILED, RuntimeError("it stands by"))
    everyone = ("ready", "draining", "spoke", "loading", "failed")
    await broker.redis.zadd(keys.HEARD.format(model="tiny"), dict.fromkeys(everyone, 1))
    await hanging.end(broker)
    assert not killed, "the broker may just have come back"
    await models.beat("tiny", "spoke")
    await asyncio.sleep(0.4)
    await hanging.end(broker)
    assert sorted(killed) == ["draining", "ready"]
    await hanging.end(broker)
    assert len(killed) == 2
    assert (await models.get("tiny")).copies == {"spoke": ModelState.READY}
