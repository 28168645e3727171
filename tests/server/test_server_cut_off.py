"""A copy that is cut off from the broker alone, for so long that it counts as gone, and comes back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from interpose_server.broker import keys
from interpose_server.broker.connect import Broker
from interpose_server.broker.states import ModelState
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import Settings
from interpose_server.worker import hosting
from interpose_server.worker.engines import Ready, engine_for
from interpose_server.worker.hosting import Host
from models import tiny
from redis.exceptions import ConnectionError as RedisConnectionError
from rig import Gateway, Valkey, at_work, run_gateway, submission, tiny_graph
from test_server_worker import ended

SPEC = ModelSpec(name="tiny", source=str(tiny("gpt2")), settings={"measure_s": 0})
READY = {"w1": ModelState.READY}


class Cable:
    """Another way to a Valkey, which can be cut."""

    def __init__(self, valkey: Valkey) -> None:
        self._end = Path(valkey.folder, "valkey.sock")
        self._way = Path(valkey.folder, "cable.sock")
        self.url = f"unix://{self._way}"

    def mend(self) -> None:
        self._way.symlink_to(self._end)

    async def cut(self, broker: Broker) -> None:
        self._way.unlink(missing_ok=True)
        # Whoever else is connected comes back at once.
        await broker.redis.execute_command("CLIENT", "KILL", "SKIPME", "yes")


@pytest.fixture
def cable(valkey: Valkey) -> Iterator[Cable]:
    cable = Cable(valkey)
    cable.mend()
    yield cable
    Path(valkey.folder, "cable.sock").unlink(missing_ok=True)


@asynccontextmanager
async def lab(settings: Settings, cable: Cable, **make: Any) -> AsyncIterator[tuple[Gateway, Host]]:
    """A gateway, and a copy at the cable's end. The sweeper looks only at first: tests see for themselves."""
    settings = settings.model_copy(update={"sweep_s": 3600.0})
    async with run_gateway(settings) as gateway:
        host = Host(SPEC, "w1", settings.model_copy(update={"redis_url": cable.url}), **make)
        await gateway.broker.models.forget("tiny")
        await gateway.broker.specs.put(SPEC)
        gateway.app.state.parts.catalogue.forget("tiny")
        yield gateway, host
        await host.close()


async def silent_for_long(broker: Broker) -> None:
    await broker.redis.zadd(keys.HEARD.format(model="tiny"), {"w1": int(time.time() * 1000) - 100_000})


async def told(broker: Broker) -> None:
    """Return once the copy runs jobs, as far as the broker knows."""
    async with asyncio.timeout(60):
        while (await broker.models.get("tiny")).copies != READY:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def runs_a_job(gateway: Gateway) -> None:
    job = submission(tiny_graph("transformer.h.0"))
    assert (await gateway.post(job)).status_code == 202
    assert (await ended(gateway, job))[-1].body["status"] == "completed"


@pytest.mark.parametrize("forgotten", ["nothing", "copy", "everything"])
async def test_one_that_runs_jobs(
    settings: Settings, cable: Cable, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """Whether it was silent only, or told to be gone, or the broker lost all it knew."""
    monkeypatch.setattr(hosting, "STAND_IN_S", 0.1)
    async with lab(settings, cable) as (gateway, host):
        models = gateway.broker.models
        await host.load()
        async with at_work(host):
            await runs_a_job(gateway)
            await cable.cut(gateway.broker)
            await asyncio.sleep(0.3)
            await silent_for_long(gateway.broker)
            assert await models.bury() == [] and not (await models.get("tiny")).copies
            if forgotten == "copy":
                await models.announce("tiny", "w1", ModelState.STOPPED)
            elif forgotten == "everything":
                await models.forget("tiny")
                await gateway.broker.specs.put(SPEC)
            with pytest.raises(RedisConnectionError):
                await host.broker.models.beat("tiny", "w1")
            cable.mend()
            await told(gateway.broker)
            gateway.app.state.parts.catalogue.forget("tiny")
            await runs_a_job(gateway)
        assert not (await models.get("tiny")).copies, "its last word is heard"


async def test_one_that_loads(settings: Settings, cable: Cable) -> None:
    """It is loaded while the broker is away, which took it for dead: it waits until that can be told."""
    go = threading.Event()

    def slowly(*args: Any) -> Ready:
        go.wait(90)
        return engine_for(*args)

    async with lab(settings, cable, make=slowly) as (gateway, host):
        models = gateway.broker.models
        loading = asyncio.create_task(host.load())
        async with asyncio.timeout(60):
            while not (await models.get("tiny")).copies:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await cable.cut(gateway.broker)
        await silent_for_long(gateway.broker)
        assert await models.bury() == ["w1"]
        assert (await models.get("tiny")).state is ModelState.FAILED
        go.set()
        await asyncio.sleep(4)
        assert not loading.done()
        cable.mend()
        await asyncio.wait_for(loading, 60)
        hosted = await models.get("tiny")
        assert (dict(hosted.copies), hosted.failure) == (READY, None)
        async with at_work(host):
            await runs_a_job(gateway)


async def test_one_of_a_model_that_was_taken_out_stays_unknown(settings: Settings, cable: Cable) -> None:
    async with lab(settings, cable) as (gateway, host):
        models = gateway.broker.models
        await host.load()
        await silent_for_long(gateway.broker)
        await gateway.broker.specs.remove("tiny")
        assert await models.retire("tiny")
        assert host._known and not await host.broker.models.rejoin(*host._known)
        assert "tiny" not in await models.names()


async def test_where_others_came_meanwhile_they_are_what_is_served(settings: Settings, cable: Cable) -> None:
    """As after an update: its copies keep their manifest, and this one has what was recorded against its own."""
    async with lab(settings, cable) as (gateway, host):
        models = gateway.broker.models
        await host.load()
        await models.announce("tiny", "w1", ModelState.STOPPED)
        served = keys.MODEL.format(model="tiny")
        await gateway.broker.redis.hset(served, "served", "another")
        assert host._known and await host.broker.models.rejoin(*host._known)
        assert not await host.broker.models.rejoin(*host._known)
        assert (await models.get("tiny")).copies == READY
        assert await gateway.broker.redis.hget(served, "served") == b"another"
        own = await gateway.broker.redis.hget(keys.SERVED.format(model="tiny"), "w1")
        assert own and own != b"another"
