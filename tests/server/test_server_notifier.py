"""What goes along with a wake-up is used only where it is all there is."""

from __future__ import annotations

import asyncio

from interpose_server.broker import keys
from interpose_server.broker.events import Stored, read
from interpose_server.broker.jobs import Outcome, Record, Report
from interpose_server.notifier import LAZY_S, MOST_TOLD, Bell
from interpose_server.settings import Settings
from rig import new_job, run_gateway


def event(seq: int) -> Stored:
    return Stored(seq, "log", 1, {}, b"", "")


async def test_what_follows_is_taken_once() -> None:
    bell = Bell()
    bell.tell([event(2), event(3)])
    bell.tell([event(4)])
    assert bell.rung
    assert [told.seq for told in bell.take(2)] == [3, 4]
    assert not bell.rung and bell.take(4) == []


async def test_with_a_gap_or_a_bare_ring_nothing_is_taken() -> None:
    bell = Bell()
    bell.tell([event(5)])
    assert bell.take(3) == []
    bell.tell([event(6)])
    bell.ring()
    assert bell.take(5) == []
    bell.tell([event(7)])
    assert [told.seq for told in bell.take(6)] == [7]


async def test_what_nobody_comes_for_is_let_go() -> None:
    bell = Bell()
    for seq in range(1, MOST_TOLD + 2):
        bell.tell([event(seq)])
    assert bell.rung and bell.take(0) == []


async def test_what_can_wait_rings_a_little_later_and_only_if_it_is_still_there() -> None:
    bell = Bell()
    bell.tell([event(1)], lazily=True)
    assert not bell.rung
    async with asyncio.timeout(60):
        await bell.wait()
    assert [told.seq for told in bell.take(0)] == [1]
    bell.tell([event(2)], lazily=True)
    bell.take(1)
    await asyncio.sleep(2 * LAZY_S)
    assert not bell.rung


async def test_told_or_read_events_are_the_same(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        queue = gateway.broker.queue
        job = new_job()
        await queue.submit(job)
        notifier, ref = gateway.app.state.parts.notifier, f"ada/{job.id}"
        heard: list[bytes] = []
        hear = notifier._hear
        notifier._hear = lambda message: (hear(message), heard.append(message))
        with notifier.listening(ref) as bell:
            while not await gateway.broker.redis.publish(keys.WAKE, ref):  # noqa: ASYNC110 - until it listens
                await asyncio.sleep(0.01)
            async with asyncio.timeout(60):
                while ref.encode() not in heard:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert bell.rung and bell.take(1) == []
            await queue.take("tiny", "w1")
            small = [Record("save", b"\x80", bytes(range(256))), Record("log", b"\x81\xa1a\x01")]
            await queue.report([Report(ref, "w1", 1, 0, small)])
            told: list[Stored] = []
            async with asyncio.timeout(60):
                while len(told) < 3:
                    await bell.wait()
                    told += bell.take(1 + len(told))
            assert told == await read(gateway.broker.redis, ref, 1)
            await queue.report(
                [Report(ref, "w1", 1, 2, [Record("save", b"\x80", bytes(17 << 10))], Outcome(None, 0))]
            )
            async with asyncio.timeout(60):
                await bell.wait()
            assert bell.take(4) == []
            assert [event.kind for event in await read(gateway.broker.redis, ref, 4)] == ["save", "status"]
