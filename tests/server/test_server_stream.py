"""The websocket: events in order, resumed anywhere, many jobs, one never in another's way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
from interpose.errors import ModelUnavailable
from interpose.wire.messages import (
    Ack,
    Chunk,
    Hello,
    Loading,
    Position,
    Refused,
    Save,
    Status,
    Subscribe,
    Unsubscribe,
    decode_server,
    encode,
)
from interpose.wire.status import JobStatus
from interpose_server import blob_keys
from interpose_server.broker import keys
from interpose_server.broker.jobs import Outcome, Record, Report
from interpose_server.broker.states import ModelState
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import Settings
from rig import Gateway, Valkey, listening, make_settings, run_gateway, submission, tiny_manifest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

DATA = bytes(range(256)) * 1200


def record(node: int, data: bytes, blob: str = "") -> Record:
    tensors = [{"dtype": "uint8", "shape": [len(data)]}]
    body = msgpack.packb({"node": node, "tree": {"tensor": 0}, "tensors": tensors, "nbytes": len(data)})
    return Record("save", body, b"" if blob else data, blob)


@asynccontextmanager
async def opened(gateway: Gateway, token: str = "", **headers: str) -> AsyncIterator[ClientConnection]:
    async with listening(gateway.app) as address:
        all_headers = {**gateway.auth(token or gateway.token), "Interpose-Protocol": "1", **headers}
        async with connect(
            f"ws://{address}/v1/stream", additional_headers=all_headers, compression=None, max_size=None
        ) as socket:
            assert isinstance(decode_server(await socket.recv()), Hello)
            yield socket


async def receive(socket: ClientConnection) -> Any:
    async with asyncio.timeout(60):
        return decode_server(await socket.recv())


async def to_the_end(socket: ClientConnection, jobs: int = 1) -> list[Any]:
    """All messages but positions, up to the last job's terminal status."""
    found: list[Any] = []
    while jobs:
        message = await receive(socket)
        if not isinstance(message, Position):
            found.append(message)
        jobs -= isinstance(message, Refused) or (isinstance(message, Status) and message.status.terminal)
    return found


async def done_job(gateway: Gateway, *records: Record) -> str:
    """A job with these events, completed."""
    job = submission()
    await gateway.post(job)
    ref = keys.ref("ada", job.id)
    await gateway.broker.queue.claim("tiny", "w1", [ref])
    await gateway.broker.queue.report([Report(ref, "w1", 1, 0, records, Outcome(None, 0.1))])
    return job.id


async def test_events_come_in_order_with_their_bytes(valkey: Valkey, tmp_path: Path) -> None:
    async with run_gateway(make_settings(valkey, tmp_path, chunk_bytes=100_000)) as gateway:
        gateway.blobs.put(blob_keys.result("ada", "big"), [DATA], 60)
        log = Record("log", msgpack.packb({"node": 2, "text": "hi"}))
        job = await done_job(gateway, record(1, b"small"), record(3, DATA, "big"), log, record(4, b""))
        async with opened(gateway) as socket:
            await socket.send(encode(Subscribe(job)))
            messages = await to_the_end(socket)
    assert [getattr(message, "seq", 0) for message in messages] == [1, 2, 3, 3, 4, 4, 4, 4, 4, 5, 6, 7]
    chunks = [message for message in messages if isinstance(message, Chunk) and message.seq == 4]
    assert [chunk.offset for chunk in chunks] == [0, 100_000, 200_000, 300_000]
    assert b"".join(bytes(chunk.data) for chunk in chunks) == DATA
    assert messages[-1].status is JobStatus.COMPLETED


@pytest.mark.parametrize("offset", [0, 1, 99_999, 307_199, 307_200])
async def test_resuming_within_a_blob(settings: Settings, offset: int) -> None:
    async with run_gateway(settings) as gateway:
        gateway.blobs.put(blob_keys.result("ada", "big"), [DATA], 60)
        job = await done_job(gateway, record(1, b"small"), record(3, DATA, "big"))
        async with opened(gateway) as socket:
            await socket.send(encode(Subscribe(job, after=3, offset=offset)))
            messages = await to_the_end(socket)
    save, *chunks, end = messages
    assert isinstance(save, Save) and save.nbytes == len(DATA) and end.seq == 5
    assert b"".join(bytes(chunk.data) for chunk in chunks) == DATA[offset:]
    assert not chunks or chunks[0].offset == offset


async def test_a_waiting_job_is_followed_live(valkey: Valkey, tmp_path: Path) -> None:
    async with run_gateway(make_settings(valkey, tmp_path, position_s=0.05)) as gateway:
        ahead, job = submission(), submission()
        await gateway.post(ahead)
        await gateway.post(job)
        async with opened(gateway) as socket:
            await socket.send(encode(Subscribe(job.id)))
            assert (await receive(socket)).status is JobStatus.QUEUED
            assert await receive(socket) == Position(job.id, 2)
            await gateway.client.delete(f"/v1/jobs/{ahead.id}")
            assert await receive(socket) == Position(job.id, 1)
            await gateway.broker.queue.claim("tiny", "w1", [keys.ref("ada", job.id)])
            assert (await receive(socket)).status is JobStatus.RUNNING
            await gateway.client.delete(f"/v1/jobs/{job.id}")
            last = await receive(socket)
            assert last.status is JobStatus.CANCELLED and last.error["code"] == "job_cancelled"


async def test_many_jobs_on_one_socket(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        jobs = [await done_job(gateway, record(1, bytes([index]))) for index in range(20)]
        async with opened(gateway) as socket:
            for job in jobs:
                await socket.send(encode(Subscribe(job)))
            messages = await to_the_end(socket, len(jobs))
    chunks = {message.job: bytes(message.data) for message in messages if isinstance(message, Chunk)}
    assert chunks == {job: bytes([index]) for index, job in enumerate(jobs)}


async def test_a_slow_client_holds_no_other_up(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        blob = bytes(64 << 20)
        gateway.blobs.put(blob_keys.result("ada", "huge"), [blob], 60)
        huge = await done_job(gateway, record(1, blob, "huge"))
        quick = await done_job(gateway, record(1, b"x"))
        async with opened(gateway) as slow, opened(gateway) as fast:
            await slow.send(encode(Subscribe(huge)))
            await asyncio.sleep(0.1)
            await fast.send(encode(Subscribe(quick)))
            assert (await to_the_end(fast))[-1].status is JobStatus.COMPLETED
            slow.transport.abort()


async def test_bad_subscriptions_are_answered_and_the_stream_goes_on(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        job = await done_job(gateway, record(1, b"abc"))
        token, _ = await gateway.broker.accounts.create("bob")
        async with opened(gateway, token) as socket:
            await socket.send(encode(Subscribe(job)))
            refused = await receive(socket)
            assert isinstance(refused, Refused) and refused.job == job and refused.error["code"] == "unknown_job"
        async with opened(gateway) as socket:
            for frame in (b"", b"\x00", b"\x07", b"\x00\xc1", b"\x01abc", "text", b"\x00" + b"\x91" * 1000):
                await socket.send(frame)
                assert (await receive(socket)).error["code"] == "invalid_payload"
            await socket.send(encode(Subscribe(job, after=2, offset=4)))
            assert (await receive(socket)).error["code"] == "invalid_payload"
            await socket.send(encode(Unsubscribe(job)))
            await socket.send(encode(Subscribe(job, after=2)))
            assert (await to_the_end(socket))[-1].status is JobStatus.COMPLETED


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Authorization": "Bearer ip_wrong"}, 401), ({"Interpose-Protocol": "9"}, 426), ({"Authorization": ""}, 401)],
)
async def test_refused_before_the_handshake(settings: Settings, headers: dict[str, str], status: int) -> None:
    async with run_gateway(settings) as gateway:
        with pytest.raises(InvalidStatus) as caught:
            async with opened(gateway, **headers):
                pass
        response = caught.value.response
        assert response.status_code == status
        assert b'"code"' in response.body and response.headers["content-type"] == "application/problem+json"


async def test_a_revoked_key_loses_its_streams(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        token, key = await gateway.broker.accounts.create("eve")
        async with opened(gateway, token) as socket:
            await asyncio.sleep(0.05)
            await gateway.broker.accounts.revoke(key.id)
            assert (await receive(socket)).error["code"] == "unauthorized"
            with pytest.raises(ConnectionClosed) as closed:
                await receive(socket)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 4401


async def test_an_acknowledged_result_goes_soon(valkey: Valkey, tmp_path: Path) -> None:
    settings = make_settings(valkey, tmp_path, acked_ttl_s=0.05, sweep_s=0.05)
    async with run_gateway(settings) as gateway:
        job = await done_job(gateway, record(1, b"abc"))
        async with opened(gateway) as socket:
            await socket.send(encode(Subscribe(job)))
            await to_the_end(socket)
            await socket.send(encode(Ack(job)))
            async with asyncio.timeout(60):
                while (await gateway.client.get(f"/v1/jobs/{job}")).status_code != 404:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await socket.send(encode(Subscribe(job)))
            assert (await receive(socket)).error["code"] == "unknown_job"


async def test_the_brokers_restart_is_ridden_out(tmp_path: Path, shared_valkey: Valkey) -> None:
    shared_valkey.clear()
    shared_valkey.sync()
    async with run_gateway(make_settings(shared_valkey, tmp_path)) as gateway:
        job = submission()
        await gateway.post(job)
        ref = keys.ref("ada", job.id)
        async with opened(gateway) as socket:
            await socket.send(encode(Subscribe(job.id)))
            assert (await receive(socket)).status is JobStatus.QUEUED
            # Not in a thread: a child dies with the thread that started it.
            shared_valkey.kill()
            shared_valkey.start()
            await gateway.broker.queue.claim("tiny", "w1", [ref])
            await gateway.broker.queue.report([Report(ref, "w1", 1, 0, [], Outcome(None, 0.1))])
            messages = await to_the_end(socket)
            if isinstance(messages[-1], Refused):
                await socket.send(encode(Subscribe(job.id, after=1)))
                messages = await to_the_end(socket)
            assert messages[-1].status is JobStatus.COMPLETED


async def test_who_waits_for_a_model_is_told_of_it_if_they_take_that(settings: Settings) -> None:
    settings = settings.model_copy(update={"position_s": 0.05})
    async with run_gateway(settings) as gateway:
        await gateway.broker.specs.put(ModelSpec(name="tiny"))
        await gateway.broker.models.announce("tiny", "w1", ModelState.STOPPED)
        gateway.app.state.parts.catalogue._hosted.clear()
        job = submission()
        assert (await gateway.post(job)).status_code == 202, "it is cold, and what it is is known"
        info = await gateway.client.get(f"/v1/jobs/{job.id}")
        assert info.json()["model_state"] == "cold"
        async with opened(gateway) as old, opened(gateway, **{"Interpose-Takes": "loading"}) as new:
            for socket in (old, new):
                await socket.send(encode(Subscribe(job.id)))
            assert [type(await receive(old)) for _ in range(2)] == [Status, Position]
            told = [await receive(new) for _ in range(3)]
            assert told[1:] == [Position(job.id, 1), Loading(job.id, "cold")]
            await gateway.broker.models.announce("tiny", "w1", ModelState.LOADING)
            assert await receive(new) == Loading(job.id, "loading")
            await gateway.broker.models.publish("tiny", "w1", tiny_manifest(), "")
            assert await receive(new) == Loading(job.id, "ready")
            await gateway.broker.models.announce("tiny", "w1", ModelState.STOPPED)
            why = ModelUnavailable("", details={"reason": "unsupported"})
            assert await receive(new) == Loading(job.id, "cold")
            await gateway.broker.models.refuse("tiny", why)
            for socket in (old, new):
                ended = await receive(socket)
                assert isinstance(ended, Status) and ended.error is not None
                assert ended.error["code"] == "model_failed" and ended.error["details"]["reason"] == "unsupported"
