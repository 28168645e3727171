"""Models that `deploy up` waits for: what it says of them, and when it waits no longer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..broker.connect import Broker
from ..broker.states import ModelState
from ..models.spec import ModelSpec

POLL_S = 0.1

NO_ROOM_S = 90.0
"""A model for which there was no room for so long isn't waited for any more."""


class State(Protocol):
    """Serve's word for an application."""

    @property
    def status(self) -> str: ...


class Loading:
    """Models on their way, told of as they go. Those that are loaded when somebody asks are not waited for.

    Args:
        states: what Serve says of them.
    """

    def __init__(
        self, specs: Sequence[ModelSpec], tell: Callable[[str], None], states: Callable[[], Mapping[str, State]]
    ) -> None:
        self.failed: list[str] = []
        self._tell = tell
        self._states = states
        self._waiting = {spec.name for spec in specs if spec.replicas.min or spec.pinned}
        self._told: dict[str, str] = dict.fromkeys((spec.name for spec in specs), ModelState.COLD)
        self._crowded: dict[str, float] = {}
        """Since when there has been no room for a model that is waited for."""

    async def watch(self, broker: Broker) -> None:
        """Return when it's over."""
        while not await self.over(broker):  # noqa: ASYNC110 - the broker is asked, and tells nobody by itself
            await asyncio.sleep(POLL_S)

    async def over(self, broker: Broker) -> bool:
        """Whether each runs jobs, or can't. Takes a second at most."""
        for name in list(self._told):
            hosted = await broker.models.get(name)
            text = str(hosted.state)
            if hosted.state is ModelState.FAILED and hosted.failure is not None:
                text += f": {hosted.failure.detail}"
            elif hosted.told == "crowded" and name in self._waiting:
                text += f": {hosted.note.partition('wanted: ')[2] or 'there is no room for it'}"
            if text != self._told[name]:
                self._told[name] = text
                self._tell(f"{name}: {text}")
            if name in self._waiting:
                await self._settle(name, hosted.state)
                self._bear(name, crowded=hosted.told == "crowded")
        return not self._waiting

    def _bear(self, name: str, *, crowded: bool) -> None:
        """Give up a model for which there is no room, and stays none."""
        if not crowded:
            self._crowded.pop(name, None)
        elif time.monotonic() - self._crowded.setdefault(name, time.monotonic()) > NO_ROOM_S:
            self.failed.append(name)
            self._waiting.discard(name)

    async def _settle(self, name: str, state: ModelState) -> None:
        """Serve knows whether copies of an older version are still there."""
        if state not in (ModelState.READY, ModelState.FAILED):
            return
        serves = (await asyncio.to_thread(self._states)).get(name)
        status = serves.status if serves else ""
        if state is ModelState.FAILED or status in ("DEPLOY_FAILED", "UNHEALTHY"):
            self.failed.append(name)
        elif status != "RUNNING":
            return
        self._waiting.discard(name)
