"""The client's side of the reference server, on the same libraries and the same kind of background loop as ours."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from interpose.transports.loop import Background
from reference import asked
from websockets.asyncio.client import ClientConnection, connect

BODY = bytes(600)
"""About what a tiny trace's submission takes."""


class Trips:
    """Each method waits for one exchange with the reference server."""

    def __init__(self, own: Background, client: httpx.AsyncClient, stream: ClientConnection, tcp: int) -> None:
        self._own, self._client, self._stream = own, client, stream
        self._tcp = socket.create_connection(("127.0.0.1", tcp))

    def empty(self) -> None:
        """A POST and one message on the websocket."""
        self._own.run(self._empty())

    def websocket(self, size: int) -> None:
        """So many bytes over the websocket, into one buffer."""
        self._own.run(self._large(size))

    def tcp(self, size: int) -> None:
        """So many bytes over a plain socket, into one buffer."""
        self._tcp.sendall(asked(size))
        view, got = memoryview(bytearray(size)), 0
        while got < size:
            got += self._tcp.recv_into(view[got:])

    async def _empty(self) -> None:
        await asyncio.gather(self._client.post("/job", content=BODY), self._stream.recv())

    async def _large(self, size: int) -> None:
        await self._stream.send(asked(size))
        view, got = memoryview(bytearray(size)), 0
        while got < size:
            part = await self._stream.recv(decode=False)
            view[got : got + len(part)] = part
            got += len(part)

    async def close(self) -> None:
        self._tcp.close()
        await self._stream.close()
        await self._client.aclose()


@contextmanager
def trips(http: int, tcp: int) -> Iterator[Trips]:
    """Args: http, tcp: ports of the reference server."""
    own = Background()
    made = own.run(_make(own, http, tcp))
    try:
        yield made
    finally:
        own.run(made.close())
        own.close()


async def _make(own: Background, http: int, tcp: int) -> Trips:
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{http}", trust_env=False, verify=False)
    url = f"ws://127.0.0.1:{http}/stream"
    stream = await connect(url, compression=None, max_size=None, proxy=None)
    return Trips(own, client, stream, tcp)
