"""How `deploy up` waits for the keeper."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from interpose_server.broker.connect import Broker
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import Settings


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Serve's own, as it is imported
async def test_a_removed_model_that_goes_meanwhile_is_nothing_to_wait_for(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interpose_server.shards import apps, keeper

    applied: list[Any] = []
    monkeypatch.setattr(keeper.Notes, "read", lambda self, name: applied)
    settings = Settings()
    await broker.specs.put(ModelSpec(name="a"))
    await broker.specs.remove("a")
    waiting = asyncio.create_task(keeper.caught_up(broker, settings, lambda text: None))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    assert await broker.models.retire("a")
    applied[:] = [await broker.specs.revision(), apps.settings_mark(settings)]
    await asyncio.wait_for(waiting, 10)
