"""From the engine's thread to the broker: small saves together, large ones as blobs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import msgpack
from interpose.errors import InternalError, InterposeError, LimitExceeded, ReplicaLost
from interpose.wire.tensors import encode_spec, total
from redis.exceptions import RedisError

from ..blobs import Blobs
from ..broker.jobs import Outcome, Record, Report
from ..broker.queue import Queue
from ..settings import Settings
from ..tasks import end
from .sink import Adopted, Backlog, Grown, Item, JobSink, Logged, Saved, Stored
from .storing import Storing

log = logging.getLogger(__name__)

MOST = 256
"""Items of one round: with the inline bound, a few MB at most."""

ROUND_BYTES = 4 << 20
"""Bytes of one round, but for its last item: what is written is told of before the rest is."""

MOMENT_S = 0.002
"""How long a small save waits for what comes right behind it: in a small job its end, which then needs no report of
its own."""

MAX_BODY = 1 << 20
"""Bytes of a save's description, its plain values included."""

RETRY_S = 0.2


class Publisher:
    """One for a worker. `put` may be called from any thread; `run` is a task of the event loop.

    Args:
        worker: the name under which the jobs are leased.
        ended: called with each sink whose end has been reported.
    """

    def __init__(
        self, worker: str, queue: Queue, blobs: Blobs, settings: Settings, ended: Callable[[JobSink], None]
    ) -> None:
        self.backlog = Backlog(settings.backlog_bytes)
        self._worker = worker
        self._queue = queue
        self._blobs = blobs
        self._settings = settings
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[JobSink, Item]] = asyncio.Queue()
        self._broken: asyncio.Future[None] = self._loop.create_future()
        self._storing = Storing(blobs, settings, self._items.put_nowait, self._break)

    def put(self, sink: JobSink, item: Item) -> None:
        self._loop.call_soon_threadsafe(self._storing.take, sink, item)

    async def run(self) -> None:
        """Publish until cancelled. Raises ReplicaLost: a save was on its way from a shard that is gone."""
        publishing = asyncio.create_task(self._publish())
        try:
            await asyncio.wait([publishing, self._broken], return_when=asyncio.FIRST_COMPLETED)
            await (self._broken if self._broken.done() else publishing)
        finally:
            await end([publishing])
            await self._storing.close()

    def _break(self, error: ReplicaLost) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)

    async def _publish(self) -> None:
        while True:
            taken = [await self._items.get()]
            if isinstance(taken[0][1], Saved) and taken[0][1].nbytes <= self._settings.inline_bytes:
                with suppress(TimeoutError):
                    async with asyncio.timeout(MOMENT_S):
                        taken.append(await self._items.get())
            size = sum(_size(item) for _, item in taken)
            while not self._items.empty() and len(taken) < MOST and size < ROUND_BYTES:
                taken.append(self._items.get_nowait())
                size += _size(taken[-1][1])
            await self._round(taken)

    async def _round(self, taken: list[tuple[JobSink, Item]]) -> None:
        by_job: dict[JobSink, list[Item]] = {}
        for sink, item in taken:
            by_job.setdefault(sink, []).append(item)
        reports = [await self._report(sink, items) for sink, items in by_job.items()]
        held = await self._send(reports)
        for (sink, items), report, mine in zip(by_job.items(), reports, held, strict=True):
            sink.sent += len(report.records)
            self.backlog.remove(sum(map(_size, items)))
            if not mine:
                sink.lose()
            if isinstance(items[-1], Outcome):
                self._ended(sink)

    async def _report(self, sink: JobSink, items: list[Item]) -> Report:
        """What one job's items come to. A save that can't be stored ends the job."""
        claim, records, outcome = sink.claim, list[Record](), None
        for item in items:
            try:
                match item:
                    case Saved():
                        records.append(await self._record(item))
                    case Stored():
                        records += [Record("save", _body(item.saved), blob=item.blob)] if item.blob else []
                    case Logged():
                        records.append(Record("log", msgpack.packb({"node": item.node, "text": item.text})))
                    case Grown():
                        told = {"run": item.run, "step": item.step, "ids": item.ids}
                        records.append(Record("tokens", msgpack.packb(told)))
                    case Outcome():
                        outcome = Outcome(item.error or sink.stopped, item.seconds)
            except InterposeError as error:
                sink.stop(error)
            except Exception:
                # A fault of ours, or no memory for a copy: the job's end is still told, and other jobs go on.
                log.exception("a result can't be brought out")
                sink.stop(InternalError("the server failed while taking a result from the model"))
        return Report(claim.ref, self._worker, claim.attempt, sink.sent, records, outcome)

    async def _record(self, item: Saved) -> Record:
        body = _body(item)
        parts = item.parts() if item.ready else await asyncio.to_thread(item.parts)
        return Record("save", body, b"".join(parts))

    async def _send(self, reports: list[Report]) -> list[bool]:
        """Report until the broker takes it: what was computed isn't thrown away because it restarts."""
        while True:
            try:
                return await self._queue.report(reports)
            except (RedisError, OSError) as error:
                log.warning("the broker doesn't answer (%s); trying again", type(error).__name__)
                await asyncio.sleep(RETRY_S)


def _body(item: Saved | Adopted) -> bytes:
    """A save's description. Raises LimitExceeded."""
    body: bytes = msgpack.packb(
        {
            "node": item.node,
            "tree": item.tree,
            "tensors": [encode_spec(spec) for spec in item.specs],
            "nbytes": total(item.specs),
        }
    )
    if len(body) > MAX_BODY:
        raise LimitExceeded(f"a save's plain values take {len(body):,} bytes, {MAX_BODY:,} are allowed")
    return body


def _size(item: Item) -> int:
    return item.nbytes if isinstance(item, (Saved, Stored)) else 0
