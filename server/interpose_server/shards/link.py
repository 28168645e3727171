"""The way to shards in other processes: home's end. Hidden states go from shard to shard, the last sends them home.

A call (a forward, a backward, an errand) waits on the thread that makes it; several may be under way. A shard that
is gone, or silent for too long, ends them all at once with ReplicaLost, and every later one.

Shards ask, too, while they serve a forward or a backward. Each has a thread here that answers it, which waits for
nobody but another shard's errands; and those wait for nobody.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from interpose.errors import InternalError, InterposeError, InvalidPayload, ReplicaLost
from interpose.runtime.split.route import HOME, Landing, Mail, Nest, Visit
from interpose.runtime.split.station import tracked
from torch import Tensor

from .channel import Channel
from .faults import raised, told
from .frames import Frame, Kind

log = logging.getLogger(__name__)

Address: TypeAlias = tuple[str, int]
Inbox: TypeAlias = "queue.SimpleQueue[Frame | None]"

BEAT_S = 1.0
SILENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Health:
    """A shard as last heard of.

    Attributes:
        silent_s: since then.
        busy_s: how long it had computed at one thing by then.
        waiting: how many more it had to do.
    """

    silent_s: float
    busy_s: float = 0.0
    waiting: int = 0


class Link:
    """A `Route` to shards that listen somewhere.

    Args:
        secret: of this replica.
        addresses: site -> where it listens.
        sites: path of a block -> its site.
        device: where tensors go that were on an accelerator.
        beat_s, silence_s: how often a shard is asked for a sign of life, and how long it may keep still.

    Raises:
        ReplicaLost: one can't be reached, or they can't reach one another.
        Unauthorized: whoever listens there is of another replica.
    """

    def __init__(
        self,
        secret: bytes,
        addresses: Mapping[int, Address],
        sites: Mapping[str, int],
        device: torch.device | None = None,
        *,
        beat_s: float = BEAT_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.sites: Mapping[str, int] = dict(sites)
        self._device = device
        self._beat_s, self._silence_s = beat_s, silence_s
        self._calls = itertools.count(1)
        self._inboxes: dict[int, Inbox] = {}
        self._lost: ReplicaLost | None = None
        self._paths: dict[int, list[int]] = {}
        """Forward -> the shards it came by, where a backward may follow."""
        self._health: dict[int, tuple[float, int]] = {}
        # A plain queue, as whoever lets go of a cache may be the garbage collector, in the middle of anything.
        self._dropped: queue.SimpleQueue[tuple[list[int], ...] | None] = queue.SimpleQueue()
        self._channels: dict[int, Channel] = {}
        self._own: Callable[[str, Nest], Nest] | None = None
        """What home does for shards."""
        # A shard computes one thing at a time, so no question waits for another's answer.
        self._answering = ThreadPoolExecutor(max(len(addresses), 1), "answers")
        try:
            for site, address in sorted(addresses.items()):
                self._channels[site] = Channel.dial(address, secret, HOME, site)
            for channel in self._channels.values():
                channel.listen(self._take, self._ended)
            self._join(addresses)
        except InterposeError:
            self.close()
            raise
        self._keeper = threading.Thread(target=self._keep, name="link", daemon=True)
        self._keeper.start()

    def _join(self, addresses: Mapping[int, Address]) -> None:
        with self._call() as (call, inbox):
            for channel in self._channels.values():
                channel.send(Kind.JOIN, call, [[site, host, port] for site, (host, port) in addresses.items()])
            for _ in addresses:
                self._next(inbox, Kind.JOINED)

    # -- calls -------------------------------------------------------------------------------------------------

    def forward(self, number: int, hidden: Tensor, visits: Sequence[Visit], mail: Sequence[Mail]) -> Landing:
        route = [visit.site for visit in visits]
        # What asks for gradients goes from site to site, as they come back; the rest needn't.
        along, straight = list[Mail](), list[Mail]()
        for letter in mail:
            (along if letter.to not in route or tracked(None, [letter]) else straight).append(letter)
        if not route:
            return Landing(hidden, tuple(mail))
        with self._call(number) as (call, inbox):
            for visit in visits:
                own = [letter for letter in straight if letter.to == visit.site]
                self._send(visit.site, Kind.VISIT, call, [number, route, visit, own])
            self._send(route[0], Kind.PARCEL, call, [hidden, along, []])
            landed, replies = self._gather(inbox, Kind.LANDED)
            result, left, visited = _fields(landed, 3)
        if len(visited) < len(route):
            self._dropped.put(([call], [], []))
        if any(visit.grad for visit in visits):
            self._paths[number] = visited
        return Landing(result, tuple(left), replies)

    def backward(
        self, number: int, gradients: Sequence[Tensor | None], work: Mapping[int, Nest], mail: Sequence[Mail]
    ) -> tuple[Sequence[Tensor | None], Landing]:
        route = self._paths[number][::-1]
        with self._call() as (call, inbox):
            for site in route:
                own = [letter for letter in mail if letter.to == site]
                self._send(site, Kind.WAVE, call, [number, route, work.get(site), own])
            others = [letter for letter in mail if letter.to not in route]
            self._send(route[0], Kind.EBB, call, [list(gradients), others, []])
            ebbed, replies = self._gather(inbox, Kind.EBBED)
            found, left = _fields(ebbed, 2)
        return found, Landing(None, tuple(left), replies)

    def errand(self, site: int, name: str, request: Nest) -> Nest:
        with self._call() as (call, inbox):
            self._send(site, Kind.ERRAND, call, [name, request])
            return self._next(inbox, Kind.DONE)[1]

    def answer(self, errand: Callable[[str, Nest], Nest]) -> None:
        self._own = errand

    def drop(self, numbers: Sequence[int] = (), caches: Sequence[int] = ()) -> None:
        for number in numbers:
            self._paths.pop(number, None)
        self._dropped.put(([], list(numbers), list(caches)))

    # -- how the shards are ------------------------------------------------------------------------------------

    @property
    def lost(self) -> ReplicaLost | None:
        """Why this replica can't go on, if it can't."""
        return self._lost

    def check(self) -> None:
        """Raises ReplicaLost if a shard is gone."""
        if self._lost is not None:
            raise ReplicaLost(self._lost.message)

    def health(self) -> dict[int, Health]:
        now = time.monotonic()
        return {
            site: Health(now - channel.heard_at, *self._health.get(site, (0.0, 0)))
            for site, channel in self._channels.items()
        }

    def close(self) -> None:
        """Let the shards go: each ends when home does."""
        self._lose("the link was closed")
        self._dropped.put(None)

    # -- within ------------------------------------------------------------------------------------------------

    @contextmanager
    def _call(self, number: int | None = None) -> Iterator[tuple[int, Inbox]]:
        """A call's number and where its frames come. If it fails, nothing stays of it, nor of that forward."""
        call, inbox = next(self._calls), queue.SimpleQueue[Frame | None]()
        self._inboxes[call] = inbox
        try:
            self.check()
            yield call, inbox
        except BaseException:
            self._dropped.put(([call], [] if number is None else [number], []))
            raise
        finally:
            del self._inboxes[call]

    def _send(self, site: int, kind: Kind, call: int, nest: Any) -> None:
        try:
            self._channels[site].send(kind, call, nest)
        except ReplicaLost as error:
            self._lose(error.message)
            raise

    def _next(self, inbox: Inbox, *due: Kind) -> tuple[Kind, Any]:
        """The next frame of a call, and what it holds. Raises what a shard raised, and ReplicaLost."""
        frame = inbox.get()
        if frame is None:
            self.check()
            raise ReplicaLost("the link was closed")
        content = frame.open(self._device)
        if frame.kind is Kind.FAILED:
            raise raised(content)
        if frame.kind not in due:
            raise InvalidPayload(f"a shard said {frame.kind.name} where {due[0].name} was due")
        return frame.kind, content

    def _gather(self, inbox: Inbox, end: Kind) -> tuple[Any, dict[int, Nest]]:
        """Wait for the last frame of a call, and for all replies. Returns what it says, and these by site."""
        last: Any = None
        replies: dict[int, Nest] = {}
        expected: set[int] | None = None
        while expected is None or expected - replies.keys():
            kind, content = self._next(inbox, end, Kind.REPLY)
            first, second = _fields(content, 2)
            if kind is Kind.REPLY:
                replies[first] = second
            else:
                last, expected = first, set(second)
        return last, replies

    def _take(self, channel: Channel, frame: Frame) -> None:
        if frame.kind is Kind.PONG:
            busy_s, waiting = _fields(frame.open(), 2)
            self._health[channel.peer] = float(busy_s), int(waiting)
        elif frame.kind is Kind.ERRAND:
            with suppress(RuntimeError):  # the link was closed, and the shard ends with it
                self._answering.submit(self._answer, channel, frame)
        elif frame.kind is Kind.FAILED and not frame.call:
            self._lose(str(raised(frame.open())))
        elif (inbox := self._inboxes.get(frame.call)) is not None:
            inbox.put(frame)

    def _answer(self, shard: Channel, frame: Frame) -> None:
        """Do what a shard asks for. Whatever goes wrong is raised there."""
        with suppress(ReplicaLost):
            try:
                site, name, request = _fields(frame.open(self._device), 3)
                shard.send(Kind.DONE, frame.call, self._asked(site, name, request))
            except Exception as error:  # noqa: BLE001
                shard.send(Kind.FAILED, frame.call, told(HOME, error))

    def _asked(self, site: int, name: str, request: Nest) -> Nest:
        if site != HOME:
            return self.errand(site, name, request)
        if self._own is None:
            raise InternalError("home does no errands yet")
        return self._own(name, request)

    def _ended(self, channel: Channel, why: str) -> None:
        self._lose(f"shard {channel.peer} is gone: {why}")

    def _lose(self, why: str) -> None:
        if self._lost is None:
            self._lost = ReplicaLost(why)
        for channel in self._channels.values():
            channel.close()
        for inbox in list(self._inboxes.values()):
            inbox.put(None)
        self._answering.shutdown(wait=False, cancel_futures=True)

    def _keep(self) -> None:
        """Carry out drops, and ask for signs of life."""
        due = time.monotonic()
        while self._lost is None:
            try:
                self._drop(max(due - time.monotonic(), 0.0))
                if time.monotonic() >= due:
                    due = time.monotonic() + self._beat_s
                    self._listen()
            except ReplicaLost as error:
                self._lose(error.message)

    def _drop(self, wait_s: float) -> None:
        try:
            found = self._dropped.get(timeout=wait_s)
        except queue.Empty:
            return
        calls, numbers, caches = found or ([], [], [])
        while not self._dropped.empty():
            more = self._dropped.get()
            for some, others in zip((calls, numbers, caches), more or (), strict=False):
                some += others
        if calls or numbers or caches:
            for channel in self._channels.values():
                channel.send(Kind.DROP, 0, [calls, numbers, caches])

    def _listen(self) -> None:
        for channel in self._channels.values():
            silent_s = time.monotonic() - channel.heard_at
            if silent_s > self._silence_s:
                raise ReplicaLost(f"shard {channel.peer} has given no sign of life for {silent_s:.0f} s")
            channel.offer(Kind.PING)


def _fields(content: Any, length: int) -> list[Any]:
    if not isinstance(content, list) or len(content) != length:
        raise InvalidPayload("a shard said something malformed")
    return content
