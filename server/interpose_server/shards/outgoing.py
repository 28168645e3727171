"""Large saves go from a shard to the blob store by themselves; home is told where they are, and when.

They hold up nobody here, whether the store is slow or away: what no more can wait for goes by way of home, where it
holds up its own batch alone.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from concurrent.futures import Future
from typing import Any

from interpose.errors import InternalError, InterposeError
from interpose.runtime.split.route import Nest
from interpose.wire.tensors import encode_spec, tensor_spec, total
from interpose.wire.trees import flatten

from .. import blob_keys
from ..blobs import BlobKey, Blobs, put_patiently
from ..settings import Settings
from ..worker.leaving import Leaving, leave
from ..worker.sink import Backlog

REMEMBERED = 4096
"""Saves of which home hasn't heard that they are stored; it asks no more for those of a job that failed."""


class Outgoing:
    """A shard's `Exit`. Of the saves on their way it holds as many bytes as a worker does, `backlog_bytes`."""

    def __init__(self, blobs: Blobs, settings: Settings) -> None:
        self._blobs = blobs
        self._inline_bytes = settings.inline_bytes
        self._ttl_s = settings.result_ttl_s + settings.limits.wall_s + 60
        self._patience_s = settings.limits.wall_s
        self._backlog = Backlog(settings.backlog_bytes)
        self._lanes = asyncio.Semaphore(blobs.lanes)
        self._tokens = itertools.count(1)
        self._leaving: dict[int, Future[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="outgoing", daemon=True)
        self._thread.start()

    def leave(self, address: Nest, node: int, value: Any) -> Nest:
        tree, tensors = flatten(value)
        specs = [tensor_spec(tensor) for tensor in tensors]
        size = total(specs)
        if address is None or size <= self._inline_bytes or not self._backlog.fits(size):
            return {"value": value}
        name = f"{address['id']}/{address['attempt']}/{node}"
        try:
            key, parts = blob_keys.result(address["user"], name), tuple(map(leave, tensors))
        except BaseException:
            self._backlog.remove(size)
            raise
        token, until = next(self._tokens), time.monotonic() + self._patience_s
        self._leaving[token] = asyncio.run_coroutine_threadsafe(self._store(key, parts, size, until), self._loop)
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
        assert error is None or isinstance(error, InterposeError)
        return {"error": None if error is None else error.to_wire()}

    def _forget(self) -> None:
        """Let go of the oldest saves that are stored."""
        over = len(self._leaving) - REMEMBERED
        for token in [token for token, future in [*self._leaving.items()] if future.done()][:over]:
            self._leaving.pop(token, None)

    async def _store(self, key: BlobKey, parts: tuple[Leaving, ...], size: int, until: float) -> None:
        try:
            async with self._lanes:
                await put_patiently(
                    self._blobs, lambda: self._blobs.put(key, [part.data() for part in parts], self._ttl_s), until
                )
        finally:
            self._backlog.remove(size)
