"""A host: one copy of a model loaded, told of, run and stopped, in this process."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from interpose.errors import ConfigError, ReplicaLost
from interpose.runtime.loading import load
from interpose_server.broker.connect import Broker
from interpose_server.broker.states import ModelState
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import Settings
from interpose_server.worker.engines import engine_for, ready
from interpose_server.worker.hosting import Host
from models import tiny
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


def test_a_model_that_remembers_is_given_one_batch_at_a_time(settings: Settings) -> None:
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    settings = settings.changed({"measure_s": 0})
    assert ready(load(tiny("llama", rope_parameters=scaled), name="tiny"), settings, lanes=3).lanes == 1
    found = ready(load(tiny("llama"), name="tiny"), settings, room=30 << 20, lanes=3)
    assert found.lanes == 3
    assert 3 * found.lane.memory_bytes <= found.allowed.memory_bytes < 30 << 20
