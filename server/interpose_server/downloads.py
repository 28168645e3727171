"""One save's bytes as a plain HTTP answer, from any of them on."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from functools import partial

from interpose.errors import InvalidPayload, UnknownJob
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .blobs import Reader, read
from .broker import events, keys
from .parts import Parts
from .results import open_save

PIECE = 256 << 10
"""Bytes handed to the socket at once: they stay in the processor's cache between the read and the send."""


_FROM = re.compile(r"bytes=([0-9]{1,19})-")
"""No byte has a longer number."""


class Download(StreamingResponse):
    """Sends a save as fast as it is taken, holding a piece or two. Closes the reader, however it ends."""

    def __init__(self, parts: Parts, user: str, reader: Reader, start: int) -> None:
        size = reader.size
        # The last: a proxy in between is to pass the bytes on, not to gather them.
        headers = {"Content-Length": str(size - start), "Accept-Ranges": "bytes", "X-Accel-Buffering": "no"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        super().__init__(self._pieces(), 206 if start else 200, headers, "application/octet-stream")
        self._parts = parts
        self._user = user
        self._reader = reader
        self._start = start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises QueueFull before anything is sent."""
        try:
            with self._parts.open_downloads.counted(self._user):
                await super().__call__(scope, receive, send)
        finally:
            self._reader.close()

    async def _pieces(self) -> AsyncIterator[memoryview]:
        at = self._start
        while at < self._reader.size:
            # Each in memory of its own: the transport may still hold the one before.
            piece = memoryview(bytearray(min(PIECE, self._reader.size - at)))
            if await read(self._reader, at, piece) < piece.nbytes:
                raise UnknownJob("the job's result is incomplete")
            at += piece.nbytes
            self._parts.metrics.sent.inc(piece.nbytes)
            yield piece


async def download(parts: Parts, user: str, job: str, seq: int, wanted: str) -> Download:
    """The answer to a request for the save that is event `seq` of a user's job.

    Args:
        wanted: the Range header; only "bytes=N-" is heeded.

    Raises:
        UnknownJob: there is no such save of this user, or it has expired.
        InvalidPayload: it has no byte N.
    """
    event = await events.one(parts.broker.redis, keys.ref(user, job), seq)
    if event is None or event.kind != "save":
        raise UnknownJob(f"no save {seq} of a job {job} of yours is here; its result may have expired")
    asked = _FROM.fullmatch(wanted.strip())
    start = int(asked[1]) if asked else 0
    if start and start >= event.body["nbytes"]:
        raise InvalidPayload(f"byte {start:,} lies beyond a save of {event.body['nbytes']:,} bytes")
    reader = await parts.blobs.ask(partial(open_save, parts.blobs, user, event))
    return Download(parts, user, reader, start)
