"""The engine waits a moment for those who come again, where that saves a forward, and not for nobody."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from interpose.graph.footprint import Footprint
from interpose_server.settings import Settings
from interpose_server.worker import patience
from interpose_server.worker.cost import Cost
from interpose_server.worker.loop import Worker
from interpose_server.worker.patience import Patience
from interpose_server.worker.scheduler import Budget
from rig import Gateway, at_work, run_gateway, submission, tiny_manifest

COST = Cost(forward_s=0.06, token_s=0.0001)
ONE = Footprint(rows=1, longest=3)


def budget(**changes: Any) -> Budget:
    return Budget(**{"jobs": 64, "rows": 256, "tokens": 4096, "memory_bytes": 1 << 30, "cost": COST, **changes})


def test_it_waits_for_as_many_as_there_were_and_half_a_forward_at_most() -> None:
    assert Patience(budget()).asked([ONE] * 3, [ONE] * 5) == (8, 0.03)
    assert Patience(budget(cost=Cost(forward_s=10))).asked([ONE] * 3, [])[1] == patience.MOST_S
    assert Patience(budget(cost=Cost())).asked([ONE] * 3, [ONE])[1] == 0


def test_it_waits_neither_for_one_alone_nor_for_more_than_fit() -> None:
    assert Patience(budget()).asked([ONE], [])[1] == 0
    assert Patience(budget(jobs=4)).asked([ONE] * 4, [ONE] * 4)[1] == 0
    assert Patience(budget(tokens=9)).asked([ONE] * 3, [ONE] * 3)[1] == 0
    assert Patience(budget(tokens=15)).asked([ONE] * 3, [ONE] * 3) == (5, 0.03)


def test_it_waits_for_nobody_who_could_not_join() -> None:
    own, alone = Patience(budget()), replace(ONE, exclusive=True)
    assert own.asked([alone] * 2, [])[1] == 0
    assert own.asked([ONE] * 2, [alone])[1] == 0
    assert own.asked([ONE] * 2, [replace(ONE, kind="generate")])[1] == 0
    assert own.asked([ONE, ONE, alone], [ONE]) == (3, 0.03)


def test_who_does_not_come_is_waited_for_ever_less_often() -> None:
    own, waited = Patience(budget()), []
    for _ in range(40):
        waited.append(own.asked([ONE], [ONE])[1] > 0)
        if waited[-1]:
            own.told(0)
    assert [place for place, did in enumerate(waited) if did] == [0, 2, 6, 14, 30]
    own.told(1)
    assert own.asked([ONE], [ONE])[1] > 0


class Slow:
    """An engine double whose forwards take their time."""

    def __init__(self) -> None:
        self.manifest = tiny_manifest()
        self.sizes: list[int] = []

    def run(self, jobs: Any, breaks: Any = None) -> list[None]:
        self.sizes.append(len(jobs))
        time.sleep(0.06)
        return [None] * len(jobs)


async def client(gateway: Gateway, jobs: int, after_s: float) -> None:
    """One job after another."""
    await asyncio.sleep(after_s)
    for _ in range(jobs):
        job = submission()
        await gateway.post(job)
        while not (await gateway.broker.queue.info("ada", job.id)).status.terminal:  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def batches(settings: Settings, cost: Cost, clients: int, jobs: int) -> list[int]:
    engine = Slow()
    async with run_gateway(settings) as gateway:
        worker = Worker(
            "tiny", "w1", engine, gateway.broker, gateway.blobs, settings, budget=budget(cost=cost, seconds=2.0)
        )
        async with at_work(worker):
            await asyncio.gather(*(client(gateway, jobs, 0.03 * place) for place in range(clients)))
    return engine.sizes


async def test_clients_that_took_turns_come_to_share_their_forwards(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "MOST_S", 0.5)  # this machine may be slow
    sizes = await batches(settings, Cost(forward_s=1.0), 2, 14)  # or may stop for a moment, and they come apart
    assert sum(sizes) == 28
    assert sizes.count(2) >= 5


async def test_a_client_alone_is_answered_at_once(settings: Settings) -> None:
    assert await batches(settings, COST, 1, 8) == [1] * 8
