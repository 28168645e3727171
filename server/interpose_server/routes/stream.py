"""One websocket a client, many jobs on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from fastapi import APIRouter, WebSocket
from interpose.errors import InterposeError, InvalidPayload, QueueFull, Unauthorized
from interpose.wire.messages import (
    Ack,
    ClientMessage,
    Hello,
    Refused,
    Submit,
    Subscribe,
    Unsubscribe,
    decode_client,
)
from interpose.wire.protocol import MSGPACK, SUBMIT_BYTES
from interpose.wire.status import JobStatus
from starlette.websockets import WebSocketDisconnect

from ..auth import identify
from ..broker.accounts import Key
from ..parts import Parts
from ..problems import problem
from ..relay import Line, Relay
from ..results import drop
from ..submit import submit
from ..tasks import end

router = APIRouter(prefix="/v1/stream")

REVOKED = 4401
"""Close code: the key is no longer valid."""


@router.websocket("")
async def stream(websocket: WebSocket) -> None:
    parts = Parts.of(websocket)
    with ExitStack() as held:
        try:
            key = await identify(websocket)
            held.enter_context(parts.open_streams.counted(key.user))
        except InterposeError as error:
            await websocket.send_denial_response(problem(error))
            return
        await websocket.accept()
        await Stream(parts, key, websocket).run()


class Stream:
    """A connection: a task that reads what the client asks for, and one relay for each job it subscribed to."""

    def __init__(self, parts: Parts, key: Key, websocket: WebSocket) -> None:
        self._parts = parts
        self._key = key
        self._websocket = websocket
        self._line = Line(websocket)
        self._relays: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        revoked = asyncio.Event()
        tasks: list[asyncio.Task[Any]] = []
        with self._parts.notifier.on_revoked(self._key.id, revoked.set):
            try:
                await self._line.send(Hello(chunk_bytes=self._parts.settings.chunk_bytes))
                # The key may have been revoked between its check and this point.
                await identify(self._websocket)
                tasks = [asyncio.create_task(self._read()), asyncio.create_task(revoked.wait())]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if revoked.is_set():
                    raise Unauthorized("the API key was revoked")
            except InterposeError as error:
                with suppress(WebSocketDisconnect):
                    await self._line.send(Refused.of(error))
                    await self._websocket.close(REVOKED, "the key is no longer valid")
            except WebSocketDisconnect:
                pass
            finally:
                await end([*tasks, *self._relays.values()])

    async def _read(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code") or 1005)
            try:
                await self._take(decode_client(message.get("bytes") or b""))
            except InterposeError as error:
                await self._line.send(Refused.of(error))

    async def _take(self, message: ClientMessage) -> None:
        old = self._relays.pop(message.job, None)
        match message:
            case Subscribe():
                await self._follow(message, old)
            case Submit():
                try:
                    self._parts.rate.take(self._key.user)
                    wanted = Subscribe(message.job, apart=message.apart)
                    await self._follow(wanted, old, partial(self._submit, message.job, bytes(message.body)))
                except InterposeError as error:
                    await self._line.send(Refused.of(error, message.job))
            case Unsubscribe():
                if old is not None:
                    await end([old])
            case Ack():
                names = await self._parts.broker.queue.ack(self._key.user, message.job)
                if names:
                    # Nobody waits for it, and what the client asks next must not.
                    asyncio.get_running_loop().run_in_executor(None, drop, self._parts.blobs, self._key.user, names)
            case _:
                raise InvalidPayload("an unknown message")

    async def _follow(
        self,
        wanted: Subscribe,
        old: asyncio.Task[None] | None,
        hand_in: Callable[[], Awaitable[tuple[str, bool]]] | None = None,
    ) -> None:
        """Relay a job, in place of the relay it had."""
        if old is not None:
            await end([old])
        self._relays = {job: task for job, task in self._relays.items() if not task.done()}
        if len(self._relays) >= self._parts.settings.subscriptions:
            raise QueueFull(f"more than {self._parts.settings.subscriptions} jobs on one stream")
        relay = Relay(self._parts, self._line, self._key.user, wanted, hand_in)
        self._relays[wanted.job] = asyncio.create_task(relay.run())

    async def _submit(self, named: str, body: bytes) -> tuple[str, bool]:
        """Accept a job. Returns its model, and whether it is new. Raises what is wrong with it."""
        if len(body) > SUBMIT_BYTES:
            raise InvalidPayload(f"a submission of more than {SUBMIT_BYTES:,} bytes goes to POST /v1/jobs")
        job, status, place = await submit(self._parts, self._key, body, MSGPACK, named)
        return job.model, status is JobStatus.QUEUED and place is not None
