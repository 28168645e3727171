"""A save's bytes over HTTP: whole, from any byte on, for its owner alone, never more held than a piece or two."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from interpose.errors import JobPoisoned
from interpose.wire.messages import Ack, Chunk, Save, Status, Subscribe, encode
from interpose.wire.status import JobStatus
from interpose_server import blob_keys, blobs
from interpose_server.broker import events, keys
from interpose_server.broker.queue import Outcome, Report
from interpose_server.downloads import PIECE
from interpose_server.settings import Settings
from rig import Gateway, Valkey, listening, make_settings, run_gateway, submission
from test_server_stream import DATA, done_job, opened, receive, record, to_the_end
from test_server_worker import Obedient, ended, working


async def with_saves(gateway: Gateway) -> str:
    """A job whose third event is a small save, whose fourth a large one."""
    gateway.blobs.put(blob_keys.result("ada", "big"), [DATA], 60)
    return await done_job(gateway, record(1, b"small"), record(3, DATA, "big"))


async def fetch(gateway: Gateway, job: str, event: int, **headers: str) -> Any:
    return await gateway.client.get(f"/v1/jobs/{job}/saves/{event}", headers=headers)


async def test_whole_saves_large_and_small(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        job = await with_saves(gateway)
        for event, data in ((3, b"small"), (4, DATA)):
            answer = await fetch(gateway, job, event)
            assert (answer.status_code, answer.content) == (200, data)
            assert answer.headers["content-length"] == str(len(data))
        assert gateway.app.state.parts.metrics.sent._value.get() == len(DATA) + 5


async def ask(gateway: Gateway, address: str, job: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which the bytes of a job's third event are about to come."""
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"GET /v1/jobs/{job}/saves/3 HTTP/1.1", "Host: x", f"Authorization: Bearer {gateway.token}", "", ""
    writer.write("\r\n".join(head).encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    return reader, writer


@pytest.mark.parametrize("start", [1, 5, len(DATA) - 1])
async def test_from_any_byte_on(settings: Settings, start: int) -> None:
    async with run_gateway(settings) as gateway:
        answer = await fetch(gateway, await with_saves(gateway), 4, Range=f"bytes={start}-")
    assert (answer.status_code, answer.content) == (206, DATA[start:])
    assert answer.headers["content-range"] == f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"


@pytest.mark.parametrize("wanted", ["bytes=0-", "bytes=-5", "bytes=1-5", "bytes=1-,7-", "lines=3-", "bytes=²-", ""])
async def test_other_ranges_are_not_heeded(settings: Settings, wanted: str) -> None:
    async with run_gateway(settings) as gateway:
        job = await with_saves(gateway)
        answer = await gateway.client.get(f"/v1/jobs/{job}/saves/4", headers=[(b"range", wanted.encode("latin-1"))])
    assert (answer.status_code, answer.content) == (200, DATA)


async def test_what_is_not_there_or_not_yours(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        job = await with_saves(gateway)
        token, _ = await gateway.broker.accounts.create("bob")
        for event in (1, 5, 99):
            assert (await fetch(gateway, job, event)).json()["code"] == "unknown_job"
        assert (await fetch(gateway, "0" * 32, 4)).json()["code"] == "unknown_job"
        assert (await fetch(gateway, job, 4, **gateway.auth(token))).json()["code"] == "unknown_job"
        assert (await fetch(gateway, job, 4, Authorization="Bearer no")).status_code == 401
        assert (await fetch(gateway, job, 4, Range=f"bytes={len(DATA)}-")).json()["code"] == "invalid_payload"
        for path in (f"{job}/saves/0", f"{job}/saves/{1 << 32}", f"{job}/saves/x", "..%2f/saves/1"):
            assert (await gateway.client.get(f"/v1/jobs/{path}")).status_code in (400, 404, 422)
        gateway.blobs.delete(blob_keys.result("ada", "big"))
        assert (await fetch(gateway, job, 4)).json()["code"] == "unknown_job"


async def test_what_the_page_cache_lacks_is_read_in_a_thread(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing at hand, then half of each piece."""
    for part in (0, 1000):
        at_hand = blobs.LocalReader.at_hand

        def some(self: Any, offset: int, buffer: memoryview, part: int = part, whole: Any = at_hand) -> int:
            return int(whole(self, offset, buffer[:part])) if part else 0

        with monkeypatch.context() as patched:
            patched.setattr(blobs.LocalReader, "at_hand", some)
            async with run_gateway(settings) as gateway:
                assert (await fetch(gateway, await with_saves(gateway), 4)).content == DATA


async def test_heads_alone_are_sent_to_who_fetches(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        job = await with_saves(gateway)
        async with opened(gateway) as socket:
            await socket.send(encode(Subscribe(job, after=2, apart=6)))
            messages = await to_the_end(socket)
            assert [message.apart for message in messages if isinstance(message, Save)] == [False, True]
            assert {message.seq for message in messages if isinstance(message, Chunk)} == {3}


async def test_an_acknowledged_results_bytes_go_at_once(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        job = await with_saves(gateway)
        async with opened(gateway) as socket:
            await socket.send(encode(Ack("0" * 32)))
            await socket.send(encode(Ack(job)))
            async with asyncio.timeout(5):
                while gateway.blobs.used():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        assert (await gateway.client.get(f"/v1/jobs/{job}")).json()["status"] == "completed"


async def test_a_slow_reader_holds_little_and_nobody_up(valkey: Valkey, tmp_path: Path) -> None:
    async with run_gateway(make_settings(valkey, tmp_path, downloads_per_user=1)) as gateway:
        huge = bytes(64 << 20)
        gateway.blobs.put(blob_keys.result("ada", "huge"), [huge], 60)
        job = await done_job(gateway, record(1, huge, "huge"))
        sent = gateway.app.state.parts.metrics.sent._value
        async with listening(gateway.app) as address:
            host, _, port = address.partition(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 16)
            head = (
                f"GET /v1/jobs/{job}/saves/3 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.token}\r\n\r\n"
            )
            writer.write(head.encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.3)
            assert sent.get() < 32 << 20  # the sockets' own buffers, and a piece
            open_files = psutil.Process().num_fds()
            refused = await fetch(gateway, job, 3)
            assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
            assert psutil.Process().num_fds() == open_files
            writer.transport.abort()
            async with asyncio.timeout(5):
                while (await fetch(gateway, job, 3, Range=f"bytes={len(huge) - 9}-")).status_code == 429:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)


# Saves that are told of before all their bytes are there


KEY = blob_keys.result("ada", "growing")


async def telling(gateway: Gateway) -> tuple[str, str]:
    """A running job that told of a save whose bytes aren't there yet: its id and ref."""
    job = submission()
    await gateway.post(job)
    ref = keys.ref("ada", job.id)
    await gateway.broker.queue.claim("tiny", "w1", [ref])
    await gateway.broker.queue.report([Report(ref, "w1", 1, 0, [record(1, DATA, "growing")], None)])
    return job.id, ref


async def finish(gateway: Gateway, ref: str) -> None:
    await gateway.broker.queue.report([Report(ref, "w1", 1, 1, [], Outcome(None, 0.1))])


async def test_what_is_there_is_sent_while_the_rest_is_written(settings: Settings) -> None:
    async with run_gateway(settings) as gateway, listening(gateway.app) as address:
        host, _, port = address.partition(":")
        with gateway.blobs.writer(KEY, len(DATA), 60, shown=True) as writer:
            job, _ = await telling(gateway)
            reader, sending = await asyncio.open_connection(host, int(port))
            head = (
                f"GET /v1/jobs/{job}/saves/3 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.token}\r\n\r\n"
            )
            sending.write(head.encode())
            assert b"206" not in await reader.readuntil(b"\r\n\r\n")
            writer.write(DATA[:PIECE])
            assert await reader.readexactly(PIECE) == DATA[:PIECE]
            writer.write(DATA[PIECE:])
            writer.commit()
        assert await reader.readexactly(len(DATA) - PIECE) == DATA[PIECE:]
        sending.close()


async def test_bytes_that_are_dropped_break_off_and_the_job_says_why(settings: Settings) -> None:
    async with run_gateway(settings) as gateway, listening(gateway.app) as address:
        with gateway.blobs.writer(KEY, len(DATA), 60, shown=True) as writer:
            job, ref = await telling(gateway)
            reader, sending = await ask(gateway, address, job)
            writer.write(DATA[:PIECE])
            assert await reader.readexactly(PIECE) == DATA[:PIECE]
        async with asyncio.timeout(5):
            assert await reader.read() == b""  # never a short one that looks whole: more was announced
        sending.close()
        assert (await fetch(gateway, job, 3)).json()["code"] == "internal_error"  # the client asks again
        error = Outcome(JobPoisoned("no room"), 0.1)
        await gateway.broker.queue.report([Report(ref, "w1", 1, 1, [], error)])
        assert (await fetch(gateway, job, 3)).json()["code"] == "unknown_job"


async def test_over_the_stream_only_whole_saves_are_sent(settings: Settings) -> None:
    async with run_gateway(settings) as gateway, opened(gateway) as socket:
        with gateway.blobs.writer(KEY, len(DATA), 60, shown=True) as writer:
            job, ref = await telling(gateway)
            await socket.send(encode(Subscribe(job, after=2)))
            writer.write(DATA[:1000])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(socket.recv(), 0.1)
            writer.write(DATA[1000:])
            writer.commit()
        assert isinstance(await receive(socket), Save)
        assert bytes((await receive(socket)).data) == DATA
        await finish(gateway, ref)
        assert (await receive(socket)).status is JobStatus.COMPLETED


async def test_over_the_stream_a_save_that_never_became_whole_is_passed_over(settings: Settings) -> None:
    """The worker died while it wrote: the next attempt's save is the job's, and no number is missing."""
    async with run_gateway(settings) as gateway, opened(gateway) as socket:
        with gateway.blobs.writer(KEY, len(DATA), 60, shown=True) as writer:
            writer.write(DATA[:1000])
            job, ref = await telling(gateway)
            await socket.send(encode(Subscribe(job, after=2)))
            await asyncio.sleep(0.05)
            await gateway.broker.queue.reap("w1")
            await gateway.broker.queue.claim("tiny", "w2", [ref])
            gateway.blobs.put(blob_keys.result("ada", "again"), [DATA], 60)
            again = record(1, DATA, "again")
            await gateway.broker.queue.report([Report(ref, "w2", 2, 0, [again], Outcome(None, 0.1))])
            told = await to_the_end(socket)
    assert [(message.seq, message.attempt) for message in told if not isinstance(message, Chunk)] == [
        (3, 1), (4, 1), (5, 2), (6, 2), (7, 2)
    ]  # fmt: skip
    assert told[0] == Status(job, 3, 1, JobStatus.RUNNING)
    assert b"".join(bytes(message.data) for message in told if isinstance(message, Chunk)) == DATA


async def test_a_worker_tells_of_a_large_save_before_it_is_written_and_of_the_end_after(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    write = blobs.LocalWriter.write

    def slowly(self: Any, data: Any) -> None:
        if data.nbytes > 1000:
            assert go_on.wait(10)
        write(self, data)

    monkeypatch.setattr(blobs.LocalWriter, "write", slowly)
    large = torch.arange(2 << 20, dtype=torch.float32)

    def step(job: Any) -> None:
        job.sink.save(1, large)

    async with run_gateway(settings) as gateway, working(gateway, Obedient(step)):
        job = submission()
        await gateway.post(job)
        ref = keys.ref("ada", job.id)
        async with asyncio.timeout(10):
            while not (found := await events.read(gateway.broker.redis, ref, 2)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        seen = [event.kind for event in await events.read(gateway.broker.redis, ref, 2)]
        assert (found[0].kind, seen) == ("save", ["save"])
        assert (await gateway.broker.queue.info("ada", job.id)).status is JobStatus.RUNNING
        go_on.set()
        await ended(gateway, job)
        assert (await fetch(gateway, job.id, 3)).content == large.numpy().tobytes()


async def test_a_told_save_that_cannot_be_written_fails_the_job(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blobs.LocalWriter, "write", full)
    engine = Obedient(lambda job: job.sink.save(1, torch.zeros(2 << 20)))
    async with run_gateway(settings) as gateway, working(gateway, engine):
        job = submission()
        await gateway.post(job)
        found = await ended(gateway, job)
        assert (found[-1].body["status"], found[-1].body["error"]["code"]) == ("failed", "internal_error")
        assert gateway.blobs.used() == 0
