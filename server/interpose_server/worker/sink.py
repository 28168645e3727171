"""Where the engine puts a job's values: counted, and handed to the publisher while the engine goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from interpose.errors import InterposeError, JobCancelled, JobTimeout
from interpose.graph.limits import Limits
from interpose.graph.values import TensorSpec
from interpose.wire.tensors import decode_spec, tensor_spec, total
from interpose.wire.trees import Tree, flatten

from ..broker.jobs import Claim, Outcome
from .leaving import Leaving, leave

MAX_LOG = 4096
MAX_LOGS = 1000


@dataclass(frozen=True, slots=True)
class Saved:
    node: int
    tree: Tree
    tensors: tuple[Leaving, ...]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(tensor.spec for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        return total(self.specs)

    def parts(self) -> list[memoryview]:
        """Each tensor's bytes. Blocks where one isn't `ready`."""
        return [tensor.data() for tensor in self.tensors]

    @property
    def ready(self) -> bool:
        return all(tensor.ready() for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Adopted:
    """A save that a shard brings to the blob store, under the name `blob`.

    Args:
        stored: whether it is there: {} if not yet, then {"error": ...}. Blocks while the shard is asked.
    """

    node: int
    tree: Tree
    specs: tuple[TensorSpec, ...]
    blob: str
    stored: Callable[[], Mapping[str, Any]]
    nbytes: int = 0
    """None of them are in this process."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A save whose bytes are in the blob store. Args: blob: its name; "" if that failed, and the job with it."""

    saved: Saved | Adopted
    blob: str

    @property
    def nbytes(self) -> int:
        return self.saved.nbytes


@dataclass(frozen=True, slots=True)
class Logged:
    node: int
    text: str


@dataclass(frozen=True, slots=True)
class Grown:
    """One step of a generation: a token a row, None for rows that had ended."""

    run: int
    step: int
    ids: tuple[int | None, ...]


Item: TypeAlias = Saved | Adopted | Stored | Logged | Grown | Outcome


class Backlog:
    """Bytes the engine made and the publisher hasn't sent: the engine waits while they are too many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._changed = threading.Condition()
        self._since: float | None = None
        """When somebody began to wait."""

    def add(self, size: int, give_up: Callable[[], bool]) -> bool:
        """Add bytes once there is room for them, or never if whoever waits gives up. Returns which."""
        with self._changed:
            while self._bytes and self._bytes + size > self._most:
                if give_up():
                    self._since = None
                    return False
                self._since = self._since or time.monotonic()
                self._changed.wait(0.5)
            self._since = None
            self._bytes += size
            return True

    @property
    def waited_s(self) -> float:
        """How long the engine has waited by now; 0 while it doesn't."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def fits(self, size: int) -> bool:
        """Add bytes if there is room for them; nobody waits."""
        with self._changed:
            if self._bytes and self._bytes + size > self._most:
                return False
            self._bytes += size
            return True

    def remove(self, size: int) -> None:
        with self._changed:
            self._bytes -= size
            self._changed.notify_all()


class JobSink:
    """One job's sink. The engine's thread calls the four methods of its protocol; the others are the worker's.

    Args:
        publish: takes what goes out next; thread-safe.
        limits: of the job, its own shorter timeout included.
    """

    def __init__(
        self,
        claim: Claim,
        limits: Limits,
        backlog: Backlog,
        publish: Callable[[JobSink, Item], None],
    ) -> None:
        self.claim = claim
        self.limits = limits
        self.sent = 0
        """Events published so far; the publisher's."""
        self.inlined = 0
        """Bytes of saves that go through the broker; the publisher's."""
        self._backlog = backlog
        self._publish = publish
        self._bytes = 0
        self._logs = 0
        self._steps: dict[int, int] = {}
        """By run: how many steps were told of."""
        self._deadline = float("inf")
        self.stopped: InterposeError | None = None

    def start(self) -> None:
        """The job's wall time begins, or begins anew where it was spent on others of a batch."""
        if isinstance(self.stopped, JobTimeout):
            self.stopped = None
        self._deadline = time.monotonic() + self.limits.wall_s

    def extend(self, seconds: float) -> None:
        """So much of its wall time went to others."""
        self._deadline += seconds

    def stop(self, error: InterposeError) -> None:
        """End the job with this error, whatever the engine says. The first one counts."""
        self.stopped = self.stopped or error

    def lose(self) -> None:
        """The job is no longer this worker's: cancelled, or its lease was lost."""
        self.stop(JobCancelled("the job was cancelled"))

    def end(self, error: InterposeError | None, seconds: float) -> None:
        """The last thing published."""
        self._publish(self, Outcome(self.stopped or error, seconds))

    def save(self, node: int, value: Any) -> None:
        tree, tensors = flatten(value)
        size = total(map(tensor_spec, tensors))
        self.limits.check("result_bytes", self._bytes + size)
        # Before it begins to leave: on its way it takes memory of this machine's.
        if not self._backlog.add(size, self._over):
            assert self.stopped is not None
            raise self.stopped
        try:
            saved = Saved(node, tree, tuple(map(leave, tensors)))
        except BaseException:
            self._backlog.remove(size)
            raise
        self._bytes += size
        self._publish(self, saved)

    @property
    def address(self) -> dict[str, Any]:
        """By what name a shard stores what the job saves there."""
        return {"user": self.claim.user, "id": self.claim.id, "attempt": self.claim.attempt}

    def adopt(self, node: int, saved: Any, stored: Callable[[int], Any]) -> None:
        specs = tuple(map(decode_spec, saved["tensors"]))
        self._bytes += total(specs)
        self.limits.check("result_bytes", self._bytes)
        ask = partial(stored, saved["token"])
        self._publish(self, Adopted(node, saved["tree"], specs, saved["blob"], ask))

    def log(self, node: int, text: str) -> None:
        self._logs += 1
        if self._logs <= MAX_LOGS:
            self._publish(self, Logged(node, text[:MAX_LOG]))

    def tokens(self, run: int, step: int, ids: Sequence[int | None]) -> None:
        # A shared run that had to be repeated draws the same tokens again.
        if step >= self._steps.get(run, 0):
            self._steps[run] = step + 1
            self._publish(self, Grown(run, step, tuple(ids)))

    def cancelled(self) -> bool:
        if self._over():
            assert self.stopped is not None
            raise self.stopped
        return False

    def _over(self) -> bool:
        """Whether the job is to end here."""
        if self.stopped is None and time.monotonic() > self._deadline:
            self.stop(
                JobTimeout(
                    f"the job ran for more than {self.limits.wall_s:g} s", details={"allowed_s": self.limits.wall_s}
                )
            )
        return self.stopped is not None
