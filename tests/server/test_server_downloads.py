"""A save's bytes over HTTP: whole, from any byte on, for its owner alone, never more held than a piece or two."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psutil
import pytest
from interpose.wire.messages import Ack, Chunk, Save, Subscribe, encode
from interpose_server import blob_keys, blobs
from interpose_server.settings import Settings
from rig import Gateway, Valkey, listening, make_settings, run_gateway
from test_server_stream import DATA, done_job, opened, record, to_the_end


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


@pytest.mark.parametrize("start", [1, 5, len(DATA) - 1])
async def test_from_any_byte_on(settings: Settings, start: int) -> None:
    async with run_gateway(settings) as gateway:
        answer = await fetch(gateway, await with_saves(gateway), 4, Range=f"bytes={start}-")
    assert (answer.status_code, answer.content) == (206, DATA[start:])
    assert answer.headers["content-range"] == f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"


@pytest.mark.parametrize(
    "wanted",
    ["bytes=0-", "bytes=-5", "bytes=1-5", "bytes=1-,7-", "lines=3-", "bytes=²-", f"bytes={'9' * 5000}-", ""],
)
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
            async with asyncio.timeout(60):
                while gateway.blobs.used():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        assert (await gateway.client.get(f"/v1/jobs/{job}")).json()["status"] == "completed"
        for kind in ("safetensors", "msgpack"):
            gone = await gateway.client.get(f"/v1/jobs/{job}/result", params={"format": kind})
            assert (gone.status_code, gone.json()["code"]) == (404, "unknown_job")


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
            open_files = psutil.Process().open_files()
            refused = await fetch(gateway, job, 3)
            assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
            assert psutil.Process().open_files() == open_files
            writer.transport.abort()
            async with asyncio.timeout(60):
                while (await fetch(gateway, job, 3, Range=f"bytes={len(huge) - 9}-")).status_code == 429:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
