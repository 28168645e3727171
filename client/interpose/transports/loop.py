"""The process's background event loop: one thread, started by whoever needs it first.

The async core runs here; the sync API waits for it. Works beside a loop the user runs (a notebook's), in a forked
child (which gets a loop of its own), and ends with the interpreter.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from ..errors import InterposeError

T = TypeVar("T")

_CLOSING_S = 2.0


class Background:
    """The thread and its loop.

    Attributes:
        kept: what lives as long as this loop does, such as connections; a forked child starts with nothing.
        closers: awaited before the loop ends.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.kept: dict[Any, Any] = {}
        self.closers: list[Callable[[], Awaitable[None]]] = []
        self.thread = threading.Thread(target=self.loop.run_forever, name="interpose", daemon=True)
        self.thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Wait for it. It is cancelled if the wait is interrupted or takes too long."""
        if threading.current_thread() is self.thread:
            work.close()
            raise RuntimeError("a blocking call inside an event callback would wait for itself; await it instead")
        future = self.start(work)
        try:
            return future.result(timeout)
        except InterposeError as error:
            raise error.with_traceback(None) from error.__cause__  # the loop's own frames tell its user nothing
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Close what is open and end the thread, within about two seconds."""
        ending = self.start(self._finish())
        try:
            ending.result(_CLOSING_S)
        except TimeoutError:
            pass
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(_CLOSING_S)
        if not self.thread.is_alive():
            self.loop.close()

    async def _finish(self) -> None:
        await asyncio.gather(*(closer() for closer in self.closers), return_exceptions=True)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.loop.shutdown_asyncgens()


class _Holder:
    """The current background, and those of parents: never finalised here, since their sockets are the parent's."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.current: Background | None = None
        self.parents: list[Background] = []
        self.watching = False

    def get(self) -> Background:
        with self.lock:
            if self.current is None:
                if not self.watching:
                    self.watching = True
                    os.register_at_fork(after_in_child=self._forked)
                    atexit.register(self.close)
                self.current = Background()
            return self.current

    def _forked(self) -> None:
        self.lock = threading.Lock()
        if self.current is not None:
            self.parents.append(self.current)
            self.current = None

    def close(self) -> None:
        with self.lock:
            current, self.current = self.current, None
        if current is not None:
            current.close()


_holder = _Holder()


def background() -> Background:
    """This process's background loop, started if need be."""
    return _holder.get()
