"""What the broker knows of each model of the catalogue, as the lifecycle's figures; and its decisions told back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from interpose.errors import ModelUnavailable, UnknownModel

from ..broker.connect import Broker
from ..broker.failures import TOO_LARGE
from ..broker.jobs import Demand
from ..broker.models import Hosted
from ..broker.states import ModelState
from ..settings import Settings
from .packing import Parts
from .rules import Figures, Rules, Wanted
from .spec import ModelSpec

LATELY_S = 60.0


def rules(settings: Settings) -> Rules:
    """The lifecycle's rules as the operator set them."""
    return Rules(
        hold_s=settings.hold_s,
        scale_jobs=settings.scale_jobs,
        scale_wait_s=settings.scale_wait_s,
        patience_s=settings.patience_s,
    )


class Watch:
    """Reads figures again and again, as one of them is a rate.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, broker: Broker, clock: Callable[[], float] = time.monotonic) -> None:
        self._broker = broker
        self._clock = clock
        self._work: dict[str, deque[tuple[float, float]]] = {}
        """By model: moments of the last minute, and the seconds worked by then."""
        self._noted: dict[str, _Note] = {}
        self._crowded: dict[str, bool] = {}

    async def look(self, parts: Callable[[ModelSpec], Parts | None] = lambda spec: (1.0,)) -> list[Figures]:
        """The figures of all models of the catalogue of which something is deployed.

        Args:
            parts: what one copy of a model takes; None where nothing is deployed of it.
        """
        found = []
        for entry in await self._broker.specs.entries():
            name, takes = entry.spec.name, parts(entry.spec)
            if takes is None:
                continue
            try:
                hosted, demand = await self._broker.models.get(name), await self._broker.queue.demand(name)
            except UnknownModel:
                continue  # It was dropped in between.
            if hosted.wished and hosted.count(ModelState.READY):
                await self._broker.specs.fulfilled(name)
            busy = self._busy(hosted)
            found.append(figures_of(entry.spec, entry.removed, hosted, demand, busy, takes))
        self._work = {model.name: self._work[model.name] for model in found}
        return found

    async def tell(self, wanted: Wanted) -> None:
        """Keep what was decided for the operator, and tell who waits for what can't be."""
        await self._broker.specs.keep()
        at = datetime.now(UTC).strftime("%m-%d %H:%M")
        notes = {name: _note(wanted, name, self._noted.get(name)) for name in wanted.copies}
        new = {name: f"{at} {note.text}" for name, note in notes.items() if self._noted.get(name) != note}
        await self._broker.models.note(new)
        self._noted = notes
        crowded = {name: name in wanted.crowded for name in wanted.copies}
        await self._broker.models.crowd(
            {name: now for name, now in crowded.items() if self._crowded.get(name) is not now}
        )
        self._crowded = crowded
        for name, why in wanted.impossible.items():
            await self._broker.models.refuse(name, ModelUnavailable(why, details={"reason": TOO_LARGE}))
        for name in wanted.mended:
            await self._broker.models.forgive(name, TOO_LARGE)

    def _busy(self, hosted: Hosted) -> float:
        """The share of a copy's time that went into work of late."""
        now, seen = self._clock(), self._work.setdefault(hosted.name, deque())
        seen.append((now, hosted.busy_s))
        while len(seen) > 2 and now - seen[1][0] >= LATELY_S:
            seen.popleft()
        (since, before), copies = seen[0], max(hosted.count(ModelState.READY), 1)
        return min(max(hosted.busy_s - before, 0.0) / (now - since) / copies, 1.0) if now > since else 0.0


@dataclass(frozen=True, slots=True)
class _Note:
    """What was decided of a model's copies. `lasting`: the reason is over once it isn't given any more."""

    copies: int
    why: str
    lasting: bool

    @property
    def text(self) -> str:
        return f"{self.copies} wanted" + (f": {self.why}" if self.why else "")


def _note(wanted: Wanted, name: str, before: _Note | None) -> _Note:
    """What is to be told of a model. A reason that was given once stands until something else is decided."""
    note = _Note(wanted.copies[name], wanted.why.get(name, ""), name in wanted.lasting)
    stands = before is not None and not note.why and not before.lasting and before.copies == note.copies
    return before if before is not None and stands else note


def figures_of(
    spec: ModelSpec, removed: bool, hosted: Hosted, demand: Demand, busy: float, parts: Parts
) -> Figures:
    """One model's figures from what the broker answered."""
    ready = hosted.count(ModelState.READY)
    used_ms = max(demand.used_ms, hosted.ready_ms)
    wait_ms = hosted.now_ms - demand.oldest_ms if demand.oldest_ms else 0
    if ready:
        # What its jobs waited while it was loaded, a further copy would have taken as well.
        wait_ms = min(wait_ms, hosted.now_ms - hosted.ready_ms)
    return Figures(
        spec=spec,
        ready=ready,
        loading=hosted.count(ModelState.LOADING),
        leaving=hosted.count(ModelState.DRAINING),
        waiting=demand.waiting,
        working=demand.running,
        oldest_wait_s=max(wait_ms, 0) / 1000,
        idle_s=max(hosted.now_ms - used_ms, 0) / 1000 if used_ms else math.inf,
        busy=busy,
        loaded=hosted.ready_ms > 0,
        wished=hosted.wished and not ready,
        evicted=hosted.evicted,
        failed=hosted.barred,
        too_large=hosted.barred_for(TOO_LARGE),
        draining=removed,
        parts=parts,
    )
