"""Payloads, attachments and results as blobs: what the rest of the server asks of a store, wherever it keeps them.

Nobody's words become a file's name: a name is the SHA-256 of user, kind and name, so users can't reach or notice
each other's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from interpose.wire.tensors import Buffer

BLOCK = 4096
"""What a blob is charged is a multiple of this, so empty ones count too."""

FULL = "the server's storage is full; try again once results have expired, or save less"
TOO_LONG = "more bytes came than were announced"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BlobKey:
    """Attributes:
    user: whose it is; "" for the server's own.
    kind: "payload", "tensor", "result" or "tokenizer".
    name: unique within user and kind.
    """

    user: str
    kind: str
    name: str

    @property
    def hashed(self) -> str:
        return hashlib.sha256("\0".join((self.user, self.kind, self.name)).encode()).hexdigest()


class Reader(Protocol):
    """An open blob, for one reader at a time. It can be read to its end even if it is deleted meanwhile.

    Each way to read raises OSError or StorageUnavailable if the store fails.
    """

    size: int

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset`; returns how many bytes there were. Blocking."""

    def at_hand(self, offset: int, buffer: memoryview) -> int:
        """As `readinto`, but only what can be had without waiting, which may be nothing."""

    async def fetch(self, offset: int, buffer: memoryview) -> int:
        """As `readinto`, for an event loop."""

    def close(self) -> None: ...


async def read(reader: Reader, offset: int, buffer: memoryview) -> int:
    """As `Reader.readinto`, on the event loop where that doesn't make it wait."""
    done = reader.at_hand(offset, buffer)
    if done < buffer.nbytes:
        done += await reader.fetch(offset + done, buffer[done:])
    return done


class Writer(Protocol):
    """A blob being written; it exists once committed. Blocking calls, which raise as `Blobs` does."""

    def write(self, data: Buffer) -> None:
        """Raises StorageFull beyond the size this writer was opened for."""

    def commit(self) -> None: ...

    def close(self) -> None:
        """Drop it, unless it was committed."""

    def __enter__(self) -> Writer: ...

    def __exit__(self, *exc: object) -> None: ...


class Blobs(Protocol):
    """Blocking calls: an event loop makes small ones through `ask`, large ones through `run`.

    Any of them raises OSError or StorageUnavailable if the store fails.
    """

    lanes: int
    """How many blobs are best stored at once."""

    async def ask(self, work: Callable[[], T]) -> T:
        """Do something small with the store: here, or in a thread where it may have to wait."""

    async def run(self, work: Callable[[], T]) -> T:
        """Do something with the store in a thread."""

    def put(self, key: BlobKey, parts: Iterable[Buffer], ttl_s: float) -> int:
        """Store the parts end to end, replacing what was there. Returns the size. Raises StorageFull."""

    def writer(self, key: BlobKey, size: int, ttl_s: float) -> Writer:
        """Store piece by piece, at most `size` bytes. Raises StorageFull."""

    def open(self, key: BlobKey) -> Reader | None:
        """None if there is no such blob."""

    def keep(self, key: BlobKey, ttl_s: float) -> int | None:
        """The blob's size, after making it live for at least so long from now; None if there is none."""

    def delete(self, key: BlobKey) -> None: ...

    def sweep(self) -> int:
        """Delete what is past its time. Returns the bytes freed."""

    def used(self) -> int:
        """Bytes taken, by all processes that share the store."""

    def reach(self) -> None:
        """Return if blobs can be had and stored. Raises StorageUnavailable."""

    def recount(self) -> None:
        """For the start of a server: put right what processes that died left behind."""


def put(blobs: Blobs, key: BlobKey, parts: Iterable[Buffer], ttl_s: float) -> int:
    """`Blobs.put`, by the store's own writer."""
    views = [memoryview(part) for part in parts]
    size = sum(view.nbytes for view in views)
    with blobs.writer(key, size, ttl_s) as writer:
        for view in views:
            writer.write(view)
        writer.commit()
    return size


def whole(blobs: Blobs, key: BlobKey) -> bytearray | None:
    """A blob's bytes; None if it isn't there. Blocking."""
    reader = blobs.open(key)
    if reader is None:
        return None
    try:
        data = bytearray(reader.size)
        return data if reader.readinto(0, memoryview(data)) == reader.size else None
    finally:
        reader.close()


def charged(size: int) -> int:
    """Bytes that a blob of so many counts for."""
    return max(-(-size // BLOCK), 1) * BLOCK
