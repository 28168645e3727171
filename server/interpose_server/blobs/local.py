"""Blobs as files in one folder, each deleted at its time, all together under a cap."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from interpose.errors import StorageFull, StorageUnavailable
from interpose.wire.tensors import Buffer

from .protocol import FULL, TOO_LONG, BlobKey, charged, put

T = TypeVar("T")

_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
"""Linux's: read what the page cache has, and don't wait for a disk."""

ABANDONED_S = 3600.0
"""A file nobody has written to for so long won't be finished."""


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

    async def fetch(self, offset: int, buffer: memoryview) -> int:
        return await asyncio.to_thread(self.readinto, offset, buffer)

    def close(self) -> None:
        os.close(self._descriptor)


class LocalBlobs:
    """A folder. A file's modification time is when it may be deleted: it needs no index beside it.

    Several processes share the folder; a locked counter file holds the bytes taken by all of them.
    """

    lanes = 1

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        self._folder = folder
        self._cap = cap_bytes
        self._counter = folder / "used"
        self._new = folder / "new"
        self._new.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def ask(self, work: Callable[[], T]) -> T:
        return work()

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.to_thread(work)

    def put(self, key: BlobKey, parts: Iterable[Buffer], ttl_s: float) -> int:
        return put(self, key, parts, ttl_s)

    def writer(self, key: BlobKey, size: int, ttl_s: float) -> LocalWriter:
        self._take(charged(size))
        try:
            return LocalWriter(self, self._path(key), self._new, size, ttl_s)
        except OSError:
            self._take(-charged(size))
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

    def reach(self) -> None:
        if not os.access(self._new, os.W_OK | os.X_OK):
            raise StorageUnavailable("the server's folder for results can't be written to")

    def recount(self) -> None:
        """Count what is there, and drop what was left half written; not what other processes are writing."""
        total, abandoned = 0, time.time() - ABANDONED_S
        with self._locked() as file:
            for entry in [*os.scandir(self._new), *self._files()]:
                with suppress(FileNotFoundError):
                    known = entry.stat()
                    if Path(entry.path).parent == self._new and known.st_mtime < abandoned:
                        Path(entry.path).unlink()
                    else:
                        total += charged(known.st_size)
            _rewrite(file, total)

    def _remove(self, path: Path) -> int:
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        self._take(-charged(size))
        return size

    def _take(self, size: int) -> None:
        with self._locked() as file:
            used = int(file.read() or 0) + size
            if size > 0 and used > self._cap:
                raise StorageFull(FULL, details={"retry_after_s": 30})
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
        assert self._file is not None
        view = memoryview(data)
        self._left -= view.nbytes
        if self._left < 0:
            raise StorageFull(TOO_LONG)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        while view:
            view = view[self._file.write(view) :]

    def commit(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        ends = time.time() + self._ttl_s
        os.utime(self._new, (ends, ends))
        self._path.parent.mkdir(exist_ok=True, mode=0o700)
        try:
            replaced = charged(self._path.stat().st_size)
        except FileNotFoundError:
            replaced = 0
        self._new.replace(self._path)
        if less := charged(self._size) - charged(self._size - self._left) + replaced:
            self._blobs._take(-less)

    def __enter__(self) -> LocalWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._new.unlink(missing_ok=True)
            self._blobs._take(-charged(self._size))


def _rewrite(file: IO[str], value: int) -> None:
    file.seek(0)
    file.truncate()
    file.write(str(value))
    file.flush()
