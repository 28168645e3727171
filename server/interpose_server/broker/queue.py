"""Jobs: submitted, waiting, claimed, ended. All decisions are taken in the Lua scripts beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
from interpose.errors import (
    InternalError,
    JobCancelled,
    JobConflict,
    JobPoisoned,
    JobTimeout,
    ModelLoading,
    QueueFull,
    Unauthorized,
    UnknownJob,
    UnknownModel,
)
from interpose.graph.footprint import Footprint
from interpose.wire.status import JobStatus
from redis.asyncio import Redis

from ..settings import Settings
from . import keys
from .answers import text
from .jobs import Claim, Demand, JobInfo, NewJob, Report
from .scripts import Scripts
from .waiting import Waiting


class ServedOtherwise(Exception):
    """A job was checked against what its model serves no more."""


def updating(model: str) -> ModelLoading:
    """What those are told who have recorded something against a model that is about to come back as another."""
    return ModelLoading(
        f"{model} is being updated; run it again once that is done",
        details={"retry_after_s": 1, "state": "loading"},
    )


class Queue:
    def __init__(self, redis: Redis, scripts: Scripts, settings: Settings) -> None:
        self._redis = redis
        self._run = scripts
        self._settings = settings
        self._ttl_ms = int(settings.result_ttl_s * 1000)
        self._lease_ms = int(settings.lease_s * 1000)

    async def submit(self, job: NewJob) -> tuple[JobStatus, int | None]:
        """Enqueue, once however often it is sent. Returns the status and the place in the queue, 1 being next.

        Raises:
            JobConflict: another payload was sent under this id.
            QueueFull: the user, or the server, has too many jobs waiting.
            Unauthorized: the key it came with was revoked.
            UnknownModel: it was forgotten meanwhile.
            ModelLoading: it is being updated; what was recorded against it as it was is taken no more.
            ServedOtherwise: it serves something else by now than it was checked against.
        """
        settings = self._settings
        answer, number = await self._run(
            "submit", keys.ref(job.user, job.id), job.user, job.id, job.model, job.digest, job.priority,
            job.payload, job.blob, msgpack.packb(job.footprint.to_plain()), job.timeout_s,
            settings.queued_per_user, settings.queued_total, settings.running_per_user,
            int(settings.queue_ttl_s * 1000), job.key, job.revision, job.key_digest,
            job.served,
        )  # fmt: skip
        match answer.decode():
            case "conflict":
                raise JobConflict(f"job {job.id} exists with another payload; choose a new id")
            case "revoked":
                raise Unauthorized("the API key was revoked")
            case "retired":
                raise UnknownModel(f"{job.model} is served here no longer")
            case "moved":
                raise ServedOtherwise
            case "closed":
                raise updating(job.model)
            case "full":
                raise QueueFull(
                    f"{number:,} of your jobs are waiting, the most allowed; wait for some to finish",
                    details={"retry_after_s": 1, "allowed": settings.queued_per_user},
                )
            case "crowded":
                raise QueueFull("the server has too many jobs waiting; try later", details={"retry_after_s": 5})
            case status:
                return JobStatus(status), number if number >= 0 else None

    async def peek(self, model: str, copy: str = "") -> list[Waiting]:
        """The next jobs of a model, fairest first; they stay where they are.

        Args:
            copy: of the model, that is to run them: what was checked against another revision is left out while a
                copy lives that serves it.
        """
        return (await self._peek(model, "", copy))[0]

    async def take(self, model: str, worker: str, copy: str = "") -> tuple[list[Waiting], list[Claim]]:
        """As `peek`; but one that waits alone is claimed at once, as there is nothing to choose."""
        return await self._peek(model, worker, copy)

    async def _peek(self, model: str, worker: str, copy: str) -> tuple[list[Waiting], list[Claim]]:
        settings = self._settings
        flat, claimed = await self._run(
            "peek", model, settings.batch_jobs, settings.running_per_user, worker, self._lease_ms, copy,
            settings.silent_ms,
        )  # fmt: skip
        waiting = [
            Waiting(ref.decode(), _footprint(footprint), bool(alone), int(created))
            for ref, footprint, alone, created in zip(*(flat[i::4] for i in range(4)), strict=True)
        ]
        return waiting, list(map(_claim, claimed))

    async def order(self, model: str, most: int = 256) -> list[str]:
        """Refs of a model's waiting jobs, fairest first."""
        return [ref.decode() for ref in await self._run("order", model, most, self._settings.running_per_user)]

    async def wait(self, model: str, timeout_s: float) -> None:
        """Return when a job of the model may be waiting, or after the timeout."""
        await self._redis.blpop([keys.BELL.format(model=model)], timeout=timeout_s)

    async def claim(self, model: str, worker: str, refs: Sequence[str]) -> list[Claim]:
        """Make waiting jobs this worker's, for one lease. Those no longer waiting are left out."""
        rows = await self._run("claim", model, worker, self._lease_ms, *refs)
        return list(map(_claim, rows))

    async def release(self, worker: str, held: Sequence[tuple[str, int]]) -> set[str]:
        """Put claimed (ref, attempt) back that were never begun. Returns the refs that were still this worker's."""
        flat = [part for item in held for part in item]
        return {ref.decode() for ref in await self._run("release", worker, *flat)} if flat else set()

    async def heartbeat(self, worker: str, held: Sequence[tuple[str, int]]) -> set[str]:
        """Extend the leases on (ref, attempt). Returns the refs that are no longer this worker's."""
        flat = [part for item in held for part in item]
        return {ref.decode() for ref in await self._run("heartbeat", worker, self._lease_ms, *flat)}

    async def report(self, reports: Sequence[Report]) -> list[bool]:
        """Append events and end jobs, in one trip.

        Returns:
            For each, whether the worker still holds the lease; if not, nothing was changed. A report whose answer
            was lost may be sent again.
        """
        if len(reports) == 1:
            return [bool(await self._run("report", *self._report(reports[0])))]
        async with self._redis.pipeline(transaction=False) as pipe:
            for report in reports:
                await self._run("report", *self._report(report), pipe=pipe)
            return [bool(held) for held in await pipe.execute()]

    def _report(self, report: Report) -> list[Any]:
        outcome = report.outcome
        problem = msgpack.packb(outcome.error.to_wire()) if outcome and outcome.error else b""
        head = [report.ref, report.worker, report.attempt, report.first, str(outcome.status) if outcome else ""]
        head += [problem, outcome.seconds if outcome else 0, self._ttl_ms, self._lease_ms]
        return head + [part for item in report.records for part in (item.kind, item.body, item.data, item.blob)]

    async def cancel(self, user: str, job: str) -> JobInfo:
        """Cancel unless it has ended. Raises UnknownJob."""
        problem = msgpack.packb(JobCancelled("the job was cancelled by its owner").to_wire())
        if await self._run("cancel", keys.ref(user, job), problem, self._ttl_ms) is None:
            raise _unknown(job)
        return await self.info(user, job)

    async def ack(self, user: str, job: str) -> list[str]:
        """The owner has everything: keep the job only a little longer. Returns the blobs its results were in."""
        names = await self._run("ack", keys.ref(user, job), int(self._settings.acked_ttl_s * 1000))
        return [name.decode() for name in names]

    async def reap(self, worker: str = "") -> list[tuple[str, JobStatus]]:
        """Requeue or fail jobs whose lease ended, or, with a name, all that a dead worker and its lanes held."""
        most = self._settings.max_attempts
        error = JobPoisoned(
            f"the worker died each of the {most} times it ran this job; the job is the likely cause",
            details={"attempts": most},
        )
        flat = await self._run("reap", worker, most, msgpack.packb(error.to_wire()), self._ttl_ms)
        return [(ref.decode(), JobStatus(end.decode())) for ref, end in zip(flat[::2], flat[1::2], strict=True)]

    async def sweep(self) -> dict[str, list[str]]:
        """Forget ended jobs whose time is over, fail those that waited too long.

        Returns:
            The refs forgotten, each with the names of the blobs its results are in: nobody can ask for them.
        """
        error = JobTimeout("the job waited too long for its model; submit it again later")
        gone = await self._run("sweep", msgpack.packb(error.to_wire()), self._ttl_ms)
        return {ref.decode(): [name.decode() for name in names] for ref, names in gone}

    async def info(self, user: str, job: str) -> JobInfo:
        """Raises UnknownJob."""
        names = ("model", "status", "attempt", "created_ms", "started_ms", "ended_ms", "error")
        values = await self._redis.hmget(keys.JOB.format(ref=keys.ref(user, job)), list(names))
        model, status, attempt, created, started, ended, error = values
        if not (model and status and attempt and created):
            raise _unknown(job)
        return JobInfo(
            user=user,
            id=job,
            model=text(model),
            status=JobStatus(text(status)),
            attempt=int(attempt),
            created_ms=int(created),
            started_ms=int(started) if started else None,
            ended_ms=int(ended) if ended else None,
            error=msgpack.unpackb(error) if error else None,
        )

    async def place(self, info: JobInfo) -> int | None:
        """A waiting job's place in the queue, 1 being next; None if it doesn't wait or is far behind."""
        if info.status is not JobStatus.QUEUED:
            return None
        order = await self.order(info.model)
        ref = keys.ref(info.user, info.id)
        return order.index(ref) + 1 if ref in order else None

    async def list(self, user: str, most: int = 100) -> list[JobInfo]:
        """The user's jobs, newest first."""
        ids = await self._redis.zrevrange(keys.JOBS.format(user=user), 0, most - 1)
        found = []
        for raw in ids:
            try:
                found.append(await self.info(user, text(raw)))
            except UnknownJob:
                continue
        return found

    async def load(self, user: str) -> dict[str, int]:
        """How many of the user's jobs wait and run."""
        queued = await self._redis.scard(keys.QUEUED.format(user=user))
        running = await self._redis.scard(keys.RUNNING.format(user=user))
        return {"queued": int(queued), "running": int(running)}

    async def depth(self, model: str) -> int:
        """Jobs waiting for a model."""
        raw = await self._redis.hget(keys.CLOCK.format(model=model), "/depth")
        return int(raw or 0)

    async def demand(self, model: str) -> Demand:
        """What its users ask of a model now."""
        return Demand(*map(int, await self._run("load", model)))

    async def tally(self, model: str) -> dict[str, int]:
        """How many of a model's jobs came to each status since ever, and "requeued".

        "wait_ms" is how long they waited in all, from submission to each start.
        """
        raw = await self._redis.hgetall(keys.TALLY.format(model=model))
        return {text(name): int(count) for name, count in raw.items()}

    async def usage(self, user: str) -> dict[str, float]:
        """Jobs run and seconds charged so far."""
        raw = await self._redis.hgetall(keys.USAGE.format(user=user))
        return {"jobs": int(raw.get(b"jobs", 0)), "seconds": float(raw.get(b"seconds", 0))}


def _claim(flat: Sequence[bytes]) -> Claim:
    row = dict(zip(flat[::2], flat[1::2], strict=True))
    user, job = row[b"user"].decode(), row[b"id"].decode()
    return Claim(
        ref=keys.ref(user, job),
        user=user,
        id=job,
        attempt=int(row[b"attempt"]),
        payload=row.get(b"payload", b""),
        blob=row[b"blob"].decode(),
        footprint=_footprint(row[b"footprint"]),
        timeout_s=float(row[b"timeout_s"]),
        alone=b"alone" in row,
        revision=row.get(b"revision", b"").decode(),
    )


def _footprint(raw: bytes) -> Footprint:
    plain = msgpack.unpackb(raw)
    if not isinstance(plain, dict):
        raise InternalError("a queued job has no footprint")
    return Footprint.from_plain(plain)


def _unknown(job: str) -> UnknownJob:
    return UnknownJob(f"no job {job} of yours is here; its result may have expired")
