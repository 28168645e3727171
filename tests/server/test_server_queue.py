"""The queue on a real Valkey: one job once, fair turns, leases, ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from interpose.errors import JobConflict, OpFailed, QueueFull, UnknownJob
from interpose.wire.status import JobStatus
from interpose_server.broker import events, keys
from interpose_server.broker.connect import OPTIONS, Broker, connect
from interpose_server.broker.jobs import Outcome, Record, Report
from rig import Valkey, make_settings, new_job, run_valkey

DONE = Outcome(None, 0.5)


async def report(
    broker: Broker, ref: str, worker: str, attempt: int, first: int, records: list[Record], outcome: Outcome | None
) -> bool:
    (held,) = await broker.queue.report([Report(ref, worker, attempt, first, records, outcome)])
    return held


async def over(broker: Broker, key: str, ref: str, seconds: float = 15) -> None:
    """Time passes for one job: what was to end within so many seconds has just ended."""
    assert await broker.redis.zscore(key, ref) is not None
    await broker.redis.zincrby(key, -1000 * seconds - 1, ref)


async def test_a_job_sent_twice_is_one_job(broker: Broker) -> None:
    job = new_job()
    assert await broker.queue.submit(job) == (JobStatus.QUEUED, 1)
    assert await broker.queue.submit(job) == (JobStatus.QUEUED, None)
    assert await broker.queue.depth("tiny") == 1


async def test_more_commands_at_once_than_connections_wait_for_one(broker: Broker) -> None:
    most = OPTIONS["max_connections"]
    assert await asyncio.gather(*(broker.queue.depth("tiny") for _ in range(10 * most))) == [0] * 10 * most
    assert (await broker.redis.info("clients"))["connected_clients"] <= most


async def test_same_id_other_payload_conflicts_within_a_user_only(broker: Broker) -> None:
    job = new_job()
    await broker.queue.submit(job)
    with pytest.raises(JobConflict):
        await broker.queue.submit(new_job(id=job.id, digest="other"))
    assert (await broker.queue.submit(new_job("bob", id=job.id, digest="other")))[0] is JobStatus.QUEUED


async def test_a_users_queue_is_bounded(valkey: Valkey, tmp_path: Path) -> None:
    broker = connect(make_settings(valkey, tmp_path, queued_per_user=2))
    for _ in range(2):
        await broker.queue.submit(new_job())
    with pytest.raises(QueueFull):
        await broker.queue.submit(new_job())
    await broker.queue.submit(new_job("bob"))
    await broker.close()


async def test_life_of_a_job(broker: Broker) -> None:
    job = new_job()
    ref = keys.ref(job.user, job.id)
    await broker.queue.submit(job)
    (claim,) = await broker.queue.claim("tiny", "w1", [ref])
    assert (claim.attempt, claim.payload, claim.alone) == (1, b"graph", False)
    assert await broker.queue.claim("tiny", "w2", [ref]) == []
    save = Record("save", b"\x80", b"bytes")
    assert await report(broker, ref, "w1", 1, 0, [save], None)
    assert await report(broker, ref, "w1", 1, 0, [save], None), "sent again after a lost answer"
    assert not await report(broker, ref, "w2", 1, 0, [save], None), "another worker's"
    assert await report(broker, ref, "w1", 1, 1, [], DONE)
    assert await report(broker, ref, "w1", 1, 1, [], DONE)
    stored = await events.read(broker.redis, ref, 0)
    assert [(event.seq, event.kind, event.attempt) for event in stored] == [
        (1, "status", 0),
        (2, "status", 1),
        (3, "save", 1),
        (4, "status", 1),
    ]
    assert stored[3].body == {"status": "completed"} and stored[2].data == b"bytes"
    assert (await broker.queue.usage("ada"))["seconds"] == 0.5
    tally = await broker.queue.tally("tiny")
    assert tally.pop("wait_ms") >= 0
    assert tally == {"running": 1, "completed": 1}
    assert await broker.queue.load("ada") == {"queued": 0, "running": 0}


async def test_an_error_travels_in_the_last_event(broker: Broker) -> None:
    job = new_job()
    ref = keys.ref(job.user, job.id)
    await broker.queue.submit(job)
    await broker.queue.claim("tiny", "w1", [ref])
    await report(broker, ref, "w1", 1, 0, [], Outcome(OpFailed("no", node=3, details={"a": []}), 0.1))
    last = (await events.read(broker.redis, ref, 0))[-1]
    assert last.body["error"] == {"code": "op_failed", "message": "no", "node": 3, "details": {"a": []}}
    assert (await broker.queue.info("ada", job.id)).status is JobStatus.FAILED


async def test_turns_are_fair_by_seconds_used(broker: Broker) -> None:
    for _ in range(20):
        await broker.queue.submit(new_job("hog"))
    for _ in range(3):
        await broker.queue.submit(new_job("ada"))
    first = [keys.split(waiting.ref)[0] for waiting in await broker.queue.peek("tiny")]
    assert first[:6].count("ada") == 3
    # Hog used ten seconds: ada's next jobs all go first.
    ref = next(w.ref for w in await broker.queue.peek("tiny") if w.ref.startswith("hog"))
    await broker.queue.claim("tiny", "w1", [ref])
    await report(broker, ref, "w1", 1, 0, [], Outcome(None, 10))
    assert [keys.split(w.ref)[0] for w in await broker.queue.peek("tiny")][:3] == ["ada"] * 3


async def test_newcomers_get_no_credit_for_being_away(broker: Broker) -> None:
    for _ in range(4):
        job = new_job("old")
        await broker.queue.submit(job)
        await broker.queue.claim("tiny", "w1", [keys.ref("old", job.id)])
        await report(broker, keys.ref("old", job.id), "w1", 1, 0, [], Outcome(None, 5))
    for _ in range(5):
        await broker.queue.submit(new_job("old"))
        await broker.queue.submit(new_job("new"))
    order = [keys.split(w.ref)[0] for w in await broker.queue.peek("tiny")]
    assert "old" in order[:6]


async def test_priority_orders_one_users_jobs(broker: Broker) -> None:
    low, high = new_job(), new_job(priority=1)
    await broker.queue.submit(low)
    assert await broker.queue.submit(high) == (JobStatus.QUEUED, 1)
    assert await broker.queue.order("tiny") == [keys.ref("ada", high.id), keys.ref("ada", low.id)]


async def test_running_jobs_of_a_user_are_bounded(valkey: Valkey, tmp_path: Path) -> None:
    broker = connect(make_settings(valkey, tmp_path, running_per_user=2))
    for _ in range(5):
        await broker.queue.submit(new_job())
    waiting = await broker.queue.peek("tiny")
    assert len(waiting) == 2
    await broker.queue.claim("tiny", "w1", [waiting[0].ref, waiting[1].ref])
    assert await broker.queue.peek("tiny") == []
    await report(broker, waiting[0].ref, "w1", 1, 0, [], DONE)
    assert len(await broker.queue.peek("tiny")) == 1
    await broker.close()


async def test_a_lost_lease_requeues_then_poisons(valkey: Valkey, tmp_path: Path) -> None:
    broker = connect(make_settings(valkey, tmp_path, max_attempts=2))
    job = new_job()
    ref = keys.ref(job.user, job.id)
    await broker.queue.submit(job)
    await broker.queue.claim("tiny", "w1", [ref])
    assert await broker.queue.reap() == []
    await over(broker, keys.LEASES, ref)
    assert await broker.queue.reap() == [(ref, JobStatus.QUEUED)]
    assert not await report(broker, ref, "w1", 1, 0, [], DONE)
    (waiting,) = await broker.queue.peek("tiny")
    assert waiting.alone
    (claim,) = await broker.queue.claim("tiny", "w2", [ref])
    assert claim.attempt == 2 and claim.alone
    assert await broker.queue.reap("w1") == []
    assert await broker.queue.reap("w2") == [(ref, JobStatus.FAILED)]
    info = await broker.queue.info("ada", job.id)
    assert info.error is not None and info.error["code"] == "job_poisoned"
    await broker.close()


async def test_claims_given_back_wait_where_they_waited_with_nothing_held_against_them(
    valkey: Valkey, tmp_path: Path
) -> None:
    broker = connect(make_settings(valkey, tmp_path, max_attempts=1))
    first, second = new_job(), new_job()
    refs = [keys.ref("ada", job.id) for job in (first, second)]
    for job in (first, second):
        await broker.queue.submit(job)
    await broker.queue.claim("tiny", "w1", refs[:1])
    assert await broker.queue.release("w2", [(refs[0], 1)]) == set(), "another worker's"
    assert await broker.queue.release("w1", [(refs[0], 7)]) == set(), "another attempt's"
    assert await broker.queue.release("w1", [(refs[0], 1), (refs[1], 1)]) == {refs[0]}
    assert await broker.queue.order("tiny") == refs
    info = await broker.queue.info("ada", first.id)
    assert (info.status, info.started_ms) == (JobStatus.QUEUED, None)
    assert await broker.queue.load("ada") == {"queued": 2, "running": 0}
    (claim,) = await broker.queue.claim("tiny", "w1", refs[:1])
    assert claim.attempt == 2 and not claim.alone
    assert not await report(broker, refs[0], "w1", 1, 0, [], DONE), "the claim given back is void"
    # Only the second was an attempt.
    assert await broker.queue.reap("w1") == [(refs[0], JobStatus.FAILED)]
    await broker.close()


async def test_a_job_under_suspicion_stays_so_when_it_is_given_back(broker: Broker) -> None:
    job = new_job()
    ref = keys.ref("ada", job.id)
    await broker.queue.submit(job)
    await broker.queue.claim("tiny", "w1", [ref])
    await broker.queue.reap("w1")
    await broker.queue.claim("tiny", "w1", [ref])
    await broker.queue.release("w1", [(ref, 2)])
    (waiting,) = await broker.queue.peek("tiny")
    assert waiting.alone


async def test_heartbeats_keep_leases_and_tell_of_lost_ones(broker: Broker) -> None:
    mine, gone = new_job(), new_job()
    for job in (mine, gone):
        await broker.queue.submit(job)
    refs = [keys.ref("ada", job.id) for job in (mine, gone)]
    await broker.queue.claim("tiny", "w1", refs)
    assert (await broker.queue.cancel("ada", gone.id)).status is JobStatus.CANCELLED
    assert await broker.queue.heartbeat("w1", [(ref, 1) for ref in refs]) == {refs[1]}
    assert not await report(broker, refs[1], "w1", 1, 0, [], DONE)


async def test_cancelling_an_ended_job_changes_nothing(broker: Broker) -> None:
    job = new_job()
    await broker.queue.submit(job)
    assert (await broker.queue.cancel("ada", job.id)).status is JobStatus.CANCELLED
    assert (await broker.queue.cancel("ada", job.id)).status is JobStatus.CANCELLED
    with pytest.raises(UnknownJob):
        await broker.queue.cancel("bob", job.id)


async def test_the_sweep_forgets_ended_jobs(valkey: Valkey, tmp_path: Path) -> None:
    broker = connect(make_settings(valkey, tmp_path, result_ttl_s=60))
    job = new_job()
    await broker.queue.submit(job)
    await broker.queue.cancel("ada", job.id)
    assert await broker.queue.sweep() == {}
    await over(broker, keys.EXPIRY, keys.ref("ada", job.id), 60)
    assert await broker.queue.sweep() == {keys.ref("ada", job.id): []}
    with pytest.raises(UnknownJob):
        await broker.queue.info("ada", job.id)
    left = {key async for key in broker.redis.scan_iter(match="*ada*")}
    assert left <= {b"ip:usage:ada"}
    await broker.close()


async def test_a_job_no_one_runs_fails_in_the_end(valkey: Valkey, tmp_path: Path) -> None:
    broker = connect(make_settings(valkey, tmp_path, queue_ttl_s=60))
    job = new_job()
    await broker.queue.submit(job)
    await broker.queue.sweep()
    assert (await broker.queue.info("ada", job.id)).status is JobStatus.QUEUED
    await over(broker, keys.EXPIRY, keys.ref("ada", job.id), 60)
    await broker.queue.sweep()
    info = await broker.queue.info("ada", job.id)
    assert info.error is not None and info.error["code"] == "job_timeout"
    await broker.close()


async def test_a_killed_broker_loses_nothing(tmp_path: Path) -> None:
    for server in run_valkey():
        server.sync()
        broker = connect(make_settings(server, tmp_path))
        waiting, running = new_job(), new_job()
        for job in (waiting, running):
            await broker.queue.submit(job)
        ref = keys.ref("ada", running.id)
        await broker.queue.claim("tiny", "w1", [ref])
        server.kill()
        server.start()
        assert [w.ref for w in await broker.queue.peek("tiny")] == [keys.ref("ada", waiting.id)]
        assert await report(broker, ref, "w1", 1, 0, [Record("log", b"\x80")], DONE)
        assert len(await events.read(broker.redis, ref, 0)) == 4
        await broker.close()
