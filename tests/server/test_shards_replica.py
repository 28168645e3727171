"""A Serve replica, without Serve."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from interpose_server.broker.connect import Broker
from interpose_server.broker.states import ModelState
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import Settings


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Serve, as it is imported
async def test_a_copy_that_is_ended_before_it_began_loads_nothing_and_is_no_failure(
    broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interpose_server.shards import replica

    await broker.specs.put(ModelSpec(name="big", source="/none"))
    asked, go_on = threading.Event(), threading.Event()

    def shared() -> Settings:
        asked.set()
        assert go_on.wait(20)
        return settings

    monkeypatch.setattr(replica, "shared", shared)
    context = SimpleNamespace(get_actor_id=lambda: "0" * 32)
    monkeypatch.setattr(replica.ray, "get_runtime_context", lambda: context)
    copy: Any = SimpleNamespace()  # One of its class would be ended again as it is let go.
    begun = asyncio.create_task(replica.Replica.__init__(copy, {"name": "big", "source": "/none"}))
    assert await asyncio.to_thread(asked.wait, 20)
    await replica.Replica.__del__(copy)
    go_on.set()
    await begun
    hosted = await broker.models.get("big")
    assert hosted.state is ModelState.COLD and hosted.failure is None
