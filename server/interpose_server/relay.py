"""One job's events from the broker's stream to one client's websocket."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from interpose.errors import InternalError, InterposeError, InvalidPayload, UnknownJob, UnknownModel
from interpose.graph.values import TensorSpec
from interpose.wire.messages import (
    CHUNK,
    Event,
    Hello,
    Loading,
    Log,
    Position,
    Refused,
    Save,
    Status,
    Subscribe,
    Tokens,
    encode,
)
from interpose.wire.protocol import TAKES_HEADER
from interpose.wire.status import JobStatus
from interpose.wire.tensors import decode_spec
from redis.exceptions import RedisError
from starlette.websockets import WebSocket, WebSocketDisconnect

from .blobs import Reader, read
from .broker import events, keys
from .broker.events import Stored
from .broker.states import ModelState
from .notifier import Bell
from .parts import Parts
from .results import open_save

log = logging.getLogger(__name__)

_HEAD = struct.Struct(">B16sIQ")

SAVES = 4
"""Saves under way at once on one websocket."""

AWAKE_S = 10.0
"""Without a wake-up, look again after so long: one may have been lost with the broker's connection."""


class Line:
    """The sending side of a websocket. Relays take turns message by message, so none holds up the others."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._turn = asyncio.Lock()
        takes = websocket.headers.get(TAKES_HEADER, "")
        self.takes = frozenset(kind.strip() for kind in takes.split(","))
        """Kinds of messages the client says it takes beside those every client knows."""
        self.saving = asyncio.Semaphore(SAVES)
        """Held while a save is sent: a client that doesn't read mustn't hold a file and a buffer for each job."""

    async def send(self, message: Hello | Event | Position | Loading | Refused) -> None:
        await self.send_frame(encode(message))

    async def send_frame(self, frame: bytes | bytearray) -> None:
        """Returns when the client takes more. The frame's memory may be used again then."""
        async with self._turn:
            await self._websocket.send({"type": "websocket.send", "bytes": frame})


class Relay:
    """Sends everything after the event the client has, then follows the job to its end.

    Args:
        hand_in: what enqueues the job, where that is still to be done; gives its model, and whether it is new.
    """

    def __init__(
        self,
        parts: Parts,
        line: Line,
        user: str,
        wanted: Subscribe,
        hand_in: Callable[[], Awaitable[tuple[str, bool]]] | None = None,
    ) -> None:
        self._parts = parts
        self._line = line
        self._user = user
        self._job = wanted.job
        self._ref = keys.ref(user, wanted.job)
        self._after = wanted.after
        self._offset = wanted.offset
        self._apart = wanted.apart
        self._hand_in = hand_in
        self._place: int | None = None
        self._state = str(ModelState.READY)

    async def run(self) -> None:
        try:
            with self._parts.notifier.listening(self._ref) as bell:
                await self._follow(bell)
        except InterposeError as error:
            await self._refuse(error)
        except RedisError:
            await self._refuse(InternalError("the server lost its queue for a moment; subscribe again"))
        except WebSocketDisconnect:
            pass
        except Exception:
            log.exception("a job's stream failed")
            await self._refuse(InternalError("the server failed on this job's stream; its log says why"))

    async def _refuse(self, error: InterposeError) -> None:
        with suppress(WebSocketDisconnect):
            await self._line.send(Refused.of(error, self._job))

    async def _follow(self, bell: Bell) -> None:
        model, waiting = await self._begin(bell)
        waited = False
        while True:
            batch = bell.take(self._after) or await events.read(self._parts.broker.redis, self._ref, self._after)
            for event in batch:
                status = await self._send(event)
                if status is not None and status.terminal:
                    return
                waiting = status is JobStatus.QUEUED if status else waiting
            if len(batch) == events.MOST:
                continue
            if not batch and waited and not await self._parts.broker.redis.exists(keys.JOB.format(ref=self._ref)):
                raise UnknownJob("the job has expired")
            # Whatever came after the read has set the bell, so there is no need to read until nothing comes.
            await self._wait(bell, model, waiting)
            waited = True

    async def _begin(self, bell: Bell) -> tuple[str, bool]:
        """Hand the job in, if that is to be done. Returns its model, and whether it waits to run."""
        if self._hand_in is not None:
            model, new = await self._hand_in()
            if new:
                # Its first event, known without reading; the next one rings.
                await self._line.send(Status(self._job, 1, 0, JobStatus.QUEUED))
                self._after = 1
                await self._wait(bell, model, True)
                return model, True
        info = await self._parts.broker.queue.info(self._user, self._job)
        return info.model, info.status is JobStatus.QUEUED

    async def _wait(self, bell: Bell, model: str, waiting: bool) -> None:
        if waiting:
            place = await self._parts.positions.place(model, self._ref)
            if place is not None and place != self._place and not bell.rung:
                self._place = place
                await self._line.send(Position(self._job, place))
            await self._tell_state(bell, model)
        try:
            async with asyncio.timeout(self._parts.settings.position_s if waiting else AWAKE_S):
                await bell.wait()
        except TimeoutError:
            return

    async def _tell_state(self, bell: Bell, model: str) -> None:
        """That it waits for its model, where that is so and the client takes it."""
        if Loading.type not in self._line.takes:
            return
        try:
            state = (await self._parts.catalogue.lately(model)).told
        except UnknownModel:
            return
        if state != self._state and not bell.rung:
            self._state = state
            await self._line.send(Loading(self._job, state))

    async def _send(self, event: Stored) -> JobStatus | None:
        """Send one event, with its bytes. Returns the status it tells of, if it is one."""
        offset, self._offset = self._offset, 0
        status = None
        if event.kind == "save":
            await self._send_save(event, offset)
        elif event.kind == "log":
            body = event.body
            await self._line.send(Log(self._job, event.seq, event.attempt, body["node"], body["text"]))
        elif event.kind == "tokens":
            body = event.body
            ids = tuple(body["ids"])
            await self._line.send(Tokens(self._job, event.seq, event.attempt, body["run"], body["step"], ids))
        else:
            status = JobStatus(event.body["status"])
            error = event.body.get("error")
            await self._line.send(Status(self._job, event.seq, event.attempt, status, error))
        self._after = event.seq
        return status

    async def _send_save(self, event: Stored, offset: int) -> None:
        body = event.body
        tensors: tuple[TensorSpec, ...] = tuple(map(decode_spec, body["tensors"]))
        apart = 0 < self._apart <= body["nbytes"]
        save = Save(self._job, event.seq, event.attempt, body["node"], body["tree"], tensors, apart)
        if offset > save.nbytes:
            raise InvalidPayload(f"offset {offset:,} lies beyond a save of {save.nbytes:,} bytes")
        if apart:
            await self._line.send(save)
            return
        async with self._line.saving:
            reader = await self._parts.blobs.ask(partial(open_save, self._parts.blobs, self._user, event))
            try:
                await self._line.send(save)
                await self._send_chunks(event.seq, reader, offset)
            finally:
                reader.close()
        self._parts.metrics.sent.inc(save.nbytes - offset)

    async def _send_chunks(self, seq: int, reader: Reader, offset: int) -> None:
        # One buffer for the whole save: the socket has copied a frame by the time its send returns.
        size = min(self._parts.settings.chunk_bytes, reader.size - offset)
        frame = bytearray(_HEAD.size + size)
        while offset < reader.size:
            size = min(size, reader.size - offset)
            del frame[_HEAD.size + size :]
            _HEAD.pack_into(frame, 0, CHUNK, bytes.fromhex(self._job), seq, offset)
            with memoryview(frame)[_HEAD.size :] as view:
                done = await read(reader, offset, view)
            if done < size:
                raise UnknownJob("the job's result is incomplete")
            await self._line.send_frame(frame)
            offset += size
