"""A host: one copy of a model loaded, told of, run and stopped, in this process."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from interpose.errors import ConfigError, ModelUnavailable, ReplicaLost, StorageFull
from interpose.runtime.loading import load
from interpose_server.broker.connect import Broker
from interpose_server.broker.states import ModelState
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import GATEWAYS, Settings
from interpose_server.worker.engines import Ready, engine_for, ready
from interpose_server.worker.hosting import Host
from models import tiny
from redis.exceptions import ConnectionError as RedisConnectionError
from rig import run_gateway, submission, tiny_graph
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
    await asyncio.wait_for(running, 10)
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
    host = Host(spec(), "w1", settings)
    away = [RedisConnectionError("no Redis")] * 3
    run = host.broker.models._run

    async def some_calls_fail(name: str, *args: Any) -> Any:
        if away and args[2:3] != ("loading",):
            raise away.pop()
        return await run(name, *args)

    monkeypatch.setattr(host.broker.models, "_run", some_calls_fail)
    with pytest.raises(RedisConnectionError):
        await host.load()
    hosted = await broker.models.get("tiny")
    assert hosted.state is ModelState.FAILED
    assert hosted.failure and "no Redis" in hosted.failure.detail
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
        await asyncio.wait_for(running, 20)
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
            await asyncio.wait_for(running, 20)
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
        await asyncio.wait_for(running, 5)
    await host.close()


def test_a_model_that_remembers_is_given_one_batch_at_a_time(settings: Settings) -> None:
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    settings = settings.changed({"measure_s": 0})
    assert ready(load(tiny("llama", rope_parameters=scaled), name="tiny"), settings, lanes=3).lanes == 1
    found = ready(load(tiny("llama"), name="tiny"), settings, room=30 << 20, lanes=3)
    assert found.lanes == 3
    assert 3 * found.lane.memory_bytes <= found.allowed.memory_bytes < 30 << 20


def test_the_settings_of_gateways_are_settings() -> None:
    assert set(Settings.model_fields) > GATEWAYS
