"""Jobs as the broker takes them, tells of them and gives them to workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from interpose.errors import InterposeError, JobCancelled
from interpose.graph.footprint import Footprint
from interpose.wire.status import JobStatus


@dataclass(frozen=True, slots=True)
class NewJob:
    """What the gateway hands over once a submission is checked.

    Attributes:
        digest: SHA-256 of the request's body; the same id with another digest is a conflict.
        payload, blob: the graph's msgpack, or the name of the blob that holds it.
        key, key_digest: id of the API key it came with, and its digest: one that was revoked by then is refused.
        revision: the model's that it must run on; "" for any.
        served: all that the model served when it was checked: while there is a copy that does, it is left to that.
    """

    user: str
    id: str
    model: str
    digest: str
    payload: bytes
    blob: str
    footprint: Footprint
    timeout_s: float
    priority: int = 0
    key: str = ""
    key_digest: str = ""
    revision: str = ""
    served: str = ""


@dataclass(frozen=True, slots=True)
class JobInfo:
    """A job as its owner may see it. Times in ms since the epoch."""

    user: str
    id: str
    model: str
    status: JobStatus
    attempt: int
    created_ms: int
    started_ms: int | None
    ended_ms: int | None
    error: Mapping[str, Any] | None

    def to_plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "id": self.id,
            "model": self.model,
            "status": str(self.status),
            "attempt": self.attempt,
            "created_ms": self.created_ms,
            "started_ms": self.started_ms,
            "ended_ms": self.ended_ms,
        }
        return plain if self.error is None else {**plain, "error": dict(self.error)}


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that is now a worker's."""

    ref: str
    user: str
    id: str
    attempt: int
    payload: bytes
    blob: str
    footprint: Footprint
    timeout_s: float
    alone: bool
    revision: str


@dataclass(frozen=True, slots=True)
class Record:
    """An event on its way into a job's stream: "save", "log" or "tokens"; of data and blob at most one is set."""

    kind: str
    body: bytes
    data: bytes = b""
    blob: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended, and the seconds of the worker's time its user is charged with."""

    error: InterposeError | None
    seconds: float

    @property
    def status(self) -> JobStatus:
        if self.error is None:
            return JobStatus.COMPLETED
        return JobStatus.CANCELLED if isinstance(self.error, JobCancelled) else JobStatus.FAILED


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker tells of one job: its next events, numbered from `first` within the attempt, and its end."""

    ref: str
    worker: str
    attempt: int
    first: int
    records: Sequence[Record]
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """What the users of a model ask of it.

    Attributes:
        waiting, running: jobs.
        oldest_ms: when the one that waits longest was handed in; 0: none waits.
        used_ms: when a job last came, or ended; 0: never.
    """

    waiting: int
    running: int
    oldest_ms: int
    used_ms: int
