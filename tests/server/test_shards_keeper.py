"""How `deploy up` waits for the keeper, and what that says of models for which nodes may be about to join."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from interpose.errors import ConfigError
from interpose.wire.status import JobStatus
from interpose_server.broker.connect import Broker
from interpose_server.models.spec import ModelSpec, Replicas
from interpose_server.settings import Settings
from rig import Clock, new_job

SERVES_OWN = pytest.mark.filterwarnings("ignore::DeprecationWarning")
"""Warnings of Serve, as it is imported."""


@SERVES_OWN
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


@SERVES_OWN
async def test_jobs_of_a_model_that_is_too_large_wait_while_nodes_join(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interpose_server.shards import apps, keeper

    nodes, clock = {"n"}, Clock()
    refused = apps.Applied([], {"tiny": ConfigError("", details={"reason": "too_large"})}, {})
    monkeypatch.setattr(keeper, "total", lambda: {node: {} for node in nodes})
    monkeypatch.setattr(keeper, "time", clock)
    monkeypatch.setattr(keeper, "end_unplaced", lambda: asyncio.sleep(0, frozenset()))
    monkeypatch.setattr(keeper, "inventory", lambda *_: None)
    monkeypatch.setattr(type(broker.specs), "show", lambda *_: asyncio.sleep(0))
    monkeypatch.setattr(keeper.Notes, "write", lambda *_: None)
    monkeypatch.setattr(apps, "apply", lambda *_: refused)
    monkeypatch.setattr(apps, "states", dict)
    await broker.specs.put(ModelSpec(name="tiny"))
    job, found = new_job(), []
    await broker.queue.submit(job)
    rounds = keeper.Rounds(broker, Settings(), keeper.Hanging())
    for seconds in (0, 30, keeper.AGAIN_S, 1):
        clock.now += seconds
        if seconds == 30:
            nodes.add("m")
        await rounds.go()
        found.append((await broker.queue.info(job.user, job.id)).status)
    assert found == [JobStatus.QUEUED] * 3 + [JobStatus.FAILED]


@SERVES_OWN
async def test_what_a_file_changes_is_said(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    from interpose_server.shards import up

    said: list[str] = []
    monkeypatch.setattr(up, "say", said.append)
    kept = ModelSpec(name="kept", replicas=Replicas(min=1))
    await up.put([kept, ModelSpec(name="late", source="/nowhere/late"), ModelSpec(name="old")], broker)
    asked = "a copy is loaded whenever somebody asks for it"
    nowhere = "/nowhere/late isn't there as seen from this machine"
    assert said == ["kept is new", f"late is new; {asked}; {nowhere}", f"old is new; {asked}"]
    said.clear()
    await up.put([kept, ModelSpec(name="late", dtype="bfloat16")], broker)
    assert said == [
        f"late is changed; {asked}",
        "old isn't in the file any more; it is taken down once its jobs are over",
    ]
