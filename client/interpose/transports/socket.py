"""One websocket to a server, carrying the streams of many jobs; reconnects, and resumes each where it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException

from ..config import Endpoint
from ..errors import (
    AccessError,
    ConfigError,
    ConnectionFailed,
    InternalError,
    InterposeError,
    InvalidPayload,
    ModelUnavailable,
    VersionMismatch,
)
from ..wire.messages import (
    Ack,
    ClientMessage,
    Hello,
    Refused,
    ServerMessage,
    Submit,
    Unsubscribe,
    decode_server,
    encode,
)
from ..wire.protocol import MAX_CHUNK_BYTES, PROBLEM, PROTOCOL, SUBMIT_BYTES
from ..wire.stream import Happening, Incoming, JobStream, OutOfStep, Received
from .fetch import APART, Fetcher, direct
from .http import delays, headers, problem, trusted, unreachable

_MAX_FRAME = MAX_CHUNK_BYTES + (1 << 16)
_SETTLED_S = 5.0
_MAX_GAPS = 5
_ANSWER_S = 10.0
_FETCHES = 2
"""At once: the one's request is on its way while the other's bytes come."""


@dataclass
class _Feed:
    """One job's stream, and what it made happen but nobody has taken yet; None ends it.

    Attributes:
        accepted: whether the server took the job in, where it was handed in here.
        gaps: how often it fell out of step since it last moved.
        fetches: by event, the saves being fetched.
    """

    stream: JobStream
    accepted: asyncio.Future[bool] | None = None
    queue: asyncio.Queue[Happening | InterposeError | None] = field(default_factory=asyncio.Queue)
    gaps: int = 0
    fetches: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    def put(self, happened: list[Happening]) -> None:
        """Hand on what happened, and the end once it has come."""
        for item in happened:
            self.queue.put_nowait(item)
        if self.stream.done:
            self.queue.put_nowait(None if self.stream.status.terminal else self.stream.error)


class _Again(Exception):
    """The connection is of no more use; a new one is."""


class Socket:
    """Opened by the first who needs it, or ahead of that by `open`, and kept.

    Args:
        patience: seconds an outage may last, asked anew each time, before those who follow a job are told.
    """

    def __init__(self, endpoint: Endpoint, patience: Callable[[], float]) -> None:
        self.endpoint = endpoint
        self._patience = patience
        self._feeds: dict[str, _Feed] = {}
        self._connection: ClientConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._moved = False
        self._fetcher = Fetcher(endpoint, patience)
        self._fetching = asyncio.Semaphore(_FETCHES)
        self._apart = APART if direct(endpoint) else 0

    def open(self) -> None:
        """Start connecting, unless it is connected or under way."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._keep(), name="interpose-stream")

    async def submit(self, job: str, body: bytes) -> bool:
        """Hand a job in over the open connection, and keep what happens to it for `follow`.

        Returns:
            False if it may not have arrived: there is no connection, or it was lost, or the server is at fault.

        Raises:
            InterposeError: the server refused it.
        """
        connection = self._connection
        if connection is None or len(body) > SUBMIT_BYTES:
            return False
        accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._feeds[job] = _Feed(JobStream(job, apart=self._apart), accepted)
        taken = False
        try:
            await self._send(connection, Submit(job, self._apart, body))
            with suppress(TimeoutError):
                taken = await asyncio.wait_for(accepted, _ANSWER_S)
        finally:
            if not taken:
                self._feeds.pop(job, None)
        return taken

    async def follow(self, job: str) -> AsyncGenerator[Happening, None]:
        """What happens to a job, from its beginning to its end. One follower a job.

        Raises:
            InterposeError: the server doesn't know the job, or can't be reached for too long.
        """
        handed_in = self._feeds.get(job)
        assert handed_in is None or handed_in.accepted is not None, "one follower a job"
        feed = self._feeds[job] = handed_in or _Feed(JobStream(job, apart=self._apart))
        feed.accepted = None
        try:
            self.open()
            if self._connection is not None and handed_in is None:
                await self._send(self._connection, feed.stream.resume())
            while (item := await feed.queue.get()) is not None:
                if isinstance(item, InterposeError):
                    raise item
                yield item
        finally:
            del self._feeds[job]
            for task in feed.fetches.values():
                task.cancel()
            if not feed.stream.done:
                await self.send(Unsubscribe(job))

    async def send(self, message: Unsubscribe | Ack) -> None:
        """Send if connected; what it says is lost with the connection anyway."""
        if self._connection is not None:
            await self._send(self._connection, message)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fetcher.close()

    async def _keep(self) -> None:
        """Connect as long as somebody follows a job; give up on an outage longer than patience."""
        clock = asyncio.get_running_loop().time
        lost_at, waits = clock(), delays()
        while True:
            began, self._moved = clock(), False
            try:
                await self._converse()
                reason: BaseException | None = None
            except InterposeError as error:
                return self._tell_all(error)
            except (OSError, WebSocketException, TimeoutError, _Again) as error:
                reason = error
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                return self._tell_all(InternalError(f"the stream failed: {type(error).__name__}: {error}"))
            if self._moved or clock() - began > _SETTLED_S:
                lost_at, waits = clock(), delays()
            if not self._feeds:
                return None
            if clock() - lost_at > self._patience():
                return self._tell_all(
                    unreachable(self.endpoint, reason or ConnectionError("the connection closed"))
                )
            await asyncio.sleep(next(waits))

    def _tell_all(self, error: InterposeError) -> None:
        for feed in self._feeds.values():
            feed.queue.put_nowait(error)

    async def _converse(self) -> None:
        """One connection, from the handshake to its end.

        Raises:
            InterposeError: there is no point in trying again.
        """
        url = "ws" + self.endpoint.url.removeprefix("http") + "/v1/stream"
        try:
            async with connect(
                url,
                additional_headers=headers(self.endpoint),
                compression=None,
                max_size=_MAX_FRAME,
                ssl=trusted() if url.startswith("wss:") else None,
                proxy=None if self.endpoint.local else True,
                open_timeout=10,
                close_timeout=1,
            ) as connection:
                await self._greet(connection)
                async for frame in connection:
                    self._take(_decoded(frame))
        except InvalidStatus as error:
            raise _refusal(error, self.endpoint) from error
        except InvalidURI as error:
            raise ConfigError(f"{self.endpoint.url} isn't an address a websocket can have") from error
        finally:
            self._connection = None
            self._lose_submissions()

    async def _greet(self, connection: ClientConnection) -> None:
        hello = _decoded(await asyncio.wait_for(connection.recv(), 10))
        if isinstance(hello, Refused):
            raise hello.exception()
        if not isinstance(hello, Hello) or hello.protocol != PROTOCOL:
            spoken = hello.protocol if isinstance(hello, Hello) else "?"
            raise VersionMismatch(f"the server speaks protocol {spoken}, this client {PROTOCOL}")
        # Whoever joins from here on subscribes by themselves; no await lies between.
        waiting = [feed for feed in self._feeds.values() if not feed.stream.heard]
        self._connection = connection
        for feed in waiting:
            await self._send(connection, feed.stream.resume())

    def _lose_submissions(self) -> None:
        """Let nobody wait for the answer to a submission that the connection took with it."""
        for job, feed in list(self._feeds.items()):
            if feed.accepted is not None and not feed.accepted.done():
                feed.accepted.set_result(False)
                del self._feeds[job]

    async def _send(self, connection: ClientConnection, message: ClientMessage) -> None:
        try:
            await connection.send(encode(message))
        except ConnectionClosed:
            pass  # The next connection subscribes to all that is followed.

    def _take(self, message: ServerMessage) -> None:
        if isinstance(message, Hello):
            return
        feed = self._feeds.get(message.job or "")
        if feed is not None and feed.accepted is not None and not feed.accepted.done():
            if isinstance(message, Refused):
                _decline(feed.accepted, message.exception())
                return
            feed.accepted.set_result(True)
        if isinstance(message, Refused):
            _heed(message)
        if feed is None or feed.stream.heard:
            return
        try:
            happened = feed.stream.feed(message)
        except OutOfStep as error:
            feed.gaps += 1
            if feed.gaps <= _MAX_GAPS:
                raise _Again from error
            feed.queue.put_nowait(error)
        except InterposeError as error:
            feed.queue.put_nowait(error)
        else:
            if happened or feed.stream.apart.keys() - feed.fetches.keys():
                feed.gaps, self._moved = 0, True
            feed.put(happened)
            self._fetch_apart(feed)

    def _fetch_apart(self, feed: _Feed) -> None:
        """Begin to fetch what was announced; give up what is no longer wanted."""
        for seq, task in feed.fetches.items():
            if seq not in feed.stream.apart:
                task.cancel()
        for seq, incoming in feed.stream.apart.items():
            if seq not in feed.fetches:
                feed.fetches[seq] = asyncio.create_task(self._fetch(feed, seq, incoming))

    async def _fetch(self, feed: _Feed, seq: int, incoming: Incoming) -> None:
        node, size = incoming.save.node, incoming.save.nbytes

        def tell() -> None:
            if not incoming.void:
                self._moved = True
                feed.queue.put_nowait(Received(node, incoming.received, size))

        try:
            async with self._fetching:
                await self._fetcher.fetch(feed.stream.job, seq, incoming, tell)
            if not incoming.void:
                feed.put(feed.stream.arrived(seq))
        except InterposeError as error:
            feed.queue.put_nowait(error)
        except Exception as error:  # noqa: BLE001 - no thread is left, say; whoever waits must hear of it
            feed.queue.put_nowait(InternalError(f"a save can't be fetched: {type(error).__name__}: {error}"))


def _decline(accepted: asyncio.Future[bool], error: InterposeError) -> None:
    if isinstance(error, InternalError):
        accepted.set_result(False)
    else:
        accepted.set_exception(error)


def _heed(refused: Refused) -> None:
    """Raise what concerns the whole connection, or will pass.

    Raises:
        InterposeError: the connection is refused for good.
        _Again: the server asks to be asked again.
    """
    error = refused.exception()
    if isinstance(error, (InternalError, ModelUnavailable)):
        raise _Again from error
    if refused.job is None and isinstance(error, (AccessError, VersionMismatch)):
        raise error


def _decoded(frame: str | bytes) -> ServerMessage:
    if isinstance(frame, str):
        raise InvalidPayload("the server sent text where bytes belong")
    return decode_server(frame)


def _refusal(error: InvalidStatus, endpoint: Endpoint) -> Exception:
    """What a refused handshake means: the server's own reason, or something that may pass."""
    answer = error.response
    if answer.headers.get("Content-Type", "").startswith(PROBLEM):
        return problem(answer.body, {name.lower(): value for name, value in answer.headers.raw_items()})
    if answer.status_code >= 500 or answer.status_code == 429:
        return ConnectionError(f"the stream was refused with {answer.status_code}")
    return ConnectionFailed(
        f"{endpoint.url} has no stream (status {answer.status_code}); is it an Interpose server?"
    )
