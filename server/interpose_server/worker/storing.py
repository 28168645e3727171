"""Large saves on their way to the blob store, before they are told of. A job's events stay in order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from interpose.errors import InterposeError, JobCancelled, ReplicaLost, from_wire

from .. import blob_keys
from ..blobs import Blobs, put_patiently
from ..settings import Settings
from ..tasks import end
from .sink import Adopted, Item, JobSink, Saved, Stored

MOST_INLINED = 64
"""So many times the bound on one inline save may the inline saves of a job take together."""

SOON_S, SELDOM_S = 0.002, 0.5
"""How often a shard is asked whether a save has arrived: at first, and in the end."""


class Storing:
    """Passes items on: small ones at once, large saves when they are stored, and what follows those behind them.

    Of one event loop.

    Args:
        forward: takes what can be told of.
        lost: takes what leaves this process unable to go on; nothing more is told of the job then.
    """

    def __init__(
        self,
        blobs: Blobs,
        settings: Settings,
        forward: Callable[[tuple[JobSink, Item]], None],
        lost: Callable[[ReplicaLost], None],
    ) -> None:
        self._blobs = blobs
        self._inline_bytes = settings.inline_bytes
        self._result_ttl_s = settings.result_ttl_s
        self._forward = forward
        self._lost = lost
        self._lanes = asyncio.Semaphore(blobs.lanes)
        self._lines: dict[JobSink, deque[Item | asyncio.Task[Stored]]] = {}
        """Of jobs that have saves under way: those, and what came after."""

    def take(self, sink: JobSink, item: Item) -> None:
        if isinstance(item, Adopted) or (isinstance(item, Saved) and not self._inlined(sink, item)):
            work = self._arrival(sink, item) if isinstance(item, Adopted) else self._store(sink, item)
            task = asyncio.create_task(work)
            self._lines.setdefault(sink, deque()).append(task)
            task.add_done_callback(lambda _: self._advance(sink))
        elif line := self._lines.get(sink):
            line.append(item)
        else:
            self._forward((sink, item))

    async def close(self) -> None:
        """Give up what is under way."""
        tasks = [item for line in self._lines.values() for item in line if isinstance(item, asyncio.Task)]
        self._lines.clear()
        await end(tasks)

    def _inlined(self, sink: JobSink, item: Saved) -> bool:
        """Whether it goes through the broker: that keeps it in memory, so beyond a job's share none does."""
        if not sink.inlined + item.nbytes <= MOST_INLINED * self._inline_bytes >= MOST_INLINED * item.nbytes:
            return False
        sink.inlined += item.nbytes
        return True

    def _advance(self, sink: JobSink) -> None:
        line = self._lines.get(sink, deque())
        while line:
            first = line[0]
            if isinstance(first, asyncio.Task):
                if not first.done():
                    return
                if isinstance(error := first.exception(), ReplicaLost):
                    self._lost(error)
                    return
                first = first.result()
            line.popleft()
            self._forward((sink, first))
        self._lines.pop(sink, None)

    async def _store(self, sink: JobSink, item: Saved) -> Stored:
        """Store a save, or end its job. A store that is away is tried again for as long as the job may take."""
        name = f"{sink.claim.id}/{sink.claim.attempt}/{item.node}"
        until = time.monotonic() + sink.limits.wall_s
        stored = False
        async with self._lanes:
            try:
                stored = await put_patiently(
                    self._blobs, lambda: self._put(sink, name, item), until, lambda: _cancelled(sink)
                )
            except InterposeError as error:
                sink.stop(error)
        return Stored(item, name if stored else "")

    async def _arrival(self, sink: JobSink, item: Adopted) -> Stored:
        """Wait until a shard has stored a save, or end its job. Raises ReplicaLost: the job is to be run again."""
        wait_s = SOON_S
        while not _cancelled(sink):
            try:
                told = await asyncio.to_thread(item.stored)
            except ReplicaLost:
                raise
            except InterposeError as error:
                sink.stop(error)
                break
            if not told:
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, SELDOM_S)
            elif told["error"] is None:
                return Stored(item, item.blob)
            else:
                sink.stop(from_wire(told["error"]))
                break
        return Stored(item, "")

    def _put(self, sink: JobSink, name: str, item: Saved) -> None:
        # Longer than the job: its time to live starts only when it ends.
        ttl_s = self._result_ttl_s + sink.limits.wall_s + 60
        self._blobs.put(blob_keys.result(sink.claim.user, name), item.parts(), ttl_s)


def _cancelled(sink: JobSink) -> bool:
    return isinstance(sink.stopped, JobCancelled)
