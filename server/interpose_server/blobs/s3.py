"""Blobs as objects in a bucket of an S3-compatible service, for gateways and workers on several machines.

The bytes go to the bucket, through obstore; which blobs there are is in the broker's index. Nothing is ever written
over, so what a reader has begun it can finish, and no answer of the bucket's can be out of date.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar
from urllib.parse import urlsplit

import obstore
from interpose.errors import ConfigError, StorageFull, StorageUnavailable
from interpose.wire.tensors import Buffer
from obstore.exceptions import BaseError
from obstore.store import S3Store

from ..broker.store import WRITE_MS, Entry, Store
from .protocol import FULL, TOO_LONG, BlobKey, charged, put
from .s3_errors import mapped, reason
from .s3_reader import S3Reader

log = logging.getLogger(__name__)

PART = 8 << 20
"""Bytes of one request: what is larger goes in several, some at a time. A writer holds no more than those."""
AT_ONCE = 4
ORPHANED_S = 2 * WRITE_MS / 1000
"""An object nothing knows of is deleted once it is so old."""
PAGE = 1000
THREADS = 32
"""Of one process, for calls that wait for the bucket: those of others don't wait behind them."""

T = TypeVar("T")


class S3Blobs:
    """Args:
    url: s3://BUCKET/PREFIX; where that is and who asks is in the environment's AWS_* variables.
    index: what blobs there are.
    """

    lanes = 8

    def __init__(self, url: str, index: Store, cap_bytes: int) -> None:
        self._store = open_bucket(url)
        self._index = index
        self._cap = cap_bytes
        self._folder = ""
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="bucket")
        self._given_up: deque[str] = deque()
        """Objects that won't be finished, of which the index couldn't be told."""

    async def ask(self, work: Callable[[], T]) -> T:
        return await self.run(work)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def put(self, key: BlobKey, parts: Iterable[Buffer], ttl_s: float) -> int:
        return put(self, key, parts, ttl_s)

    def writer(self, key: BlobKey, size: int, ttl_s: float) -> S3Writer:
        self._drop_given_up()
        name = f"{self._mine()}/{key.kind}/{key.hashed}-{secrets.token_hex(4)}"
        try:
            room = self._index.write(name, charged(size), self._cap)
        except StorageUnavailable:
            # It may have been written there, the answer lost.
            self._given_up.append(name)
            raise
        if not room:
            raise StorageFull(FULL, details={"retry_after_s": 30})
        return S3Writer(self._store, self._index, key.hashed, name, size, ttl_s, self._given_up)

    def open(self, key: BlobKey) -> S3Reader | None:
        entry = self._index.find(key.hashed)
        return S3Reader(self._store, entry.object, entry.size, self._threads) if entry else None

    def keep(self, key: BlobKey, ttl_s: float) -> int | None:
        entry = self._index.keep(key.hashed, ttl_s)
        if entry is None:
            return None
        try:
            with mapped(missing=True):
                obstore.head(self._store, entry.object)
        except FileNotFoundError:
            # Deleted behind our back. Whoever has the bytes stores them again.
            self._index.delete(key.hashed, entry.object)
            return None
        return entry.size

    def delete(self, key: BlobKey) -> None:
        self._index.delete(key.hashed)

    def sweep(self) -> int:
        self._drop_given_up()
        freed = 0
        while True:
            swept = self._index.sweep()
            freed += swept.freed
            if swept.objects:
                with mapped():
                    obstore.delete(self._store, swept.objects)
                self._index.deleted(swept.objects)
            if not swept.blobs and not swept.objects:
                break
        if self._index.untidy():
            self._tidy()
        return freed

    def used(self) -> int:
        return self._index.used()

    def reach(self) -> None:
        self._index.used()
        with mapped():
            obstore.list_with_delimiter(self._store, "nothing")

    def recount(self) -> None:
        """Nothing: the index knows what is being written, and forgets it if it takes too long."""

    def _mine(self) -> str:
        """The folder of this broker's objects: others may use the same bucket, and delete what they don't know."""
        self._folder = self._folder or self._index.id()
        return self._folder

    def _drop_given_up(self) -> None:
        with suppress(IndexError):
            while True:
                name = self._given_up.popleft()
                try:
                    self._index.drop(name)
                except StorageUnavailable:
                    self._given_up.append(name)
                    raise

    def _tidy(self) -> None:
        """Delete what the index doesn't know of: it may have lost what it was told of last."""
        old = time.time() - ORPHANED_S
        with mapped():
            for page in obstore.list(self._store, self._mine(), chunk_size=PAGE):
                found = [meta["path"] for meta in page if meta["last_modified"].timestamp() < old]
                pairs = [(path.rpartition("/")[2].partition("-")[0], path) for path in found]
                if lost := self._index.unknown(pairs):
                    log.warning("%d objects in the bucket belonged to nothing", len(lost))
                    obstore.delete(self._store, lost)


class S3Writer:
    """Small blobs go as one request at the end, others part by part as they come."""

    def __init__(
        self,
        store: S3Store,
        index: Store,
        blob: str,
        name: str,
        size: int,
        ttl_s: float,
        given_up: deque[str],
    ) -> None:
        self._index = index
        self._given_up = given_up
        self._blob = blob
        self._name = name
        self._left = self._size = size
        self._ttl_s = ttl_s
        self._open = True
        self._file = obstore.open_writer(store, name, buffer_size=PART, max_concurrency=AT_ONCE)

    def write(self, data: Buffer) -> None:
        view = memoryview(data)
        self._left -= view.nbytes
        if self._left < 0:
            raise StorageFull(TOO_LONG)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        with mapped():
            for start in range(0, view.nbytes, PART):
                self._file.write(view[start : start + PART])

    def commit(self) -> None:
        with mapped():
            self._file.close()
        self._open = False
        size = self._size - self._left
        try:
            self._index.commit(self._blob, Entry(size, self._name), charged(size), self._ttl_s)
        except BaseException:
            # Where the index has taken it all the same, this changes nothing.
            self._drop()
            raise

    def __enter__(self) -> S3Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        try:
            # An open file left this way is given up: no part of it stays in the bucket.
            self._file.__exit__(Abandoned, Abandoned(), None)
        except (BaseError, OSError) as error:
            if self._size > PART:
                log.warning("parts of an upload may have stayed in the bucket (%s)", reason(error))
        self._drop()

    def _drop(self) -> None:
        """It counts no longer: from now on, or once the index is back and the next blob is written."""
        try:
            self._index.drop(self._name)
        except StorageUnavailable:
            self._given_up.append(self._name)


class Abandoned(Exception):
    """Why a blob isn't finished."""


def open_bucket(url: str) -> S3Store:
    """The bucket of a URL; connects to nothing yet. Raises ConfigError."""
    parts = urlsplit(url)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    try:
        return S3Store(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=5),
                # Of a whole answer: a slow reader takes as long as it needs.
                "timeout": timedelta(days=1),
                "read_timeout": timedelta(seconds=30),
            },
            retry_config={
                "max_retries": 4,
                "retry_timeout": timedelta(seconds=10),
                "backoff": {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=1)},
            },
        )
    except (BaseError, ValueError) as error:
        raise ConfigError(f"the bucket {parts.netloc} can't be used: {reason(error)}") from error
