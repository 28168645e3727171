"""A host: one copy of a model loaded, told of, run and stopped, in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from interpose.errors import ConfigError, ModelUnavailable, ReplicaLost, StorageFull
from interpose.graph.manifest import decode_manifest
from interpose.runtime.loading import load
from interpose.wire.submission import Submission
from interpose_server.broker import keys
from interpose_server.broker.connect import Broker
from interpose_server.broker.states import ModelState
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import GATEWAYS, LIFECYCLE, Settings
from interpose_server.worker import hosting
from interpose_server.worker.engines import Ready, engine_for, ready
from interpose_server.worker.hosting import Host
from models import tiny
from redis.exceptions import ConnectionError as RedisConnectionError
from rig import Gateway, at_work, run_gateway, submission, tiny_graph
from test_server_worker import ended


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec(**{"name": "tiny", "source": str(tiny("gpt2")), "settings": {"measure_s": 0}, **changes})


async def test_it_is_ready_once_told_of_and_stops_when_told(settings: Settings, broker: Broker) -> None:
    host, stop = Host(spec(), "w1", settings), asyncio.Event()
    assert host.ill() is None
    await host.load()
    hosted = await broker.models.get("tiny")
    assert (dict(hosted.copies), bool(hosted.fingerprint)) == ({"w1": ModelState.READY}, True)
    running = asyncio.create_task(host.run(stop))
    await asyncio.sleep(0.05)
    assert host.ill() is None
    stop.set()
    await asyncio.wait_for(running, 60)
    assert (await broker.models.get("tiny")).state is ModelState.STOPPED
    await host.close()


async def test_a_models_own_settings_hold_for_it_alone(settings: Settings) -> None:
    host = Host(spec(settings={"batch_jobs": 3, "limits": {"wall_s": 7}}), "w1", settings)
    assert (host.settings.batch_jobs, host.settings.limits.wall_s) == (3, 7)
    assert host.settings.limits.nodes == settings.limits.nodes
    assert host.settings.redis_url == settings.redis_url
    await host.close()


async def test_a_model_whose_settings_cannot_be_fails_to_load(settings: Settings, broker: Broker) -> None:
    host = Host(spec(settings={"batch_jobs": 0}), "w1", settings)
    with pytest.raises(ConfigError, match="batch_jobs"):
        await host.load()
    assert (await broker.models.get("tiny")).state is ModelState.FAILED
    await host.close()


@pytest.mark.parametrize("wrong", [{"batch_jobs": 0}, {"redis_url": "redis://elsewhere"}, {"limits": {"walls": 1}}])
def test_a_setting_that_cannot_be_is_named(settings: Settings, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"batch_jobs|redis_url|walls"):
        settings.changed(wrong)


async def test_a_model_that_is_not_there_fails(settings: Settings, broker: Broker, tmp_path: Path) -> None:
    host = Host(spec(source=str(tmp_path)), "w1", settings)
    with pytest.raises(ConfigError, match=r"config\.json"):
        await host.load()
    assert (await broker.models.get("tiny")).state is ModelState.FAILED
    await host.close()


async def test_one_that_cannot_be_told_of_fails_with_the_reason(settings: Settings, broker: Broker) -> None:
    """The store is full when its tokenizer is to be kept."""
    full = settings.model_copy(update={"blob_bytes": 1})

    def with_tokenizer(*args: Any) -> Ready:
        return replace(engine_for(*args), tokenizer=b"{}" * 1000)

    host = Host(spec(), "w1", full, make=with_tokenizer)
    with pytest.raises(StorageFull) as caught:
        await host.load()
    hosted = await broker.models.get("tiny")
    assert (hosted.state, dict(hosted.copies)) == (ModelState.FAILED, {"w1": ModelState.FAILED})
    assert hosted.failure and hosted.failure.detail == caught.value.message
    await host.close()


async def test_the_reason_waits_for_a_broker_that_is_away(
    settings: Settings, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = settings.model_copy(update={"blob_bytes": 1})
    host = Host(spec(), "w1", full, make=lambda *args: replace(engine_for(*args), tokenizer=b"{}" * 1000))
    away = [RedisConnectionError("no Redis")] * 3
    run = host.broker.models._run

    async def some_calls_fail(name: str, *args: Any) -> Any:
        if away and name != "beat" and args[2:3] != ("loading",):
            raise away.pop()
        return await run(name, *args)

    monkeypatch.setattr(host.broker.models, "_run", some_calls_fail)
    with pytest.raises(StorageFull):
        await host.load()
    hosted = await broker.models.get("tiny")
    assert hosted.state is ModelState.FAILED and not away
    await host.close()


async def test_one_told_to_go_while_it_loads_has_not_failed(settings: Settings, broker: Broker) -> None:
    host = Host(spec(), "w1", settings)
    publish = host._publish

    async def told_meanwhile(ready: Ready) -> None:
        await host.announce(ModelState.DRAINING)
        await publish(ready)

    host._publish = told_meanwhile  # type: ignore[method-assign]
    with pytest.raises(ModelUnavailable, match="wanted no longer"):
        await host.load()
    hosted = await broker.models.get("tiny")
    assert (dict(hosted.copies), hosted.failure) == ({"w1": ModelState.DRAINING}, None)
    await host.close()


async def test_several_batches_are_under_way_at_once(settings: Settings) -> None:
    """As many as the engine has use for, each worker with leases of its own; the copy is one all the same."""
    one_by_one = spec(settings={"measure_s": 0, "batch_jobs": 1})
    host = Host(one_by_one, "w1", settings, make=lambda *args: replace(engine_for(*args), lanes=3))
    stop = asyncio.Event()
    async with run_gateway(settings) as gateway:
        await host.load()
        running = asyncio.create_task(host.run(stop))
        jobs = [submission(tiny_graph("transformer.h.0")) for _ in range(9)]
        for job in jobs:
            assert (await gateway.post(job)).status_code == 202
        ends = [(await ended(gateway, job))[-1].body["status"] for job in jobs]
        workers = {worker._name for worker in host._workers}
        assert dict((await gateway.broker.models.get("tiny")).copies) == {"w1": ModelState.READY}
        stop.set()
        await asyncio.wait_for(running, 60)
    assert ends == ["completed"] * 9
    assert workers == {"w1", "w1+1", "w1+2"}
    await host.close()


async def test_a_lane_that_breaks_ends_the_host_and_its_jobs_wait_again(settings: Settings) -> None:
    def lost() -> None:
        raise ReplicaLost("a shard is gone")

    host = Host(spec(), "w1", settings, make=lambda *args: replace(engine_for(*args), lanes=2, check=lost))
    async with run_gateway(settings) as gateway:
        await host.load()
        job = submission(tiny_graph("transformer.h.0"))
        running = asyncio.create_task(host.run(asyncio.Event()))
        await gateway.post(job)
        with pytest.raises(ReplicaLost):
            await asyncio.wait_for(running, 60)
        assert (await gateway.broker.queue.info("ada", job.id)).status == "queued"
    await host.close()


async def test_a_copy_at_rest_that_lost_a_shard_ends(settings: Settings, broker: Broker) -> None:
    gone = threading.Event()

    def check() -> None:
        if gone.is_set():
            raise ReplicaLost("a shard is gone")

    host = Host(spec(), "w1", settings, make=lambda *args: replace(engine_for(*args), check=check))
    await host.load()
    running = asyncio.create_task(host.run(asyncio.Event()))
    await asyncio.wait([running], timeout=1)
    assert not running.done()
    gone.set()
    with pytest.raises(ReplicaLost):
        await asyncio.wait_for(running, 60)
    await host.close()


# -- replaced by another version -------------------------------------------------------------------------------


@asynccontextmanager
async def serving(settings: Settings, name: str, dtype: str = "float32") -> AsyncIterator[Host]:
    """A copy that is loaded, and doesn't run yet."""
    host = Host(spec(dtype=dtype), name, settings)
    await host.load()
    try:
        yield host
    finally:
        await host.close()


async def told_to_go(*hosts: Host) -> None:
    """Run copies that are told to stop at once, to their end."""
    stop = asyncio.Event()
    stop.set()
    await asyncio.wait_for(asyncio.gather(*(host.run(stop) for host in hosts)), 60)


async def handed_in(gateway: Gateway, count: int = 3) -> list[Submission]:
    """Jobs recorded against what is served."""
    manifest = decode_manifest(msgpack.unpackb(await gateway.broker.models.manifest("tiny")))
    graph = tiny_graph("transformer.h.0")
    jobs = [submission(graph, revision=manifest.revision, batching="exclusive") for _ in range(count)]
    for job in jobs:
        assert (await gateway.post(job)).status_code == 202
    return jobs


async def statuses(gateway: Gateway, jobs: list[Submission]) -> set[str]:
    return {str((await gateway.broker.queue.info("ada", job.id)).status) for job in jobs}


@asynccontextmanager
async def labs(settings: Settings) -> AsyncIterator[Gateway]:
    async with run_gateway(settings) as gateway:
        await gateway.broker.models.forget("tiny")
        await gateway.broker.specs.put(spec(dtype="float32"))
        gateway.app.state.parts.catalogue.forget("tiny")
        yield gateway


async def test_a_copy_runs_what_its_successor_cannot_before_it_goes(settings: Settings) -> None:
    async with labs(settings) as gateway, serving(settings, "w1") as old:
        jobs = await handed_in(gateway)
        again = submission(jobs[0].graph, revision=jobs[0].revision)
        await gateway.broker.specs.put(spec(dtype="bfloat16"))
        async with serving(settings, "w2", "bfloat16") as new:
            refused = await gateway.post(again)
            assert (refused.status_code, refused.json()["code"]) == (409, "model_updated")
            async with at_work(new):
                await told_to_go(old)
                assert await statuses(gateway, jobs) == {"completed"}
                (late,) = await handed_in(gateway, 1)
                assert (await ended(gateway, late))[-1].body["status"] == "completed"


async def test_a_copy_whose_entry_is_another_versions_runs_what_it_owes_before_it_goes(settings: Settings) -> None:
    async with labs(settings) as gateway, serving(settings, "w1") as host:
        jobs = await handed_in(gateway)
        await gateway.broker.redis.hset(keys.SPECS, "tiny", '{"spec": {"later": 1}, "removed": false}')
        await told_to_go(host)
        assert await statuses(gateway, jobs) == {"completed"}


async def test_where_the_copies_of_another_revision_are_gone_one_that_is_left_is_what_is_served(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the model would be ready, and its jobs wait for copies that are gone."""
    monkeypatch.setattr(hosting, "STAND_IN_S", 0.1)
    async with labs(settings) as gateway, serving(settings, "w1") as old, serving(settings, "w2", "bfloat16"):
        models = gateway.broker.models
        (job,) = await handed_in(gateway, 1)
        async with at_work(old):
            await asyncio.sleep(0.3)
            assert not await models.outlived("tiny", "w1") and await statuses(gateway, [job]) == {"queued"}
            await models.announce("tiny", "w2", ModelState.STOPPED)
            await models.announce("tiny", "w3", ModelState.LOADING)
            assert not await models.outlived("tiny", "w1"), "that may be its like"
            await models.announce("tiny", "w3", ModelState.STOPPED)
            assert (await ended(gateway, job))[-1].body["error"]["code"] == "model_updated"
            gateway.app.state.parts.catalogue.forget("tiny")
            (late,) = await handed_in(gateway, 1)
            assert (await ended(gateway, late))[-1].body["status"] == "completed"


async def test_who_sends_a_job_again_has_a_cold_model_that_was_changed_loaded(settings: Settings) -> None:
    async with labs(settings) as gateway:
        async with serving(settings, "w1") as old:
            await handed_in(gateway, 1)
            await told_to_go(old)
        manifest = decode_manifest(msgpack.unpackb(await gateway.broker.models.manifest("tiny")))
        await gateway.broker.specs.put(spec(dtype="bfloat16"))
        gateway.app.state.parts.catalogue.forget("tiny")
        refused = await gateway.post(submission(tiny_graph("transformer.h.0"), revision=manifest.revision))
        assert (refused.status_code, refused.json()["code"]) == (503, "model_loading")
        assert (await gateway.broker.models.get("tiny")).wished


async def test_without_room_for_both_what_was_accepted_is_run_and_no_more_accepted(
    settings: Settings,
) -> None:
    async with labs(settings) as gateway, serving(settings, "w1") as old, serving(settings, "w1b") as other:
        jobs = await handed_in(gateway)
        again = submission(jobs[0].graph, revision=jobs[0].revision)
        await gateway.broker.specs.put(spec(dtype="bfloat16"))
        assert await statuses(gateway, jobs) == {"queued"}, "its copies see to it"
        await told_to_go(old, other)
        assert await statuses(gateway, jobs) == {"completed"}
        for answer in (await gateway.post(again), await gateway.client.get("/v1/models/tiny")):
            assert (answer.status_code, answer.json()["code"]) == (503, "model_loading")
            assert "is being updated" in answer.json()["detail"]
        assert (await gateway.post(submission(jobs[0].graph))).status_code == 202, "it runs on anything"
        async with serving(settings, "w2", "bfloat16"):
            assert (await gateway.client.get("/v1/models/tiny")).status_code == 200
            assert (await gateway.post(again)).json()["code"] == "model_updated"
            await handed_in(gateway, 1)


async def test_what_waited_without_a_copy_while_the_model_changed_ends_with_the_reason(settings: Settings) -> None:
    async with labs(settings) as gateway:
        async with serving(settings, "w1") as old:
            await told_to_go(old)
        jobs = await handed_in(gateway, 1)
        await gateway.broker.specs.put(spec(dtype="bfloat16"))
        async with serving(settings, "w2", "bfloat16") as new:
            async with at_work(new):
                error = (await ended(gateway, jobs[0]))[-1].body["error"]
            assert error["code"] == "model_updated" and "while your job waited" in error["message"]


async def test_one_that_only_makes_way_leaves_jobs_to_the_next(settings: Settings) -> None:
    async with labs(settings) as gateway, serving(settings, "w1") as old:
        jobs = await handed_in(gateway, 20)
        await told_to_go(old)
        assert "queued" in await statuses(gateway, jobs)
        again = await handed_in(gateway, 1)
        async with serving(settings, "w2") as new, at_work(new):
            for job in jobs + again:
                assert (await ended(gateway, job))[-1].body["status"] == "completed"


async def test_a_cold_model_takes_nothing_that_was_recorded_against_what_it_was(settings: Settings) -> None:
    async with labs(settings) as gateway:
        async with serving(settings, "w1") as old:
            (job,) = await handed_in(gateway, 1)
            await gateway.broker.queue.cancel("ada", job.id)
            await told_to_go(old)
        again = submission(job.graph, revision=job.revision)
        await gateway.broker.specs.put(spec(dtype="float32", idle_s=1))
        assert (await gateway.post(again)).status_code == 202, "what was changed decides no results"
        await gateway.broker.specs.put(spec(dtype="bfloat16"))
        later = submission(job.graph, revision=job.revision)
        assert (await gateway.post(later)).json()["code"] == "model_loading"
        assert (await gateway.client.get("/v1/models/tiny")).status_code == 503
        assert (await gateway.broker.models.get("tiny")).wished


def test_a_model_that_remembers_is_given_one_batch_at_a_time(settings: Settings) -> None:
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    settings = settings.changed({"measure_s": 0})
    assert ready(load(tiny("llama", rope_parameters=scaled), name="tiny"), settings, lanes=3).lanes == 1
    found = ready(load(tiny("llama"), name="tiny"), settings, room=30 << 20, lanes=3)
    assert found.lanes == 3
    assert 3 * found.lane.memory_bytes <= found.allowed.memory_bytes < 30 << 20


def test_the_settings_of_gateways_and_of_the_lifecycle_are_settings() -> None:
    assert set(Settings.model_fields) > GATEWAYS | LIFECYCLE
