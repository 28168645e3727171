"""One ear on the broker per gateway process: wakes whoever waits for a job's next event."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from redis.exceptions import RedisError

from .broker import keys
from .broker.connect import Broker
from .broker.events import Stored, pushed

log = logging.getLogger(__name__)


LAZY_S = 0.05
"""How long what can wait does: a small job ends within that, and all it has to say is said at once."""

MOST_TOLD = 32
"""Events that a bell keeps for whoever doesn't come for them."""


class Bell:
    """Rings when a job's stream may have grown, and keeps the events it was told of."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._told: list[Stored] = []
        self._sure = True

    def ring(self) -> None:
        """There may be more than was told of."""
        self._sure = False
        self._rung.set()

    def tell(self, told: Sequence[Stored], *, lazily: bool = False) -> None:
        self._told += told
        if len(self._told) > MOST_TOLD:
            self._told.clear()
            self._sure = False
        if lazily:
            asyncio.get_running_loop().call_later(LAZY_S, self._remind)
        else:
            self._rung.set()

    def _remind(self) -> None:
        if self._told:
            self._rung.set()

    def take(self, after: int) -> list[Stored]:
        """The events that follow number `after`, if there are no others; if it isn't sure, nothing. Forgets them.

        Its answer holds for what was told of by now, so nothing may be awaited before what is missing is read.
        """
        told, sure = self._told, self._sure
        self._told, self._sure = [], True
        self._rung.clear()
        told = [event for event in told if event.seq > after]
        return told if sure and [event.seq for event in told] == [*range(after + 1, after + 1 + len(told))] else []

    @property
    def rung(self) -> bool:
        return self._rung.is_set()

    async def wait(self) -> None:
        await self._rung.wait()


class Notifier:
    """Turns the broker's wake-ups into events and callbacks of this process.

    A wake-up says that there is more to read, and small events come with it; one too many does no harm. When the
    connection was lost, everybody is woken.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._bells: dict[str, set[Bell]] = {}
        self._revoked: dict[str, set[Callable[[], None]]] = {}

    @contextmanager
    def listening(self, ref: str) -> Iterator[Bell]:
        """A bell that rings whenever the job's stream may have grown."""
        bell = Bell()
        self._bells.setdefault(ref, set()).add(bell)
        try:
            yield bell
        finally:
            self._bells[ref].discard(bell)
            if not self._bells[ref]:
                del self._bells[ref]

    @contextmanager
    def on_revoked(self, key_id: str, cut: Callable[[], None]) -> Iterator[None]:
        """Call `cut` when the key is revoked."""
        self._revoked.setdefault(key_id, set()).add(cut)
        try:
            yield
        finally:
            self._revoked[key_id].discard(cut)
            if not self._revoked[key_id]:
                del self._revoked[key_id]

    async def run(self) -> None:
        """Listen until cancelled, across the broker's restarts."""
        while True:
            try:
                async with self._broker.redis.pubsub() as pubsub:
                    await pubsub.subscribe(keys.WAKE)
                    self._wake_all()
                    async for message in pubsub.listen():
                        if message["type"] == "message":
                            self._hear(message["data"])
            except (RedisError, OSError) as error:
                log.warning("lost the broker's wake-ups (%s); listening again", type(error).__name__)
                self._wake_all()
                await asyncio.sleep(0.2)

    def _hear(self, message: bytes) -> None:
        kind, rest = message[:1], message[1:]
        if kind == b"!":
            for cut in list(self._revoked.get(rest.decode(), ())):
                cut()
        elif kind in (b"+", b"~"):
            ref, told = pushed(rest)
            for bell in self._bells.get(ref, ()):
                bell.tell(told, lazily=kind == b"~")
        else:
            for bell in self._bells.get(message.decode(), ()):
                bell.ring()

    def _wake_all(self) -> None:
        for bells in self._bells.values():
            for bell in bells:
                bell.ring()
