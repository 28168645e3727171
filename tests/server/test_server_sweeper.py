"""The sweep, after the broker was away for longer than a lease."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from interpose_server.broker import keys
from rig import Valkey, make_settings, run_gateway, run_valkey, submission


@pytest.fixture
def mortal() -> Iterator[Valkey]:
    """One that may be killed: others have theirs."""
    yield from run_valkey()


async def test_who_could_not_say_that_it_lives_is_not_taken_for_dead(mortal: Valkey, tmp_path: Path) -> None:
    async with run_gateway(make_settings(mortal, tmp_path, lease_s=4)) as gateway:
        job, queue = submission(), gateway.broker.queue
        ref = keys.ref("ada", job.id)
        await gateway.post(job)
        await queue.claim("tiny", "w1", [ref])
        await asyncio.to_thread(mortal.kill)
        await asyncio.sleep(5)
        await asyncio.to_thread(mortal.start)
        # The worker comes a moment later than the sweep.
        await asyncio.sleep(1.5)
        assert await queue.heartbeat("w1", [(ref, 1)]) == set()
        # One that stays silent is given up all the same.
        async with asyncio.timeout(90):
            while (await queue.info("ada", job.id)).status != "queued":  # noqa: ASYNC110
                await asyncio.sleep(0.1)
