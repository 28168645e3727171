"""Bytes of large saves, over HTTP: from the socket straight into the memory the tensor will be made of.

The websocket's frames cost several copies and a turn of the event loop for each; this costs one copy, the kernel's,
on a thread that holds no lock of Python's meanwhile.
"""

from __future__ import annotations

import asyncio
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..config import Endpoint
from ..errors import ConnectionFailed, InternalError, InterposeError, InvalidPayload, ModelUnavailable, QueueFull
from ..wire.protocol import HEADER, PROBLEM
from ..wire.stream import Incoming
from .http import check_protocol, delays, headers, problem, trusted, unreachable

APART = 2 << 20
"""Saves of so many bytes and more are fetched: below, a request of their own costs more than it spares."""

_TOLD = 8 << 20
"""Bytes between two words on how far it is."""

_TIMEOUT_S = 60.0
_MAX_PROBLEM = 1 << 16


class Fetcher:
    """Connections to one server, as many as fetch at once, kept for the next.

    Args:
        patience: seconds an outage may last, asked anew each time, before whoever waits is told.
    """

    def __init__(self, endpoint: Endpoint, patience: Callable[[], float]) -> None:
        self._endpoint = endpoint
        self._patience = patience
        self._idle: list[HTTPConnection] = []

    async def fetch(self, job: str, seq: int, incoming: Incoming, tell: Callable[[], None]) -> None:
        """Bring the bytes of a save, from where it is to its end or until it is void; resumes after a loss.

        Args:
            tell: called now and then, when there are more bytes.

        Raises:
            InterposeError: the server refuses, sends something else, or can't be reached for too long.
        """
        clock = asyncio.get_running_loop().time
        lost_at, waits = clock(), delays()
        path = f"/v1/jobs/{job}/saves/{seq}"
        while incoming.received < incoming.save.nbytes and not incoming.void:
            before = incoming.received
            try:
                await self._in_thread(path, incoming, tell)
                continue
            except (OSError, HTTPException) as error:
                reason: InterposeError = unreachable(self._endpoint, error)
            except (ConnectionFailed, InternalError, ModelUnavailable, QueueFull) as error:
                reason = error
            if incoming.received > before:
                lost_at, waits = clock(), delays()
            if clock() - lost_at > self._patience():
                raise reason
            await asyncio.sleep(next(waits))

    async def _in_thread(self, path: str, incoming: Incoming, tell: Callable[[], None]) -> None:
        """One request. Cancelling it cuts its connection."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        connection = self._connection()

        def finish(error: Exception | None) -> None:
            if done.cancelled():
                connection.close()
            elif error is None:
                self._idle.append(connection)
                done.set_result(None)
            else:
                done.set_exception(error)

        def work() -> None:
            failed: Exception | None = None
            try:
                self._request(connection, path, incoming, lambda: loop.call_soon_threadsafe(tell))
            except Exception as error:  # noqa: BLE001 - raised where it is awaited
                failed = error
                connection.close()
            with suppress(RuntimeError):  # The loop may have ended meanwhile.
                loop.call_soon_threadsafe(finish, failed)

        # A daemon: the interpreter doesn't wait for a server that says nothing.
        threading.Thread(target=work, name="interpose-fetch", daemon=True).start()
        try:
            await done
        except asyncio.CancelledError:
            incoming.void = True
            _cut(connection)
            raise

    def _connection(self) -> HTTPConnection:
        """A kept one that still stands, or another."""
        while self._idle:
            kept = self._idle.pop()
            if kept.sock is not None and not select.select([kept.sock], [], [], 0)[0]:
                return kept
            kept.close()
        parts = urlsplit(self._endpoint.url)
        host = parts.hostname or ""
        if parts.scheme == "http":
            return HTTPConnection(host, parts.port, timeout=_TIMEOUT_S)
        return HTTPSConnection(host, parts.port, timeout=_TIMEOUT_S, context=trusted())

    def _request(
        self, connection: HTTPConnection, path: str, incoming: Incoming, tell: Callable[[], object]
    ) -> None:
        own = {**headers(self._endpoint), "Accept-Encoding": "identity"}
        if incoming.received:
            own["Range"] = f"bytes={incoming.received}-"
        connection.request("GET", urlsplit(self._endpoint.url).path + path, headers=own)
        with connection.getresponse() as answer:
            self._check(answer, incoming)
            left = incoming.save.nbytes - incoming.received
            while left and not incoming.void:
                got = answer.readinto(incoming.room()[:_TOLD])
                if not got:
                    raise ConnectionError("the connection closed within a save")
                incoming.fill(got)
                left -= got
                tell()
        if left:
            connection.close()  # What is still on its way isn't the next answer.

    def _check(self, answer: HTTPResponse, incoming: Incoming) -> None:
        """Whether these are the bytes asked for. Raises InterposeError, or ConnectionError if they may come yet."""
        told = {name.lower(): value for name, value in answer.getheaders()}
        if told.get("content-type", "").startswith(PROBLEM):
            raise problem(answer.read(_MAX_PROBLEM), told)
        check_protocol(self._endpoint, answer.headers.get(HEADER), answer.status)
        if answer.status >= 400:
            raise ConnectionError(f"the server answered {answer.status} without saying why")
        start, size = incoming.received, incoming.save.nbytes
        expected = f"bytes {start}-{size - 1}/{size}" if start else None
        if answer.status != (206 if start else 200) or told.get("content-range") != expected:
            raise InvalidPayload(f"the server sent another part of a save than from byte {start:,} on")
        if told.get("content-encoding", "identity") != "identity" or answer.length != size - start:
            raise InvalidPayload(f"the server sent a save of {size:,} bytes in another size or form")

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


def direct(endpoint: Endpoint) -> bool:
    """Whether the server is reached without a proxy of the environment's: those are left to the other libraries."""
    parts = urlsplit(endpoint.url)
    proxies = getproxies()
    if endpoint.local or not (proxies.get(parts.scheme) or proxies.get("all")):
        return True
    return bool(proxy_bypass(parts.hostname or ""))


def _cut(connection: HTTPConnection) -> None:
    """Make whoever reads from it stop."""
    sock = connection.sock
    if sock is not None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
