"""One job's stream as the client follows it: a state machine without I/O.

Messages of one job go in, events come out. Whatever connection they came over, feeding what `resume()` asked for
continues where the last message ended, in the middle of a save if need be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..errors import InterposeError, InvalidPayload, JobCancelled, LimitExceeded, from_wire
from .messages import (
    Chunk,
    Event,
    Hello,
    Loading,
    Log,
    Position,
    Refused,
    Save,
    ServerMessage,
    Status,
    Subscribe,
    Tokens,
)
from .result import Saved
from .status import JobStatus
from .tensors import check_bytes, total
from .trees import unflatten


class OutOfStep(InvalidPayload):
    """The stream skipped something. Subscribing again with `resume()` brings it back into step."""


@dataclass(frozen=True, slots=True)
class Changed:
    """The job is in a new state. A higher attempt than before means that earlier saves are void."""

    status: JobStatus
    attempt: int
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """Place in the queue, 1 being next."""

    position: int


@dataclass(frozen=True, slots=True)
class ModelState:
    """How the model of a job that waits is: "cold", "loading", ...; "ready" once that isn't why it waits."""

    state: str


@dataclass(frozen=True, slots=True)
class Logged:
    """A line that the job told, by the node that told it."""

    node: int
    text: str


@dataclass(frozen=True, slots=True)
class NewTokens:
    """One step of a generation that streams: a token id a row, None for a row that had ended.

    A higher attempt than before begins again from step 0.
    """

    attempt: int
    run: int
    step: int
    ids: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes of a save so far, of all it has."""

    node: int
    received: int
    nbytes: int


Happening: TypeAlias = Changed | Moved | ModelState | Logged | NewTokens | Received | Saved


class JobStream:
    """Follows one job.

    Attributes:
        last: number of the last event fully received, of saves that come apart the head.
        status, attempt, position: as the server last said.
        saves: node -> value of the newest attempt.
        apart: by event, the saves whose bytes have to be fetched; `arrived` is told of each that is whole.
        error: why the job ended, if not by completing.
    """

    def __init__(self, job: str, *, apart: int = 0, most_bytes: int = 1 << 42) -> None:
        """`apart`: ask for saves of so many bytes and more without their bytes, unless 0.

        `most_bytes`: of all saves together; a server that announces more is not believed.
        """
        self.job = job
        self.last = 0
        self.status = JobStatus.QUEUED
        self.attempt = 0
        self.position: int | None = None
        self.saves: dict[int, Saved] = {}
        self.apart: dict[int, Incoming] = {}
        self.error: InterposeError | None = None
        self._apart = apart
        self._most = most_bytes
        self._open: Incoming | None = None
        self._end: Status | None = None
        """It completed, and saves that come apart are still missing."""

    @property
    def done(self) -> bool:
        return self.status.terminal or self.error is not None

    @property
    def heard(self) -> bool:
        """Whether the server has nothing more to say; bytes that come apart may still be missing."""
        return self.done or self._end is not None

    def resume(self) -> Subscribe:
        """The subscription that continues here."""
        return Subscribe(self.job, self.last, self._open.received if self._open else 0, self._apart)

    def feed(self, message: ServerMessage) -> list[Happening]:
        """Take one message; what it made happen. Repeated events and messages of other jobs change nothing.

        Raises:
            OutOfStep: something in between is missing; nothing of this message was taken.
            InvalidPayload: the message contradicts itself or what came before.
            LimitExceeded: a save of more bytes than this side takes.
        """
        if self.heard or isinstance(message, Hello) or message.job != self.job:
            return []
        if isinstance(message, Position):
            self.position = message.position
            return [Moved(message.position)]
        if isinstance(message, Loading):
            return [ModelState(message.state)]
        if isinstance(message, Refused):
            self.error = message.exception()
            self._void_apart()
            return []
        if isinstance(message, Chunk):
            return self._chunk(message)
        return self._event(message)

    def arrived(self, seq: int) -> list[Happening]:
        """The bytes of a save that came apart are all there; what that made happen.

        Raises:
            InvalidPayload: they aren't what the save's head announced.
        """
        happened: list[Happening] = [self._keep(self.apart.pop(seq))]
        if self._end is not None and not self.apart:
            end, self._end = self._end, None
            happened += self._status(end, stale=False)
        return happened

    def _event(self, event: Event) -> list[Happening]:
        if event.seq <= self.last:
            return []
        if event.seq != self.last + 1:
            raise OutOfStep(f"event {event.seq} of job {self.job} came after event {self.last}")
        if self._open is not None:
            return self._repeated(event, self._open)
        stale = event.attempt < self.attempt
        if event.attempt > self.attempt:
            self.attempt = event.attempt
            self.saves.clear()
            self._void_apart()
        if isinstance(event, Save):
            return self._begin(event, stale)
        self.last = event.seq
        if isinstance(event, Log):
            return [] if stale else [Logged(event.node, event.text)]
        if isinstance(event, Tokens):
            return [] if stale else [NewTokens(event.attempt, event.run, event.step, event.ids)]
        return self._status(event, stale)

    def _void_apart(self) -> None:
        for incoming in self.apart.values():
            incoming.void = True
        self.apart.clear()

    def _repeated(self, event: Event, incoming: Incoming) -> list[Happening]:
        """The head of the save in progress, sent again after a reconnect."""
        if event == incoming.save:
            return []
        self._open = None
        raise OutOfStep(f"event {event.seq} of job {self.job} came within another or changed in between")

    def _status(self, event: Status, stale: bool) -> list[Happening]:
        if stale and event.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
            return []
        if event.status is JobStatus.COMPLETED and self.apart:
            self._end = event
            return []
        self.status = event.status
        if event.status is not JobStatus.QUEUED:
            self.position = None
        self.error = reason(event.status, event.error)
        if self.error is not None:
            self._void_apart()
        return [Changed(event.status, event.attempt, event.error)]

    def _begin(self, save: Save, stale: bool) -> list[Happening]:
        held = sum(total(saved.specs) for saved in self.saves.values())
        held += sum(incoming.save.nbytes for incoming in self.apart.values())
        if held + save.nbytes > self._most:
            raise LimitExceeded(f"the server announces {held + save.nbytes:,} bytes, {self._most:,} are taken")
        unflatten(save.tree, save.tensors)
        incoming = Incoming(save, stale)
        if save.apart and save.nbytes:
            self.last = save.seq
            if not stale:
                self.apart[save.seq] = incoming
            return []
        self._open = incoming
        return self._close(incoming) if not save.nbytes else []

    def _chunk(self, chunk: Chunk) -> list[Happening]:
        if chunk.seq <= self.last:
            return []
        incoming = self._open
        if incoming is None or chunk.seq != incoming.save.seq or chunk.offset > incoming.received:
            raise OutOfStep(f"bytes of event {chunk.seq} of job {self.job} came before what precedes them")
        end = chunk.offset + chunk.data.nbytes
        if end > incoming.save.nbytes:
            raise InvalidPayload(f"event {chunk.seq} of job {self.job} has more bytes than it announced")
        if end <= incoming.received:
            return []
        incoming.write(chunk.data[incoming.received - chunk.offset :])
        happened: list[Happening] = []
        if not incoming.void:
            happened.append(Received(incoming.save.node, incoming.received, incoming.save.nbytes))
        return happened + self._close(incoming) if incoming.received == incoming.save.nbytes else happened

    def _close(self, incoming: Incoming) -> list[Happening]:
        self._open = None
        self.last = incoming.save.seq
        return [] if incoming.void else [self._keep(incoming)]

    def _keep(self, incoming: Incoming) -> Saved:
        saved = self.saves[incoming.save.node] = incoming.finish()
        return saved


class Incoming:
    """A save in progress: a buffer for each tensor, made when its first byte arrives.

    Attributes:
        received: bytes so far.
        void: it belongs to an attempt that was given up: its bytes are counted and dropped.
    """

    def __init__(self, save: Save, void: bool) -> None:
        self.save = save
        self.void = void
        self.received = 0
        self._parts: list[memoryview] = []
        self._filled = 0

    def write(self, data: memoryview) -> None:
        """Take the next bytes, at most as many as are missing."""
        if self.void:
            self.received += data.nbytes
            return
        while data.nbytes:
            room = self.room()
            taken = data[: room.nbytes]
            room[: taken.nbytes] = taken
            self.fill(taken.nbytes)
            data = data[taken.nbytes :]

    def room(self) -> memoryview:
        """Where the next bytes belong: as much as is left of one tensor. Not to be asked for once all are there."""
        return self._current()[self._filled :]

    def fill(self, size: int) -> None:
        """The first `size` bytes of `room` have been written."""
        self.received += size
        self._filled += size

    def _current(self) -> memoryview:
        """The buffer with room left; the next tensors' if none has."""
        while not self._parts or self._filled == len(self._parts[-1]):
            self._parts.append(_room(self.save.tensors[len(self._parts)].nbytes))
            self._filled = 0
        return self._parts[-1]

    def finish(self) -> Saved:
        specs = self.save.tensors
        parts = self._parts + [_room(spec.nbytes) for spec in specs[len(self._parts) :]]
        for spec, part in zip(specs, parts, strict=True):
            check_bytes(spec, part)
        return Saved(self.save.node, self.save.tree, specs, tuple(parts))


def _room(size: int) -> memoryview:
    """Zeroed memory that the machine provides only as it is written to: what is announced costs nothing yet.

    Raises:
        LimitExceeded: more than this machine could ever have.
    """
    try:
        return np.zeros(size, np.uint8).data
    except MemoryError as error:
        raise LimitExceeded(f"a tensor of {size:,} bytes is announced, more than this machine has") from error


def reason(status: JobStatus, error: Mapping[str, Any] | None) -> InterposeError | None:
    """Why a job that is in this state has no result and won't; None if that isn't so."""
    if status is JobStatus.CANCELLED:
        return from_wire(error) if error else JobCancelled("the job was cancelled")
    if status is JobStatus.FAILED:
        return from_wire(error or {"code": "job_error", "message": "the job failed; the server gave no reason"})
    return None
