"""One ear on the broker per gateway process: wakes whoever waits for a job's next event."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError

from .broker import keys
from .broker.connect import Broker

log = logging.getLogger(__name__)


class Notifier:
    """Turns the broker's wake-ups into events and callbacks of this process.

    A wake-up says only that there is more to read, so one too many does no harm; when the connection was lost,
    everybody is woken.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._bells: dict[str, set[asyncio.Event]] = {}
        self._revoked: dict[str, set[Callable[[], None]]] = {}

    @contextmanager
    def listening(self, ref: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job's stream may have grown."""
        bell = asyncio.Event()
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
                            self._hear(message["data"].decode())
            except (RedisError, OSError) as error:
                log.warning("lost the broker's wake-ups (%s); listening again", type(error).__name__)
                self._wake_all()
                await asyncio.sleep(0.2)

    def _hear(self, text: str) -> None:
        if text.startswith("!"):
            for cut in list(self._revoked.get(text[1:], ())):
                cut()
        for bell in self._bells.get(text, ()):
            bell.set()

    def _wake_all(self) -> None:
        for bells in self._bells.values():
            for bell in bells:
                bell.set()
