"""The lifecycle's figures as the broker has them, and its decisions as the broker keeps them."""

from __future__ import annotations

import math

import pytest
from interpose.errors import ConfigError, ModelUnavailable
from interpose.wire.status import JobStatus
from interpose_server.broker import keys
from interpose_server.broker.connect import Broker
from interpose_server.broker.states import ModelState
from interpose_server.models.figures import Watch, rules
from interpose_server.models.lifecycle import JOINING_S, decide
from interpose_server.models.rules import Figures, Memory, Room
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import Settings
from rig import new_job, tiny_manifest

NEW = ModelSpec(name="tiny")


async def look(broker: Broker) -> Figures:
    (found,) = await Watch(broker).look()
    return found


async def test_a_model_nobody_has_used(broker: Broker) -> None:
    await broker.specs.put(NEW)
    assert await look(broker) == Figures(NEW, idle_s=math.inf)
    await broker.specs.wish("tiny")
    assert (await look(broker)).wished


async def test_jobs_and_copies(broker: Broker) -> None:
    await broker.specs.put(NEW)
    job = new_job()
    await broker.queue.submit(job)
    await broker.redis.hset(keys.JOB.format(ref=keys.ref(job.user, job.id)), "created_ms", 1)
    await broker.models.announce("tiny", "w1", ModelState.LOADING)
    found = await look(broker)
    assert (found.ready, found.loading, found.waiting, found.working) == (0, 1, 1, 0) and found.oldest_wait_s > 1e6
    await broker.models.publish("tiny", "w1", tiny_manifest(), "")
    found = await look(broker)
    assert (found.ready, found.loading) == (1, 0)
    assert found.oldest_wait_s < 60, "what it waited for the first copy presses for no second"
    await broker.queue.claim("tiny", "w1", [keys.ref(job.user, job.id)])
    found = await look(broker)
    assert (found.waiting, found.working, found.oldest_wait_s) == (0, 1, 0) and found.idle_s < 60


async def test_wishes_are_over_once_it_is_loaded_and_marks_are_handed_on(broker: Broker) -> None:
    await broker.specs.put(NEW)
    await broker.specs.load("tiny")
    await broker.models.publish("tiny", "w1", tiny_manifest(), "")
    assert not (await look(broker)).wished
    await broker.specs.load("tiny")
    assert not (await look(broker)).wished, "it is loaded"
    assert not (await broker.models.get("tiny")).wished, "nor will it be, once another needs its place"
    await broker.specs.evict("tiny")
    assert (await look(broker)).evicted
    await broker.specs.remove("tiny")
    assert (await look(broker)).draining
    await broker.models.announce(
        "tiny", "w1", ModelState.FAILED, ModelUnavailable("", details={"reason": "missing"})
    )
    assert (await look(broker)).failed


async def test_the_share_of_time_at_work(broker: Broker) -> None:
    await broker.specs.put(NEW)
    await broker.models.publish("tiny", "w1", tiny_manifest(), "")
    now = 0.0
    watch = Watch(broker, lambda: now)
    shares = []
    for _ in range(130):
        now += 1
        await broker.models.beat("tiny", "w1", 1, 1, 0.25 if now < 70 else 0.0)
        shares.append((await watch.look())[0].busy)
    assert shares[0] == 0 and shares[60] == pytest.approx(0.25, rel=0.05) and shares[-1] == 0


async def test_decisions_are_told(broker: Broker, settings: Settings) -> None:
    given = settings.model_copy(update={"hold_s": 1, "patience_s": 2, "scale_jobs": 3, "scale_wait_s": 4})
    found = rules(given)
    assert (found.hold_s, found.patience_s, found.scale_jobs, found.scale_wait_s) == (1, 2, 3, 4)
    await broker.specs.put(NEW)
    job = new_job()
    await broker.queue.submit(job)
    watch = Watch(broker)
    assert await watch.look(lambda spec: None) == [], "nothing is deployed of it yet"
    decided = decide(await watch.look(lambda spec: (4.0,)), Room((2,)), 0.0)
    await watch.tell(decided)
    assert await broker.specs.kept()
    hosted = await broker.models.get("tiny")
    assert "0 wanted: a copy takes 4 devices" in hosted.note and hosted.told == "crowded"
    assert (await broker.queue.info(job.user, job.id)).status is JobStatus.QUEUED, "nodes may be about to join"
    await watch.tell(decide(await watch.look(lambda spec: (4.0,)), Room((2,)), JOINING_S, decided.memory))
    hosted = await broker.models.get("tiny")
    assert hosted.failure is not None and hosted.failure.reason == "too_large" and not hosted.copies
    assert (await broker.queue.info(job.user, job.id)).status is JobStatus.FAILED
    assert hosted.state is ModelState.FAILED
    await watch.tell(decide(await watch.look(lambda spec: (4.0,)), Room((2, 4)), 0.0))
    assert (await broker.models.get("tiny")).state is ModelState.COLD, "there is room now"
    await broker.models.refuse("tiny", ModelUnavailable("", details={"reason": "gated"}))
    await watch.tell(decide(await watch.look(lambda spec: (4.0,)), Room((2, 4)), 0.0))
    assert (await broker.models.get("tiny")).state is ModelState.FAILED, "that isn't over"


async def test_what_is_told_is_what_was_decided_last(broker: Broker) -> None:
    await broker.specs.put(NEW)
    await broker.redis.hset(keys.MODEL.format(model="tiny"), "ready_ms", 1)  # else it would fail without room
    watch, memory, told = Watch(broker), Memory(), []

    async def go(room: float) -> None:
        nonlocal memory
        wanted = decide(await watch.look(), Room((room,)), 0.0, memory)
        await watch.tell(wanted)
        memory = wanted.memory
        told.append((await broker.models.get("tiny")).note.partition(" ")[2].partition(" ")[2])

    await go(1)
    await broker.specs.wish("tiny")
    await go(0.5)
    await go(1)
    await go(1)
    await broker.redis.hdel(keys.MODEL.format(model="tiny"), "wish_ms")
    await go(1)
    assert told[:1] == ["0 wanted"] and told[1].startswith("0 wanted: a copy takes 1 device")
    assert told[2:] == ["1 wanted: somebody asked for it"] * 3, "a reason stands until something else is decided"
    memory = Memory()
    await go(0.5)
    await broker.specs.wish("tiny")
    await go(0.5)
    await broker.redis.hdel(keys.MODEL.format(model="tiny"), "wish_ms")
    await go(0.5)
    assert told[-2].startswith("0 wanted: a copy takes") and told[-1] == "0 wanted", "nobody waits any more"


async def test_who_waits_for_room_is_told_so(broker: Broker) -> None:
    await broker.specs.put(NEW)
    await broker.specs.put(ModelSpec(name="held", pinned=True))
    await broker.models.publish("held", "w1", tiny_manifest(), "")
    await broker.specs.wish("tiny")
    watch, memory = Watch(broker), Memory()
    for nodes, told in (((1.0,), "crowded"), ((2.0,), "cold")):
        wanted = decide(await watch.look(), Room(nodes), 0.0, memory)
        await watch.tell(wanted)
        assert (await broker.models.get("tiny")).told == told
        memory = wanted.memory


@pytest.mark.parametrize("mended", ["put", "removed"])
async def test_an_entry_of_another_version_stops_all_until_it_is_mended(broker: Broker, mended: str) -> None:
    await broker.specs.put(NEW)
    await broker.redis.hset(keys.SPECS, "tiny", '{"spec": {"name": "tiny", "later": 1}, "removed": false}')
    with pytest.raises(ConfigError, match=r"entry of tiny .* models remove tiny"):
        await broker.specs.entries()
    if mended == "put":
        assert not await broker.specs.put(NEW)
        assert await broker.specs.list() == [NEW]
    else:
        await broker.specs.remove("tiny")
        assert [entry.removed for entry in await broker.specs.entries()] == [True]
