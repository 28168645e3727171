"""Large saves go from a shard to the blob store by themselves; home is told where they are, and when."""

from __future__ import annotations

import itertools
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from interpose.errors import InternalError, InterposeError, StorageUnavailable
from interpose.runtime.split.route import Nest
from interpose.wire.tensors import encode_spec, tensor_spec, total
from interpose.wire.trees import flatten

from .. import blob_keys
from ..blobs import BlobKey, Blobs
from ..settings import Settings
from ..worker.leaving import Leaving, leave
from ..worker.sink import Backlog

log = logging.getLogger(__name__)

RETRY_S = 0.5

REMEMBERED = 4096
"""Saves of which home hasn't heard that they are stored; it asks no more for those of a job that failed."""


class Outgoing:
    """A shard's `Exit`."""

    def __init__(self, blobs: Blobs, settings: Settings) -> None:
        self._blobs = blobs
        self._inline_bytes = settings.inline_bytes
        self._ttl_s = settings.result_ttl_s + settings.limits.wall_s + 60
        self._patience_s = settings.limits.wall_s
        self._backlog = Backlog(settings.backlog_bytes)
        self._pool = ThreadPoolExecutor(blobs.lanes, thread_name_prefix="outgoing")
        self._tokens = itertools.count(1)
        self._leaving: dict[int, Future[None]] = {}

    def leave(self, address: Nest, node: int, value: Any) -> Nest:
        tree, tensors = flatten(value)
        specs = [tensor_spec(tensor) for tensor in tensors]
        size = total(specs)
        if address is None or size <= self._inline_bytes:
            return {"value": value}
        name = f"{address['id']}/{address['attempt']}/{node}"
        self._backlog.add(size, lambda: False)
        try:
            key, parts = blob_keys.result(address["user"], name), tuple(map(leave, tensors))
            token = next(self._tokens)
            self._leaving[token] = self._pool.submit(self._store, key, parts, size)
        except BaseException:
            self._backlog.remove(size)
            raise
        if len(self._leaving) > REMEMBERED:
            self._forget()
        return {
            "tree": tree,
            "tensors": [encode_spec(spec) for spec in specs],
            "nbytes": size,
            "blob": name,
            "token": token,
        }

    def stored(self, token: int) -> Nest:
        """{} while a save is under way; then {"error": ...}, None if all went well."""
        future = self._leaving.get(token)
        if future is not None and not future.done():
            return {}
        self._leaving.pop(token, None)
        if future is None:
            return {"error": InternalError("the shard knows nothing of this save").to_wire()}
        error = future.exception()
        if error is None:
            return {"error": None}
        if not isinstance(error, InterposeError):
            log.error("a result can't be stored", exc_info=error)
            error = InternalError("the server couldn't store a result")
        return {"error": error.to_wire()}

    def _forget(self) -> None:
        """Let go of the oldest saves that are stored."""
        over = len(self._leaving) - REMEMBERED
        for token in [token for token, future in [*self._leaving.items()] if future.done()][:over]:
            self._leaving.pop(token, None)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _store(self, key: BlobKey, parts: tuple[Leaving, ...], size: int) -> None:
        """A store that is away is tried again for as long as a job may take."""
        ends = time.monotonic() + self._patience_s
        try:
            while True:
                try:
                    self._blobs.put(key, [part.data() for part in parts], self._ttl_s)
                    return
                except StorageUnavailable:
                    if time.monotonic() > ends:
                        raise
                    time.sleep(RETRY_S)
        finally:
            self._backlog.remove(size)
