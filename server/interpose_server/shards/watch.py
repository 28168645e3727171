"""A thread in the process of Serve's controller that knows how many copies of each model are wanted.

One for all models, since they compete for the same devices. Serve asks ten times a second from its event loop, so
that asking must never wait.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from functools import cache

from ..broker.connect import connect
from ..models.figures import Watch as Figures
from ..models.figures import rules
from ..models.lifecycle import decide
from ..models.rules import Memory
from ..models.spec import ModelSpec
from ..settings import Settings
from .cluster import MODELS_NOTE, Notes, on_gpus, room, shared

log = logging.getLogger(__name__)

EVERY_S = 1.0
STALE_S = 15.0
"""What was decided so long ago says nothing any more: who is loaded then stays so."""


@cache
def watch() -> Watch:
    """This process's only one, at work from the first call on."""
    return Watch()


class Watch:
    def __init__(self) -> None:
        self._wanted: Mapping[str, int] = {}
        self._looked_at = float("-inf")
        self._memory = Memory()
        """Kept while the broker is away: whoever waited then has waited."""
        threading.Thread(target=self._run, name="interpose-watch", daemon=True).start()

    def wanted(self, model: str) -> int | None:
        """How many copies; None where that isn't known."""
        if time.monotonic() - self._looked_at > STALE_S:
            return None
        return self._wanted.get(model)

    def _run(self) -> None:
        while True:
            try:
                asyncio.run(self._follow(shared()))
            except Exception:
                log.exception("what copies are wanted isn't known; trying again")
            time.sleep(EVERY_S)

    async def _follow(self, settings: Settings) -> None:
        """Decide again and again, until the settings are others or something fails."""
        broker = connect(settings)
        figures = Figures(broker)
        try:
            while shared() == settings:
                await self._look(figures, settings)
                await asyncio.sleep(EVERY_S)
        finally:
            await broker.close()

    async def _look(self, figures: Figures, settings: Settings) -> None:
        noted = Notes().read(MODELS_NOTE) or {}

        def parts(spec: ModelSpec) -> tuple[float, ...] | None:
            return tuple(noted[spec.name]["parts"]) if spec.name in noted else None

        models = await figures.look(parts)
        decided = decide(models, room(gpus=on_gpus(noted)), time.time(), self._memory, rules(settings))
        self._memory = decided.memory
        self._wanted, self._looked_at = decided.copies, time.monotonic()
        await figures.tell(decided)
