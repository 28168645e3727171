"""Models in the broker: what their copies say, the state that follows, the catalogue, and how waiting ends."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from unittest.mock import AsyncMock

import pytest
from interpose.errors import ConfigError, InterposeError, ModelUnavailable, UnknownModel, from_wire
from interpose.wire.status import JobStatus
from interpose_server.broker import keys
from interpose_server.broker.connect import Broker, connect
from interpose_server.broker.failures import PASSING, SENTENCES, TRIES, Failure, reason_of
from interpose_server.broker.jobs import Outcome, Report
from interpose_server.broker.states import TRANSITIONS, ModelState, derive
from interpose_server.models.spec import ModelSpec, Replicas
from interpose_server.sweeper import retire
from rig import Valkey, make_settings, new_job, tiny_manifest

LOADING, READY, DRAINING = ModelState.LOADING, ModelState.READY, ModelState.DRAINING
FAILED, STOPPED, COLD = ModelState.FAILED, ModelState.STOPPED, ModelState.COLD
GATED = ModelUnavailable("/srv/secret can't be loaded: 403", details={"reason": "gated"})
CRASH = RuntimeError("boom in /srv/secret")


async def state(broker: Broker, name: str = "tiny") -> ModelState:
    return (await broker.models.get(name)).state


async def publish(broker: Broker, worker: str, name: str = "tiny") -> None:
    await broker.models.publish(name, worker, tiny_manifest(name), "")


async def handed_in(broker: Broker) -> tuple[str, str]:
    job = new_job()
    await broker.queue.submit(job)
    return job.user, job.id


@pytest.mark.parametrize("old, new", [*itertools.product(ModelState, ModelState)])
async def test_the_broker_takes_the_ways_of_the_table_and_no_others(
    broker: Broker, old: ModelState, new: ModelState
) -> None:
    await broker.models.announce("tiny", "w1", LOADING)
    await broker.redis.hset(keys.STATES.format(model="tiny"), "w1", str(old))
    assert await broker.models.announce("tiny", "w1", new) == (new in TRANSITIONS[old])


def test_every_state_has_its_ways_and_a_copy_may_always_begin_anew() -> None:
    assert set(TRANSITIONS) == set(ModelState)
    assert all(LOADING in ways for ways in TRANSITIONS.values())
    assert READY not in TRANSITIONS[DRAINING]


@pytest.mark.parametrize(
    "copies, rest, expected",
    [
        ([READY, LOADING], {}, READY),
        ([READY, FAILED], {"failed": True}, READY),
        ([LOADING, DRAINING], {}, LOADING),
        ([DRAINING], {"wanted": True}, DRAINING),
        ([FAILED], {"wanted": True, "failed": True}, FAILED),
        ([], {"wanted": True, "failed": True}, FAILED),
        ([FAILED], {"wanted": True}, COLD),
        ([], {"wanted": True}, COLD),
        ([], {}, STOPPED),
        ([READY], {"removed": True}, DRAINING),
        ([], {"removed": True}, DRAINING),
    ],
)
def test_a_models_state_follows_from_its_copies(
    copies: list[ModelState], rest: dict[str, bool], expected: ModelState
) -> None:
    assert derive(copies, **{"wanted": False, "failed": False, **rest}) is expected


async def test_of_two_copies_one_may_drain_and_die(broker: Broker) -> None:
    for worker in ("w1", "w2"):
        await broker.models.announce("tiny", worker, LOADING)
    await publish(broker, "w1")
    assert await state(broker) is READY
    await publish(broker, "w2")
    assert (await broker.models.get("tiny")).count(READY) == 2
    await broker.models.announce("tiny", "w1", DRAINING)
    assert await state(broker) is READY and (await broker.models.get("tiny")).count(READY) == 1
    with pytest.raises(ModelUnavailable, match="no longer"):
        await publish(broker, "w1")
    await broker.models.announce("tiny", "w1", STOPPED)
    assert await state(broker) is READY
    await broker.models.announce("tiny", "w2", DRAINING)
    assert await state(broker) is DRAINING
    await broker.models.announce("tiny", "w2", STOPPED)
    assert await state(broker) is STOPPED


async def test_a_silent_copy_is_gone_and_a_beat_brings_it_back(broker: Broker) -> None:
    await publish(broker, "w1")
    await publish(broker, "w2")
    await broker.redis.zadd(keys.HEARD.format(model="tiny"), {"w1": 1})
    assert dict((await broker.models.get("tiny")).copies) == {"w2": READY}
    await broker.models.beat("tiny", "w1", 1, 2, 0.5)
    hosted = await broker.models.get("tiny")
    assert hosted.count(READY) == 2 and (hosted.batches, hosted.jobs, hosted.busy_s) == (1, 2, 0.5)
    await broker.models.announce("tiny", "w1", STOPPED)
    await broker.models.beat("tiny", "w1")
    assert (await broker.models.get("tiny")).count(READY) == 1, "its last word was said"


async def test_a_model_that_goes_while_all_are_listed_is_left_out(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish(broker, "w1")
    monkeypatch.setattr(broker.models, "names", AsyncMock(return_value=["gone", "tiny"]))
    assert [hosted.name for hosted in await broker.models.list()] == ["tiny"]


async def test_who_waits_for_a_model_that_cannot_be_loaded_is_told_why(broker: Broker) -> None:
    await broker.specs.put(ModelSpec(name="tiny"))
    user, job = await handed_in(broker)
    await broker.models.announce("tiny", "w1", LOADING)
    await broker.models.announce("tiny", "w1", FAILED, GATED)
    info = await broker.queue.info(user, job)
    assert info.status is JobStatus.FAILED and info.error is not None
    error = from_wire(info.error)
    assert (error.code, error.details["reason"]) == ("model_failed", "gated")
    assert "/srv" not in str(error) and error.details["retry_after_s"] == 300
    assert await broker.queue.depth("tiny") == 0
    hosted = await broker.models.get("tiny")
    assert hosted.state is FAILED and hosted.barred
    assert hosted.to_plain()["failure"]["reason"] == "gated" and "/srv" not in str(hosted.to_plain())
    assert hosted.failure is not None and "/srv/secret" in hosted.failure.detail


@pytest.mark.parametrize(
    "reason, loaded, joining, ends",
    [
        ("too_large", True, False, False),
        ("too_large", False, False, True),
        ("too_large", False, True, False),
        ("gated", True, True, True),
    ],
)
async def test_jobs_wait_for_devices_that_may_be_away_or_about_to_join(
    broker: Broker, reason: str, loaded: bool, joining: bool, ends: bool
) -> None:
    await broker.specs.put(ModelSpec(name="tiny"))
    if loaded:
        await publish(broker, "w1")
        await broker.models.announce("tiny", "w1", STOPPED)
    user, job = await handed_in(broker)
    why = ConfigError("it can't be placed", details={"reason": reason})
    await broker.models.refuse("tiny", why, joining=joining)
    assert (await state(broker)) is FAILED
    assert (await broker.queue.info(user, job)).status is (JobStatus.FAILED if ends else JobStatus.QUEUED)


async def test_jobs_wait_on_while_another_copy_is_left(broker: Broker) -> None:
    user, job = await handed_in(broker)
    await broker.models.announce("tiny", "w2", LOADING)
    await broker.models.announce("tiny", "w1", FAILED, GATED)
    assert (await broker.queue.info(user, job)).status is JobStatus.QUEUED
    await broker.redis.zadd(keys.HEARD.format(model="tiny"), {"w2": 1})
    await broker.models.announce("tiny", "w1", FAILED, GATED)
    assert (await broker.queue.info(user, job)).status is JobStatus.FAILED


async def test_what_may_pass_is_tried_again_before_jobs_are_given_up(broker: Broker) -> None:
    user, job = await handed_in(broker)
    waits = []
    for _ in range(TRIES):
        assert (await broker.queue.info(user, job)).status is JobStatus.QUEUED
        await broker.models.announce("tiny", "w1", LOADING)
        await broker.models.announce("tiny", "w1", FAILED, CRASH)
        failure = (await broker.models.get("tiny")).failure
        assert failure is not None
        waits.append((failure.retry_ms - failure.at_ms) // 1000)
    assert waits == [30, 60, 120]
    assert (await broker.queue.info(user, job)).status is JobStatus.FAILED
    await broker.models.announce("tiny", "w1", LOADING)
    await publish(broker, "w1")
    assert (await broker.models.get("tiny")).failure is None


def test_reasons() -> None:
    assert reason_of(GATED) == "gated" and reason_of(MemoryError()) == "memory"
    assert reason_of(ConfigError("x", details={"reason": "misconfigured"})) == "misconfigured"
    assert reason_of(ConfigError("x")) == "unsupported" and reason_of(CRASH) == "crashed"
    assert reason_of(ModelUnavailable("x", details={"reason": "made up"})) == "crashed"
    assert set(SENTENCES) >= PASSING
    longest = Failure("network", "", 40, 0, 0)
    assert Failure.after(longest, ModelUnavailable("", details={"reason": "network"}), 0, 300).retry_ms == 3_600_000


async def test_a_copy_that_dies_while_it_loads_has_failed(broker: Broker) -> None:
    await broker.specs.put(ModelSpec(name="tiny"))
    await broker.models.announce("tiny", "w1", LOADING)
    assert await broker.models.bury() == []
    await broker.redis.zadd(keys.HEARD.format(model="tiny"), {"w1": 1})
    assert sorted(await asyncio.gather(broker.models.bury(), broker.models.bury())) == [[], ["w1"]]
    hosted = await broker.models.get("tiny")
    assert hosted.failure is not None and hosted.failure.tries == 1, "whoever looks, it failed once"
    assert hosted.state is FAILED and hosted.failure is not None and hosted.failure.reason == "crashed"
    assert await broker.models.bury() == []


async def test_silence_is_borne_for_long_while_a_copy_loads(broker: Broker) -> None:
    """A busy machine may let nobody speak; who started the process says that it lives."""
    await broker.models.announce("tiny", "w1", LOADING)
    heard = keys.HEARD.format(model="tiny")
    at = float(await broker.redis.zscore(heard, "w1") or 0)
    for seconds, buried in ((3 * 15, []), (5 * 15, ["w1"])):
        await broker.models.announce("tiny", "w1", LOADING)
        await broker.redis.zadd(heard, {"w1": at - seconds * 1000})
        assert (await broker.models.get("tiny")).copies == {}
        assert await broker.models.bury() == buried
    failure = (await broker.models.get("tiny")).failure
    assert failure is not None and "nothing was heard of w1 for 7" in failure.detail
    await broker.models.announce("tiny", "w1", LOADING)
    await broker.redis.zadd(heard, {"w1": 1})
    await broker.models.vouch("tiny", "w1")
    assert await broker.models.bury() == [] and await state(broker) is LOADING
    await publish(broker, "w1")
    await broker.redis.zadd(heard, {"w1": 1})
    await broker.models.vouch("tiny", "w1")
    assert (await broker.models.get("tiny")).copies == {}, "once it runs jobs it speaks for itself"


async def test_the_catalogue(broker: Broker) -> None:
    spec = ModelSpec(name="org/tiny", source="/models/tiny", schedule=("mon-fri 08:00-20:00",))
    before = await broker.specs.revision()
    assert await broker.specs.put(spec) and await broker.specs.list() == [spec]
    assert await broker.specs.revision() > before
    assert await state(broker, "org/tiny") is COLD
    assert not await broker.specs.put(spec.model_copy(update={"replicas": Replicas(min=1, max=2)}))
    with pytest.raises(ConfigError, match="stays loaded"):
        await broker.specs.evict("org/tiny")
    await broker.specs.put(spec)
    await broker.specs.pin("org/tiny", True)
    assert (await broker.specs.get("org/tiny")).pinned
    with pytest.raises(ConfigError, match="unpin"):
        await broker.specs.evict("org/tiny")
    await broker.specs.pin("org/tiny", False)
    await broker.specs.load("org/tiny")
    assert (await broker.models.get("org/tiny")).wished
    await broker.specs.evict("org/tiny")
    hosted = await broker.models.get("org/tiny")
    assert hosted.evicted and not hosted.wished
    for verb in (broker.specs.load, broker.specs.evict, broker.specs.remove, broker.specs.get):
        with pytest.raises(UnknownModel, match="there is org/tiny"):
            await verb("other")


async def test_changes_at_once_undo_none_of_one_another(broker: Broker) -> None:
    for _ in range(10):
        await broker.specs.put(ModelSpec(name="tiny"))
        changes = [broker.specs.pin("tiny", True), broker.specs.remove("tiny"), broker.specs.pin("tiny", False)]
        done = await asyncio.gather(*changes, return_exceptions=True)
        assert all(one is None or isinstance(one, UnknownModel) for one in done)
        entry = await broker.specs.find("tiny")
        assert entry is not None and entry.removed, "who came after it was removed was told so"


async def test_a_failure_is_forgiven_on_request_and_by_a_new_entry(broker: Broker) -> None:
    await broker.specs.put(ModelSpec(name="tiny"))
    for again in (broker.specs.load("tiny"), broker.specs.put(ModelSpec(name="tiny", revision="main"))):
        await broker.models.announce("tiny", "w1", FAILED, GATED)
        assert await state(broker) is FAILED
        await again
        assert await state(broker) is COLD


async def test_a_removed_model_goes_when_its_jobs_are_over(broker: Broker) -> None:
    await broker.specs.put(ModelSpec(name="tiny"))
    await publish(broker, "w1")
    user, job = await handed_in(broker)
    await broker.specs.remove("tiny")
    assert await state(broker) is DRAINING
    assert await broker.specs.list() == [] and len(await broker.specs.entries()) == 1
    assert await retire(broker) == []
    ref = keys.ref(user, job)
    await broker.queue.claim("tiny", "w1", [ref])
    assert (await broker.queue.demand("tiny")).running == 1
    await broker.queue.report([Report(ref, "w1", 1, 0, [], Outcome(None, 0.1))])
    assert await retire(broker) == [], "its copy is there yet"
    await broker.models.announce("tiny", "w1", STOPPED)
    before = await broker.specs.revision()
    newer = {"spec": {"name": "newer", "unheard_of": 1}, "removed": False}
    await broker.redis.hset(keys.SPECS, "newer", json.dumps(newer))
    assert await retire(broker) == ["tiny"], "whatever another version wrote beside it"
    assert await broker.specs.revision() > before, "who keeps models hears of it"
    with pytest.raises(UnknownModel):
        await broker.models.get("tiny")
    with pytest.raises(UnknownModel):
        await broker.queue.submit(new_job())
    await broker.specs.put(ModelSpec(name="tiny"))
    await broker.queue.submit(new_job())


async def test_demand(broker: Broker) -> None:
    assert (await broker.queue.demand("tiny")).used_ms == 0
    ids = [await handed_in(broker) for _ in range(2)]
    await broker.queue.submit(new_job("bob"))
    demand = await broker.queue.demand("tiny")
    first = (await broker.queue.info(*ids[0])).created_ms
    assert (demand.waiting, demand.running, demand.oldest_ms) == (3, 0, first)
    await broker.queue.claim("tiny", "w1", [keys.ref(*ids[0])])
    assert (await broker.queue.demand("tiny")).running == 1
    await broker.queue.release("w1", [(keys.ref(*ids[0]), 1)])
    for user, job in ids:
        await broker.queue.cancel(user, job)
    await asyncio.sleep(0.01)
    demand = await broker.queue.demand("tiny")
    assert (demand.waiting, demand.running) == (1, 0) and demand.used_ms >= first


async def test_jobs_can_be_given_up_while_copies_are_there(broker: Broker) -> None:
    await publish(broker, "w1")
    user, job = await handed_in(broker)
    refs = await broker.models.give_up("tiny", ModelUnavailable("tiny was removed"))
    assert refs == [keys.ref(user, job)]
    assert (await broker.queue.info(user, job)).status is JobStatus.FAILED


async def test_wishes_end(valkey: Valkey, tmp_path: Path) -> None:
    broker = connect(make_settings(valkey, tmp_path, wish_s=60))
    try:
        await broker.specs.put(ModelSpec(name="tiny"))
        await broker.specs.wish("tiny")
        assert (await broker.models.get("tiny")).wished
        await broker.redis.hincrby(keys.MODEL.format(model="tiny"), "wish_ms", -60_001)
        assert not (await broker.models.get("tiny")).wished
        await broker.specs.load("tiny")
        await broker.specs.wish("tiny")
        await publish(broker, "w1")
        assert not (await broker.models.get("tiny")).wished, "it has been fulfilled"
    finally:
        await broker.close()


async def test_a_draining_copy_does_not_hold_off_the_error(broker: Broker) -> None:
    """It finishes what it has, and takes nothing more: those who wait have nobody else."""
    user, job = await handed_in(broker)
    await publish(broker, "w2")
    await broker.models.announce("tiny", "w2", DRAINING)
    await broker.models.announce("tiny", "w1", FAILED, GATED)
    info = await broker.queue.info(user, job)
    assert info.status is JobStatus.FAILED and isinstance(from_wire(info.error or {}), InterposeError)
