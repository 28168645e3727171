"""Models that `deploy up` waits for: what it says of them, and when it waits no longer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from ..broker.connect import Broker
from ..broker.models import Hosted
from ..broker.states import ModelState
from ..models.inventory import HeldBack
from ..models.spec import ModelSpec

POLL_S = 0.1

NO_ROOM_S = 90.0
"""A model for which there was no room for so long isn't waited for any more."""

SLOW_S = 5.0
"""After so long without news, what is waited for is said."""

NO_NEWS_S = 600.0
"""A model without news for so long isn't waited for any more; while it is loaded, its `load_s` more."""

BROKEN = ("DEPLOY_FAILED", "UNHEALTHY")
"""Serve's words."""


class State(Protocol):
    """Serve's word for an application, and what it says beyond that."""

    @property
    def status(self) -> str: ...

    @property
    def message(self) -> str: ...

    @property
    def held_back(self) -> HeldBack | None: ...


class Verdict(Enum):
    """What became of a model."""

    RUNS = "runs"
    FAILED = "failed"


@dataclass
class _Model:
    """Attributes:
    told: what was last said of it.
    news_at: when that changed.
    crowded_at: since when there has been no room for it.
    """

    spec: ModelSpec
    told: str = ModelState.COLD
    state: ModelState = ModelState.COLD
    news_at: float = field(default_factory=time.monotonic)
    crowded_at: float | None = None
    slow: bool = False


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
        self._models = [_Model(spec) for spec in specs]
        self._looked = False
        self._waiting = {spec.name for spec in specs if spec.replicas.min or spec.pinned}

    async def watch(self, broker: Broker) -> None:
        """Return when it's over."""
        while not await self.over(broker):  # noqa: ASYNC110 - the broker is asked, and tells nobody by itself
            await asyncio.sleep(POLL_S)

    async def over(self, broker: Broker) -> bool:
        """Whether each runs jobs, or can't, or isn't waited for any more. Takes a second at most."""
        if not self._looked:
            self._looked = True
            self._leave_out(await asyncio.to_thread(self._states))
        for model in self._models:
            hosted = await broker.models.get(model.spec.name)
            verdict, text = await self._seen(model, hosted)
            self._say(model, text, hosted.state)
            if model.spec.name in self._waiting:
                if verdict is None:
                    verdict = self._borne(model, hosted)
                self._settle(model.spec.name, verdict)
        return not self._waiting

    def _leave_out(self, states: Mapping[str, State]) -> None:
        """Tell of models that can have no copies as their entry says; nothing comes of those."""
        held = {name: why for name, state in states.items() if (why := state.held_back)}
        for name in [model.spec.name for model in self._models if model.spec.name in held]:
            why = held[name]
            then = "It can be loaded once there are nodes for it"
            if why.served:
                then = "The version before is served on; this one takes its place as soon as it can"
            self._tell(f"{name}: failed ({why.reason}): {why.detail}. {then}")
            if why.served or name in self._waiting:
                self._settle(name, Verdict.FAILED)
        self._models = [model for model in self._models if model.spec.name not in held]

    async def _seen(self, model: _Model, hosted: Hosted) -> tuple[Verdict | None, str]:
        """What has become of it, and what there is to say of it; "" says nothing yet."""
        match hosted.state:
            case ModelState.FAILED:
                return Verdict.FAILED, f"failed: {hosted.failure.detail}" if hosted.failure else "failed"
            case ModelState.READY if model.told != ModelState.READY:
                return await self._replaced(hosted)
            case ModelState.READY:
                return Verdict.RUNS, model.told
        if hosted.told == "crowded" and hosted.name in self._waiting:
            why = hosted.note.partition("wanted: ")[2] or "there is no room for it"
            return None, f"{hosted.state}: {why}"
        return None, str(hosted.state)

    async def _replaced(self, hosted: Hosted) -> tuple[Verdict | None, str]:
        """Serve knows whether the copy that runs jobs is of the version that is wanted, and the only one."""
        serves = (await asyncio.to_thread(self._states)).get(hosted.name)
        if serves is not None and serves.status in BROKEN:
            why = hosted.failure.detail if hosted.failure else serves.message or serves.status
            return Verdict.FAILED, f"failed: {why} (another copy, of before, still runs)"
        if serves is not None and serves.status == "RUNNING":
            return Verdict.RUNS, ModelState.READY
        return None, ""

    def _say(self, model: _Model, text: str, state: ModelState) -> None:
        now = time.monotonic()
        if state is not model.state or (text and text != model.told):
            model.state, model.news_at, model.slow = state, now, False
        if text and text != model.told:
            model.told = text
            self._tell(f"{model.spec.name}: {text}")
        elif not model.slow and now - model.news_at > SLOW_S and model.spec.name in self._waiting:
            model.slow = True
            self._tell(f"{model.spec.name}: {_awaited(state)}")

    def _borne(self, model: _Model, hosted: Hosted) -> Verdict | None:
        """Give up a model for which there is no room, and stays none; and one without news for long."""
        now = time.monotonic()
        if hosted.told != "crowded":
            model.crowded_at = None
        elif model.crowded_at is None:
            model.crowded_at = now
        if model.crowded_at is not None and now - model.crowded_at > NO_ROOM_S:
            self._tell(
                f"{hosted.name}: there has been no room for it for {NO_ROOM_S:.0f} s, so it isn't waited for any "
                "longer. The cluster loads it as soon as there is; interpose deploy status shows why it waits, and "
                "when it runs"
            )
            return Verdict.FAILED
        patience_s = NO_NEWS_S + (model.spec.load_s if hosted.state is ModelState.LOADING else 0)
        if now - model.news_at > patience_s:
            self._tell(
                f"{hosted.name}: no news for {patience_s:.0f} s; {_awaited(hosted.state)}. "
                "It isn't waited for any longer; interpose deploy status has more"
            )
            return Verdict.FAILED
        return None

    def _settle(self, name: str, verdict: Verdict | None) -> None:
        if verdict is Verdict.FAILED:
            self.failed.append(name)
        if verdict is not None:
            self._waiting.discard(name)


def _awaited(state: ModelState) -> str:
    """What has to come before a model in this state is as the file says."""
    match state:
        case ModelState.READY:
            return "a copy runs; waiting until others of it are replaced, or have stopped"
        case ModelState.LOADING:
            return "waiting until it is loaded"
        case ModelState.DRAINING:
            return "waiting until the copies before have finished their jobs"
        case _:
            return "waiting until a copy of it is begun"
