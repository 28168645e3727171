"""Reading an object of a bucket: one request as long as what is asked for follows on, another where that broke."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import obstore
from interpose.errors import StorageUnavailable
from obstore.store import S3Store

from .s3_errors import mapped

if TYPE_CHECKING:
    from obstore import BytesStream

PIECE = 512 << 10
"""Bytes taken from a connection at once."""
TRIES = 3
"""Requests in a row that bring nothing, before the reader is told."""


class S3Reader:
    """An object that was written as a whole. Nothing is asked for before the first byte is; where the object was
    deleted meanwhile, there are no more bytes.

    Args:
        threads: what an event loop reads in.
    """

    def __init__(self, store: S3Store, name: str, size: int, threads: Executor) -> None:
        self.size = size
        self._store = store
        self._name = name
        self._threads = threads
        self._at = 0
        self._held = memoryview(b"")
        """What came last; it begins at byte `_at`, and the stream goes on behind it."""
        self._stream: BytesStream | None = None

    def at_hand(self, offset: int, buffer: memoryview) -> int:
        skip = offset - self._at
        if not 0 <= skip < self._held.nbytes:
            return 0
        part = self._held[skip : skip + buffer.nbytes]
        buffer[: part.nbytes] = part
        return part.nbytes

    def readinto(self, offset: int, buffer: memoryview) -> int:
        done, tries = self.at_hand(offset, buffer), 0
        try:
            while done < buffer.nbytes and offset + done < self.size:
                if self._next(offset + done, last=tries == TRIES - 1):
                    done, tries = done + self.at_hand(offset + done, buffer[done:]), 0
                else:
                    tries += 1
        except FileNotFoundError:
            pass
        return done

    async def fetch(self, offset: int, buffer: memoryview) -> int:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.readinto, offset, buffer)

    def close(self) -> None:
        self._stream = None
        self._held = memoryview(b"")

    def _next(self, offset: int, *, last: bool) -> bool:
        """Hold what begins at `offset`. False if nothing came; raises StorageUnavailable if it was the last try."""
        try:
            with mapped(missing=True):
                if self._stream is None or offset != self._at + self._held.nbytes:
                    self._stream = None
                    found = obstore.get(self._store, self._name, options={"range": {"offset": offset}})
                    self._stream = found.stream(PIECE)
                self._at, self._held = offset, memoryview(next(self._stream, b""))
        except StorageUnavailable:
            self._stream, self._held = None, memoryview(b"")
            if last:
                raise
            return False
        if not self._held.nbytes:
            self._stream = None
            if last:
                raise StorageUnavailable("a stored result breaks off", details={"retry_after_s": 2})
        return self._held.nbytes > 0
