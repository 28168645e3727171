"""Payloads, attachments and results as files, each deleted at its time, all together under a cap.

Nobody's words become a file's name: a name is the SHA-256 of user, kind and name, so users can't reach or notice
each other's. `Blobs` is the whole of what the rest of the server asks for; an object store can stand behind it.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from interpose.errors import StorageFull
from interpose.wire.tensors import Buffer

BLOCK = 4096
"""What a file takes on disk is a multiple of this, so empty files count too."""

_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
"""Linux's: read what the page cache has, and don't wait for a disk."""


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
    """An open blob. It can be read to its end even if it is deleted meanwhile."""

    size: int

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset`; returns how many bytes there were."""

    def at_hand(self, offset: int, buffer: memoryview) -> int:
        """As `readinto`, but only what can be had without waiting, which may be nothing."""

    def close(self) -> None: ...


async def read(reader: Reader, offset: int, buffer: memoryview) -> int:
    """As `Reader.readinto`, on the event loop where that doesn't make it wait, else in a thread."""
    done = reader.at_hand(offset, buffer)
    if done < buffer.nbytes:
        done += await asyncio.to_thread(reader.readinto, offset + done, buffer[done:])
    return done


class Writer(Protocol):
    """A blob being written; it exists once committed. Leaving the context without that drops it."""

    def write(self, data: Buffer) -> None: ...

    def commit(self) -> None: ...

    def __enter__(self) -> Writer: ...

    def __exit__(self, *exc: object) -> None: ...


class Blobs(Protocol):
    """Blocking calls: an event loop makes the large ones in a thread."""

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
        """Bytes taken."""


class LocalReader:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def readinto(self, offset: int, buffer: memoryview) -> int:
        return os.preadv(self._descriptor, [buffer], offset)

    def at_hand(self, offset: int, buffer: memoryview) -> int:
        try:
            return os.preadv(self._descriptor, [buffer], offset, _NOWAIT) if _NOWAIT else 0
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return 0
            raise

    def close(self) -> None:
        os.close(self._descriptor)


class LocalBlobs:
    """A folder. A file's modification time is when it may be deleted: it needs no index beside it.

    Several processes share the folder; a locked counter file holds the bytes taken by all of them.
    """

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        self._folder = folder
        self._cap = cap_bytes
        self._counter = folder / "used"
        (folder / "new").mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, key: BlobKey, parts: Iterable[Buffer], ttl_s: float) -> int:
        views = [memoryview(part) for part in parts]
        size = sum(view.nbytes for view in views)
        with self.writer(key, size, ttl_s) as writer:
            for view in views:
                writer.write(view)
            writer.commit()
        return size

    def writer(self, key: BlobKey, size: int, ttl_s: float) -> LocalWriter:
        self._take(_blocks(size))
        try:
            return LocalWriter(self, self._path(key), self._folder / "new", size, ttl_s)
        except OSError:
            self._take(-_blocks(size))
            raise

    def open(self, key: BlobKey) -> LocalReader | None:
        try:
            return LocalReader(os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None

    def keep(self, key: BlobKey, ttl_s: float) -> int | None:
        path = self._path(key)
        try:
            known = path.stat()
            ends = max(known.st_mtime, time.time() + ttl_s)
            os.utime(path, (ends, ends))
        except FileNotFoundError:
            return None
        return known.st_size

    def delete(self, key: BlobKey) -> None:
        self._remove(self._path(key))

    def sweep(self) -> int:
        now = time.time()
        freed = 0
        for entry in self._files():
            with suppress(FileNotFoundError):
                if entry.stat().st_mtime < now:
                    freed += self._remove(Path(entry.path))
        return freed

    def used(self) -> int:
        with suppress(FileNotFoundError, ValueError):
            return int(self._counter.read_text())
        return 0

    def recount(self) -> int:
        """Count what is there and drop what a process that died left half written; for the start of a server."""
        for path in (self._folder / "new").iterdir():
            path.unlink(missing_ok=True)
        with self._locked() as file:
            total = 0
            for entry in self._files():
                with suppress(FileNotFoundError):
                    total += _blocks(entry.stat().st_size)
            _rewrite(file, total)
        return total

    def _remove(self, path: Path) -> int:
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        self._take(-_blocks(size))
        return size

    def _take(self, size: int) -> None:
        with self._locked() as file:
            used = int(file.read() or 0) + size
            if size > 0 and used > self._cap:
                raise StorageFull(
                    "the server's storage is full; try again once results have expired, or save less",
                    details={"retry_after_s": 30},
                )
            _rewrite(file, max(used, 0))

    @contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        with os.fdopen(os.open(self._counter, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _path(self, key: BlobKey) -> Path:
        name = key.hashed
        return self._folder / name[:2] / name

    def _files(self) -> Iterator[os.DirEntry[str]]:
        for folder in os.scandir(self._folder):
            if folder.is_dir() and folder.name != "new":
                yield from os.scandir(folder.path)


class LocalWriter:
    """Writes beside, then renames: a blob is there as a whole or not at all."""

    def __init__(self, blobs: LocalBlobs, path: Path, folder: Path, size: int, ttl_s: float) -> None:
        self._blobs = blobs
        self._path = path
        self._left = self._size = size
        self._ttl_s = ttl_s
        self._new = folder / secrets.token_hex(8)
        self._file: IO[bytes] | None = self._new.open("xb", buffering=0)

    def write(self, data: Buffer) -> None:
        """Raises StorageFull beyond the size this writer was opened for."""
        assert self._file is not None
        view = memoryview(data)
        self._left -= view.nbytes
        if self._left < 0:
            raise StorageFull("more bytes came than were announced")
        view = view.cast("B") if view.nbytes else memoryview(b"")
        while view:
            view = view[self._file.write(view) :]

    def commit(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        ends = time.time() + self._ttl_s
        os.utime(self._new, (ends, ends))
        self._blobs._remove(self._path)
        self._path.parent.mkdir(exist_ok=True, mode=0o700)
        self._new.replace(self._path)
        if self._left:
            self._blobs._take(_blocks(self._size - self._left) - _blocks(self._size))

    def __enter__(self) -> LocalWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()
            self._new.unlink(missing_ok=True)
            self._blobs._take(-_blocks(self._size))


def _blocks(size: int) -> int:
    return max(-(-size // BLOCK), 1) * BLOCK


def _rewrite(file: IO[str], value: int) -> None:
    file.seek(0)
    file.truncate()
    file.write(str(value))
    file.flush()
