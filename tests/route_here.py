"""A route within one process: shards on several devices, or beside one another, each with its compute thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

from interpose.errors import InternalError
from interpose.runtime.split.mapping import Swapped, leaf, readdressed
from interpose.runtime.split.route import HOME, Landing, Mail, Nest, Visit
from interpose.runtime.split.station import Station, Stop, asking
from torch import Tensor

_Task = Callable[[], None]


class Thread:
    """One thread that does what it is given, in order. Giving takes no lock: a finalizer may do it anywhere."""

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def post(self, task: _Task) -> None:
        """Have something done that raises nothing; don't wait."""
        self._tasks.put(task)

    def run(self, task: Callable[[], Any]) -> Any:
        """What a task returns, or raises."""
        future: Future[Any] = Future()
        self._tasks.put(partial(_settle, future, task))
        try:
            return future.result()
        finally:
            # An error's frames hold the future that holds the error.
            del future

    def close(self) -> None:
        """Do what was given before, and end. Waits for that, but on the thread itself."""
        self._tasks.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task


def _settle(future: Future[Any], task: Callable[[], Any]) -> None:
    try:
        future.set_result(task())
    except BaseException as error:  # noqa: BLE001 - raised where it is waited for
        future.set_exception(error)


def _close(threads: Sequence[Thread]) -> None:
    for thread in threads:
        thread.close()


class _Asked:
    """Does errands on the thread of whoever asks."""

    def __init__(self, stops: Mapping[int, Stop]) -> None:
        self.home: Callable[[str, Nest], Nest] | None = None
        self._stops = stops

    def __call__(self, site: int, name: str, request: Nest) -> Nest:
        errand = self.home if site == HOME else self._stops[site].station.errand
        if errand is None:
            raise InternalError("home does no errands yet")
        with asking(None):
            return errand(name, request)


class Here:
    """A `Route` whose shards are in this process.

    Args:
        sites: path of a block -> its site.
        stations: site -> shard.
    """

    def __init__(self, sites: Mapping[str, int], stations: Mapping[int, Station]) -> None:
        self.sites = sites
        self._stops = {site: Stop(site, station) for site, station in stations.items()}
        self._threads = {site: Thread(f"interpose-shard-{site}") for site in stations}
        self._ways: dict[int, list[int]] = {}
        self._asked = _Asked(self._stops)
        self._end = weakref.finalize(self, _close, [*self._threads.values()])

    def forward(self, number: int, hidden: Tensor, visits: Sequence[Visit], mail: Sequence[Mail]) -> Landing:
        """Go by the shards of `visits`, in order."""
        replies: dict[int, Nest] = {}
        letters = [*mail]
        result: Tensor | None = hidden
        way: list[int] = []
        try:
            for visit in visits:
                assert result is not None
                border = Swapped(leaf)
                result, letters = border(result), readdressed(letters, border)
                way.append(visit.site)
                stop = self._stops[visit.site]
                serve = partial(stop.forward, number, result, visit, letters)
                result, replies[visit.site], letters = self._serve(visit.site, serve)
                if result is None:
                    break
        except BaseException:
            self.drop([number])
            raise
        if any(visit.grad for visit in visits):
            self._ways[number] = way
        return Landing(result, tuple(letters), replies)

    def backward(
        self, number: int, gradients: Sequence[Tensor | None], work: Mapping[int, Nest], mail: Sequence[Mail]
    ) -> tuple[Sequence[Tensor | None], Landing]:
        """Go back by the shards of that forward."""
        replies: dict[int, Nest] = {}
        letters, back = [*mail], gradients
        for site in reversed(self._ways[number]):
            serve = partial(self._stops[site].backward, number, back, work.get(site), letters)
            back, replies[site], letters = self._serve(site, serve)
        return back, Landing(None, tuple(letters), replies)

    def _serve(self, site: int, task: Callable[[], Any]) -> Any:
        """Have a shard do something in which it may ask others."""

        def run() -> Any:
            with asking(self._asked):
                return task()

        return self._threads[site].run(run)

    def errand(self, site: int, name: str, request: Nest) -> Nest:
        """On the caller's own thread."""
        return self._asked(site, name, request)

    def answer(self, errand: Callable[[str, Nest], Nest]) -> None:
        self._asked.home = errand

    def drop(self, numbers: Sequence[int] = (), caches: Sequence[int] = ()) -> None:
        """Forget forwards and caches, each shard when it has done what it was given before."""
        for number in numbers:
            self._ways.pop(number, None)
        for site, stop in self._stops.items():
            self._threads[site].post(partial(stop.drop, numbers, caches))

    def close(self) -> None:
        """End the threads; done as well when nobody has this any more, and before the interpreter ends."""
        self._end()
