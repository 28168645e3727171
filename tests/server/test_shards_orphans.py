"""Which replicas the keeper ends because they say nothing any more."""

from __future__ import annotations

import time

import pytest
from interpose_server.broker import keys
from interpose_server.broker.connect import Broker
from interpose_server.broker.states import ModelState
from interpose_server.shards import orphans
from interpose_server.shards.naming import app_name
from interpose_server.shards.orphans import Hanging
from interpose_server.shards.ray_internals import Living, Stopping
from redis.exceptions import ConnectionError as RedisConnectionError
from rig import Clock, tiny_manifest

OF_TINY = ("well", "awaited", "draining", "spoke", "loading")
ACTORS = {name: f"{number:032x}" for number, name in enumerate((*OF_TINY, "deleted"))}
WORKERS = {name: f"node#{actor}" for name, actor in ACTORS.items()}


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    killed: list[str] = []
    monkeypatch.setattr(
        orphans, "_stopping", lambda: Stopping(frozenset({app_name("deleted")}), frozenset({ACTORS["awaited"]}))
    )
    living = {worker: Living(name, "node") for name, worker in WORKERS.items()}
    monkeypatch.setattr(orphans, "_living", living.get)
    monkeypatch.setattr(orphans, "_kill", killed.append)
    return killed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which it is told how long a silence has lasted."""
    clock = Clock()
    monkeypatch.setattr(orphans, "time", clock)
    return clock


async def silence(broker: Broker, *workers: str, model: str = "tiny") -> None:
    """These haven't been heard of for more than four leases."""
    await broker.redis.zadd(
        keys.HEARD.format(model=model), dict.fromkeys(workers, int(time.time() * 1000) - 100_000)
    )


async def test_copies_that_serve_waits_for_are_ended_soon_and_those_it_finds_well_much_later(
    broker: Broker, killed: list[str], clock: Clock
) -> None:
    models, hanging = broker.models, Hanging()
    of_tiny = [WORKERS[name] for name in OF_TINY]
    dead, alone = f"node#{'d' * 32}", "a worker that Ray doesn't know"
    await models.publish("deleted", WORKERS["deleted"], tiny_manifest(), "")
    await silence(broker, WORKERS["deleted"], model="deleted")
    for worker in (*of_tiny, dead, alone):
        await models.publish("tiny", worker, tiny_manifest(), "")
    await models.announce("tiny", WORKERS["draining"], ModelState.DRAINING)
    await models.announce("tiny", WORKERS["loading"], ModelState.LOADING)
    await silence(broker, *of_tiny, dead, alone)
    await hanging.end(broker)
    assert not killed, "the broker may just have come back"
    await models.beat("tiny", WORKERS["spoke"])
    clock.now += orphans.NOTICED_S
    await hanging.end(broker)
    assert sorted(killed) == ["awaited", "deleted", "draining"]
    states = await broker.redis.hkeys(keys.STATES.format(model="tiny"))
    left = {*(WORKERS[name] for name in ("well", "spoke", "loading")), alone}
    assert set(map(bytes.decode, states)) == left
    clock.now += orphans.CUT_OFF_S - orphans.NOTICED_S
    await hanging.end(broker)
    assert killed[3:] == ["well"]
    assert (await models.get("tiny")).copies == {WORKERS["spoke"]: ModelState.READY}


async def test_while_the_broker_is_away_nobody_is_silent(
    broker: Broker, killed: list[str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Hanging()
    await broker.models.publish("tiny", WORKERS["awaited"], tiny_manifest(), "")
    await silence(broker, WORKERS["awaited"])
    await hanging.end(broker)

    async def away() -> None:
        raise RedisConnectionError("no Redis")

    with monkeypatch.context() as patch, pytest.raises(RedisConnectionError):
        patch.setattr(broker.models, "lost", away)
        await hanging.end(broker)
    clock.now += 2 * orphans.NOTICED_S
    await hanging.end(broker)
    assert not killed
    clock.now += orphans.NOTICED_S
    await hanging.end(broker)
    assert killed == ["awaited"]
