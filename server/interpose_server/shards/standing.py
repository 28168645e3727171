"""A shard's end of the link: it serves forwards and backwards in the order in which they come, and errands.

One thread computes, another runs errands, so no shard ever waits for one that waits for it; connections are read
by threads that only pass on. What computes may ask home, and by home another shard, and wait for the answer; an
errand never does. It ends when home does.
"""

from __future__ import annotations

import itertools
import logging
import queue
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from interpose.errors import InterposeError, InvalidPayload, ReplicaLost, Unauthorized
from interpose.runtime.split.route import HOME, Nest
from interpose.runtime.split.station import Station, Stop, asking

from .channel import Channel
from .faults import raised, told
from .frames import Frame, Kind
from .greeting import checked
from .strangers import Strangers

log = logging.getLogger(__name__)

Task: TypeAlias = Callable[[], None]

SILENCE_S = 60.0
"""Home asks for a sign of life every second. One that is silent for so long is gone."""
_REMEMBERED = 4096
_AT_ONCE = 64
"""Connections that haven't proved yet whose they are."""


class Standing:
    """One shard, listening.

    Args:
        station: what it does.
        host, port: where; port 0 takes a free one.
        device: where tensors go that were on an accelerator.
        silence_s: so long without a word of home, and it ends.
    """

    def __init__(
        self,
        site: int,
        secret: bytes,
        station: Station,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        device: torch.device | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.site = site
        self.ended = threading.Event()
        self._secret = checked(secret)
        self._stop = Stop(site, station)
        self._device = device
        self._silence_s = silence_s
        self._listener = socket.create_server((host, port), backlog=16)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._lock = threading.Lock()
        self._strangers = Strangers(_AT_ONCE)
        self._channels: dict[int, Channel] = {}
        self._addresses: dict[int, tuple[str, int]] = {}
        self._halves: dict[int, dict[Kind, Frame]] = {}
        """Calls of which either the work or the parcel has come."""
        self._questions = itertools.count(1)
        self._asked: dict[int, Future[Frame]] = {}
        """What home was asked and hasn't answered."""
        self._dropped: OrderedDict[int, None] = OrderedDict()
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._errands: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._since: float | None = None
        """When what is being computed began."""
        for name, run in (("compute", self._compute), ("errands", self._run_errands), ("accept", self._accept)):
            threading.Thread(target=run, name=name, daemon=True).start()

    def wait(self) -> None:
        """Until home is gone, or `close`."""
        while not self.ended.wait(min(self._silence_s / 4, 1.0)):
            home = self._channels.get(HOME)
            if home is not None and time.monotonic() - home.heard_at > self._silence_s:
                log.error("home has given no sign of life for %.0f s", self._silence_s)
                self.close()

    def close(self) -> None:
        self.ended.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or it would go on waiting for the next
        self._listener.close()
        for channel in [*self._channels.values()]:
            channel.close()
        self._tasks.put(None)
        self._errands.put(None)
        with self._lock:
            asked = [*self._asked.values()]
            self._asked.clear()
        for answer in asked:
            answer.set_exception(ReplicaLost("home is gone"))

    # -- connections -------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self.ended.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError:
                return
            # Each greets on a thread of its own: a stranger who keeps still holds up nobody.
            self._strangers.come(sock, address[0])
            threading.Thread(target=self._greet, args=(sock,), name="greet", daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        try:
            channel = Channel.answer(sock, self._secret, self.site)
        except (OSError, Unauthorized) as error:
            self._strangers.leave(sock)
            log.warning("a stranger was turned away: %s", error)
            return
        if self._strangers.leave(sock):
            self._welcome(channel)
        else:
            channel.close()  # it had to go while it proved itself

    def _welcome(self, channel: Channel) -> None:
        with self._lock:
            if channel.peer == HOME and HOME in self._channels:
                log.warning("a second home was turned away")
                channel.close()
                return
            self._channels.setdefault(channel.peer, channel)
        channel.listen(self._take, self._lost)

    def _lost(self, channel: Channel, why: str) -> None:
        """A connection ended."""
        if self.ended.is_set():
            return
        if channel.peer == HOME:
            if self._channels.get(HOME) is channel:
                self.close()
            return
        # What it had sent, or was to get, may be lost with it.
        self._fail(0, ReplicaLost(f"shard {self.site} has lost shard {channel.peer}: {why}"))

    def _to(self, site: int) -> Channel:
        """The way to another site. Raises ReplicaLost."""
        with self._lock:
            found = self._channels.get(site)
        if found is None:
            if site not in self._addresses:
                raise ReplicaLost(f"shard {self.site} knows no way to site {site}")
            found = Channel.dial(self._addresses[site], self._secret, self.site, site)
            self._welcome(found)
        return found

    # -- what comes --------------------------------------------------------------------------------------------

    def _take(self, channel: Channel, frame: Frame) -> None:
        match frame.kind:
            case Kind.VISIT | Kind.PARCEL:
                self._pair(frame, Kind.VISIT, Kind.PARCEL, self._forward)
            case Kind.WAVE | Kind.EBB:
                self._pair(frame, Kind.WAVE, Kind.EBB, self._backward)
            case Kind.ERRAND:
                self._errands.put(lambda: self._errand(channel, frame))
            case Kind.DONE | Kind.FAILED if channel.peer == HOME:
                with self._lock:
                    answer = self._asked.pop(frame.call, None)
                if answer is not None:
                    answer.set_result(frame)
            case Kind.DROP:
                self._forget(frame)
            case Kind.PING:
                since = self._since
                busy_s = 0.0 if since is None else time.monotonic() - since
                channel.send(Kind.PONG, 0, [busy_s, self._tasks.qsize()])
            case Kind.JOIN:
                self._errands.put(lambda: self._join(channel, frame))
            case _:
                raise InvalidPayload(f"site {channel.peer} said {frame.kind.name}")

    def _pair(self, frame: Frame, work: Kind, load: Kind, run: Callable[[Frame, Frame], None]) -> None:
        """Its work comes from home, what it works on from the site before; whichever is later sets it off."""
        with self._lock:
            if frame.call in self._dropped:
                return
            halves = self._halves.setdefault(frame.call, {})
            halves[frame.kind] = frame
            if len(halves) < 2:
                return
            del self._halves[frame.call]
        self._tasks.put(lambda: self._attempt(frame.call, lambda: run(halves[work], halves[load])))

    def _forget(self, frame: Frame) -> None:
        calls, numbers, caches = _fields(frame.open(), 3)
        with self._lock:
            for call in calls:
                self._halves.pop(call, None)
                self._dropped[call] = None
            while len(self._dropped) > _REMEMBERED:
                self._dropped.popitem(last=False)
        self._tasks.put(lambda: self._attempt(0, lambda: self._stop.drop(numbers, caches)))

    # -- what is done ------------------------------------------------------------------------------------------

    def _compute(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._since = time.monotonic()
            with asking(self._ask):
                task()
            del task  # and all that it holds, while the next is waited for
            self._since = None

    def _run_errands(self) -> None:
        while (task := self._errands.get()) is not None:
            task()
            del task

    def _attempt(self, call: int, work: Task) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever the model raises is raised where it was called
            self._fail(call, error)

    def _fail(self, call: int, error: Exception) -> None:
        try:
            self._to(HOME).send(Kind.FAILED, call, told(self.site, error))
        except InterposeError:
            log.info("home is gone")
        if not isinstance(error, (InterposeError, torch.OutOfMemoryError)):
            self._sound()

    def _sound(self) -> None:
        """A device that an error left broken fails whatever comes next: only another process can go on."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            try:
                torch.cuda.synchronize()
            except (RuntimeError, torch.AcceleratorError):
                log.exception("the device is broken")
                self.close()

    def _forward(self, work: Frame, load: Frame) -> None:
        number, route, visit, straight = _fields(work.open(self._device), 4)
        hidden, mail, replied = _fields(load.open(self._device), 3)
        result, reply, leaving = self._stop.forward(number, hidden, visit, [*straight, *mail])
        visited = route[: route.index(self.site) + 1]
        if reply is not None:
            replied = [*replied, self.site]
        if result is None or len(visited) == len(route):
            self._to(HOME).send(Kind.LANDED, work.call, [[result, leaving, visited], replied])
        else:
            self._to(route[len(visited)]).send(Kind.PARCEL, work.call, [result, leaving, replied])
        if reply is not None:
            self._to(HOME).send(Kind.REPLY, work.call, [self.site, reply])

    def _backward(self, work: Frame, load: Frame) -> None:
        number, route, asked, straight = _fields(work.open(self._device), 4)
        gradients, mail, replied = _fields(load.open(self._device), 3)
        found, reply, leaving = self._stop.backward(number, gradients, asked, [*straight, *mail])
        after = route[route.index(self.site) + 1 :]
        if reply is not None:
            replied = [*replied, self.site]
        if after:
            self._to(after[0]).send(Kind.EBB, work.call, [found, leaving, replied])
        else:
            self._to(HOME).send(Kind.EBBED, work.call, [[found, leaving], replied])
        if reply is not None:
            self._to(HOME).send(Kind.REPLY, work.call, [self.site, reply])

    def _errand(self, home: Channel, frame: Frame) -> None:
        def run() -> None:
            name, request = _fields(frame.open(self._device), 2)
            home.send(Kind.DONE, frame.call, self._stop.station.errand(name, request))

        self._attempt(frame.call, run)

    def _ask(self, site: int, name: str, request: Nest) -> Nest:
        """Have another site do an errand, on the thread that computes. Raises what it raises, and ReplicaLost."""
        number, answer = next(self._questions), Future[Frame]()
        with self._lock:
            self._asked[number] = answer
        try:
            if self.ended.is_set():
                raise ReplicaLost("home is gone")
            self._to(HOME).send(Kind.ERRAND, number, [site, name, request])
            frame = answer.result()
        finally:
            with self._lock:
                self._asked.pop(number, None)
        content = frame.open(self._device)
        if frame.kind is Kind.FAILED:
            raise raised(content)
        return content

    def _join(self, home: Channel, frame: Frame) -> None:
        def run() -> None:
            self._addresses = {site: (host, port) for site, host, port in frame.open()}
            if self.site + 1 in self._addresses:
                self._to(self.site + 1)
            home.send(Kind.JOINED, frame.call, None)

        self._attempt(frame.call, run)


def _fields(content: Any, length: int) -> list[Any]:
    if not isinstance(content, list) or len(content) != length:
        raise InvalidPayload("a site said something malformed")
    return content
