"""A submitted job, as its user holds it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from .config import CONFIG, Endpoint, endpoint
from .errors import ConnectionFailed, InterposeError, InvalidPayload
from .graph.model import Graph
from .progress import Progress
from .transports.base import Transport
from .transports.loop import background
from .wire.fields import check_job
from .wire.result import Saved
from .wire.status import JobStatus
from .wire.stream import Changed, Happening, Logged, ModelState, Moved, NewTokens, reason
from .wire.submission import Submission
from .wire.tensors import Backend, Encoded

_CANCEL_S = 3.0
_TICK_S = 0.2


@dataclass(frozen=True, slots=True)
class JobInfo:
    """What the server says of a job when asked. `created_ms` counts from 1970, UTC.

    A moment's news: `attach()` gives the job itself, to be followed.
    """

    id: str
    model: str
    status: JobStatus
    position: int | None = None
    attempt: int = 0
    created_ms: int | None = None
    error: InterposeError | None = None
    server: Endpoint | None = field(default=None, repr=False, compare=False)

    def attach(self) -> Job:
        """The job, followed from now on. Raises UnknownJob if its result has expired."""
        if self.server is None:
            return Job.attach(self.id)
        return Job.attach(self.id, host=self.server.url, api_key=self.server.key)

    def result(self, timeout: float | None = None) -> dict[int, Any]:
        """Wait for its end; as of the job itself."""
        return self.attach().result(timeout)

    def cancel(self) -> None:
        """Ask the server to end it."""
        self.attach().cancel()

    @classmethod
    def from_plain(cls, plain: Any, server: Endpoint | None = None) -> JobInfo:
        """Fields this client doesn't know are passed over. Raises InvalidPayload."""
        try:
            status, error = JobStatus(plain["status"]), plain.get("error")
            return cls(
                id=check_job(plain["id"]),
                model=str(plain["model"]),
                status=status,
                position=plain.get("position"),
                attempt=plain.get("attempt") or 0,
                created_ms=plain.get("created_ms"),
                error=reason(status, error),
                server=server,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise InvalidPayload(f"the server describes a job in an unknown form: {problem!r}") from problem


def job_info(server: Endpoint, job: str) -> JobInfo:
    """What the server says of one job. Raises UnknownJob."""
    from .transports.http import body_of
    from .transports.remote import get

    return JobInfo.from_plain(body_of(get(server, f"/v1/jobs/{check_job(job)}")), server)


def transport_to(server: Endpoint) -> Transport:
    # Its libraries take long to import, and a local user needs none of them.
    from .transports.remote import remote

    return remote(server)


class Ended:
    """The last thing a listener hears."""


ENDED = Ended()
Listener: TypeAlias = Callable[["Happening | Ended"], None]


class Job:
    """One job, followed in the background from the moment it is submitted or attached to.

        job.status                       # as the server last said
        values = job.result(timeout=60)  # waits; node id -> value
        values = await job
        async for event in job: ...      # everything from the beginning, then live
        job.cancel()

    Safe to use from several threads, from any event loop, and after a fork.
    """

    def __init__(
        self,
        job: str,
        model: str,
        transport: Callable[[], Transport],
        *,
        graph: Graph | None = None,
        status: JobStatus = JobStatus.QUEUED,
    ) -> None:
        """`transport` gives the current process's; `graph`, where known, names the lines of errors."""
        self.id = job
        self.model = model
        self.position: int | None = None
        self.model_state: str | None = None
        """Of a job that waits for its model to be loaded: how that is, as "cold" or "loading"."""
        self.attempt = 0
        self._status = status
        self._transport = transport
        self._graph = graph
        self._error: InterposeError | None = None
        self._saves: dict[int, Saved] = {}
        self._values: dict[int, Any] | None = None
        self._lock = threading.Lock()
        self._past: list[Happening] = []
        self._listeners: list[Listener] = []
        self._ended = False
        self._pid: int | None = None
        self._task: Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Job {self.id} on {self.model}: {self.status}>"

    @property
    def status(self) -> JobStatus:
        """The state the server last told of. Never waits."""
        return self._status

    @property
    def error(self) -> InterposeError | None:
        """Why it ended without a result, once it has."""
        return self._error

    @classmethod
    def attach(cls, job: str, *, host: str | None = None, api_key: str | None = None) -> Job:
        """A job submitted before, perhaps by another process, with the same key.

        Raises:
            UnknownJob: there is no such job, or its result has expired.
        """
        server = endpoint(host, api_key)
        found = _followed.get((os.getpid(), server, job))
        if found is None:
            info = job_info(server, job)
            found = cls(job, info.model, partial(transport_to, server), status=info.status)
            found.position = info.position
            remember(server, found)
            found.follow()
        return found

    def submit(self, submission: Submission, attachments: Mapping[str, Encoded]) -> None:
        """Hand it in; returns once it is accepted. Raises InterposeError if it isn't."""
        own = background()
        transport = self._transport()
        own.run(transport.submit(submission, attachments))
        self.follow()

    def begin(self, submission: Submission, attachments: Mapping[str, Encoded]) -> None:
        """Hand it in without waiting; whether it was accepted shows in `result`."""
        self._pid = os.getpid()
        self._task = background().start(self._watch(self._transport(), submission, attachments))

    def follow(self) -> None:
        """Start following, unless this process does already."""
        if self._pid != os.getpid():
            # In a forked child the lock may be held by a thread that isn't here.
            self._lock = threading.Lock()
        with self._lock:
            if self._ended or self._pid == os.getpid():
                return
            self._pid = os.getpid()
            self._past.clear()
            self._listeners.clear()
            self._saves.clear()
        self._task = background().start(self._watch(self._transport(), None, {}))

    def result(self, timeout: float | None = None) -> dict[int, Any]:
        """Wait for the end; the saved values by node id.

        Args:
            timeout: seconds to wait; the job goes on if they pass.

        Raises:
            TimeoutError: it hasn't ended yet.
            InterposeError: why it failed; JobCancelled if it was cancelled.
        """
        if self._values is not None:
            return self._values
        with Progress() as progress:
            self.wait(progress.show, timeout)
        return self.values()

    def wait(self, tell: Callable[[Happening | None], None], timeout: float | None = None) -> None:
        """Block until it has ended, telling of each event in the calling thread, and now and then of None.

        Raises:
            TimeoutError: it hasn't ended within `timeout` seconds.
        """
        events: queue.SimpleQueue[Happening | Ended] = queue.SimpleQueue()
        deadline = None if timeout is None else time.monotonic() + timeout
        stop = self._listen(events.put)
        try:
            while not isinstance(event := _next(events, deadline), Ended):
                tell(event)
                if event is None and deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"the job is still {self.status} after {timeout} s; it goes on, ask again")
        finally:
            stop()

    def cancel(self) -> None:
        """Ask the server to end it. Harmless once it has ended."""
        if not self._status.terminal:
            background().run(self._transport().cancel(self.id))

    def interrupt(self) -> None:
        """Stop following and cancel, as after Ctrl-C: try for a moment, and raise nothing of ours."""
        if self._task is not None:
            self._task.cancel()
        with suppress(InterposeError, TimeoutError):
            background().run(self._transport().cancel(self.id), _CANCEL_S)

    def release(self) -> None:
        """Tell the server that everything arrived and need not be kept."""
        background().start(self._transport().release(self.id))

    def __await__(self) -> Generator[Any, None, dict[int, Any]]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> dict[int, Any]:
        async for _ in self:
            pass
        return self.values()

    async def __aiter__(self) -> AsyncIterator[Happening]:
        """Events from the beginning on, in the caller's own loop. How it ended is told by the last `Changed`."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Happening | Ended] = asyncio.Queue()

        def put(event: Happening | Ended) -> None:
            # The caller's loop may have ended without closing this iterator.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        stop = await asyncio.to_thread(self._listen, put)
        try:
            while not isinstance(event := await events.get(), Ended):
                yield event
        finally:
            stop()

    def _listen(self, listener: Listener) -> Callable[[], None]:
        """Tell the past, then the present. Returns what ends it."""
        self.follow()
        with self._lock:
            for event in self._past:
                listener(event)
            if self._ended:
                listener(ENDED)
            else:
                self._listeners.append(listener)

        def stop() -> None:
            with self._lock, suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    async def _watch(
        self, transport: Transport, submission: Submission | None, attachments: Mapping[str, Encoded]
    ) -> None:
        """In the background: hand in if asked to, then follow to the end."""
        accepted = False
        try:
            if submission is not None:
                await transport.submit(submission, attachments)
            accepted = True
            async with aclosing(transport.follow(self.id)) as events:
                async for event in events:
                    self._tell(event)
        except ConnectionFailed as error:
            self._error = self._lost(error) if accepted else error
        except InterposeError as error:
            self._error = error
        except asyncio.CancelledError:
            self._error = self._error or ConnectionFailed(
                "this process closed its connections before the job ended"
            )
            raise
        finally:
            with self._lock:
                self._ended = True
                for listener in self._listeners:
                    listener(ENDED)
                self._listeners.clear()

    def _lost(self, error: ConnectionFailed) -> ConnectionFailed:
        """The same, with what can be done: a server that is back still has the job."""
        again = f"once the server is back, interpose.Job.attach({self.id!r}).result() waits for it again"
        details = {**error.details, "job": self.id}
        return ConnectionFailed(f"{error.message} The job isn't lost: {again}", details=details)

    def _tell(self, event: Happening) -> None:
        with self._lock:
            self._apply(event)
            if isinstance(event, (Changed, Saved, Logged, NewTokens)):
                self._past.append(event)
            for listener in self._listeners:
                listener(event)

    def _apply(self, event: Happening) -> None:
        if isinstance(event, Saved):
            self._saves[event.node] = event
        elif isinstance(event, Moved):
            self.position = event.position
        elif isinstance(event, ModelState):
            self.model_state = None if event.state == "ready" else event.state
        elif isinstance(event, Changed):
            if event.attempt > self.attempt:
                self.attempt = event.attempt
                self._saves.clear()
                self._past = [past for past in self._past if not isinstance(past, (Saved, NewTokens))]
            self._status = event.status
            if event.status is not JobStatus.QUEUED:
                self.position = self.model_state = None
            self._error = reason(event.status, event.error)

    def values(self) -> dict[int, Any]:
        """The saved values of a job that has ended; made once, by whoever asks first. Raises its error."""
        if self._error is not None:
            raise self._placed(self._error)
        with self._lock:
            if self._values is None:
                chosen = backend()
                self._values = {node: saved.value(chosen) for node, saved in self._saves.items()}
            return self._values

    def _placed(self, error: InterposeError) -> InterposeError:
        """The error with the user's line, which only this side knows."""
        nodes = self._graph.nodes if self._graph is not None else ()
        if error.source is None and error.node is not None and 0 <= error.node < len(nodes):
            error.source = nodes[error.node].source
        return error


_followed: weakref.WeakValueDictionary[tuple[int, Endpoint, str], Job] = weakref.WeakValueDictionary()
"""Jobs this process (by its id) follows already: one follower each. Those in progress are held by their tasks."""


def remember(server: Endpoint, job: Job) -> None:
    """Attaching to a job that this process submitted gives the same job."""
    _followed[os.getpid(), server, job.id] = job


def _next(events: queue.SimpleQueue[Happening | Ended], deadline: float | None) -> Happening | Ended | None:
    """The next event, or None after a moment without one."""
    left = _TICK_S if deadline is None else min(max(deadline - time.monotonic(), 0), _TICK_S)
    try:
        return events.get(timeout=left)
    except queue.Empty:
        return None


def backend() -> Backend:
    """The library of results: `CONFIG.BACKEND`, "auto" being torch where it is installed."""
    wanted = CONFIG.BACKEND
    if wanted == "auto":
        return "torch" if importlib.util.find_spec("torch") is not None else "numpy"
    return "torch" if wanted == "torch" else "numpy"
