"""The states of a job and the ways between them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from ..errors import InternalError


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return not TRANSITIONS[self]

    def may_become(self, new: JobStatus) -> bool:
        return new in TRANSITIONS[self]

    def become(self, new: JobStatus) -> JobStatus:
        """`new`. Raises InternalError if no way leads there."""
        if not self.may_become(new):
            raise InternalError(f"a {self} job can't become {new}")
        return new


TRANSITIONS: Mapping[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.RUNNING: frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.QUEUED}),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}
"""Running to queued: its worker lost the lease, and it waits for another attempt."""
