"""What brings Serve in line with the catalogue in the broker, whoever changes that: the admin API, `deploy up`.

A small Serve application of its own, so that Serve keeps it running.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from interpose.errors import ConfigError
from ray import serve
from ray.serve import RunTarget
from redis.exceptions import RedisError

from .. import logs
from ..broker.connect import Broker, connect
from ..broker.failures import TOO_LARGE
from ..models.lifecycle import JOINING_S
from ..settings import Settings
from ..tasks import end
from . import apps
from .cluster import APPLIED_NOTE, Notes, shared, total
from .inventory import inventory
from .orphans import Hanging, end_unplaced, reap_orphans

log = logging.getLogger(__name__)

APP = "interpose"
"""Serve's name for its application."""

EVERY_S = 1.0
SLOW_S = 5.0
"""After so long, what is waited for is said."""
CATCH_UP_S = 300.0
"""So long it may take until what has changed is deployed: the keeper may just be started anew on another node."""
SHOWN_S = 2.0
"""Devices, and what holds them, are shown anew so often."""
AGAIN_S = 60.0
"""A model that fitted nowhere may do so later, as nodes come; and somebody may have deleted an application."""


class Keeper:
    """What Serve makes of it."""

    async def __init__(self) -> None:  # type: ignore[misc]
        logs.setup("keeper")
        self._task = asyncio.create_task(_keep())

    async def check_health(self) -> None:
        if self._task.done():
            raise RuntimeError("the keeper ended")

    async def __del__(self) -> None:
        await end([self._task])


def start() -> None:
    """Have one on the cluster. What it needs to know is in the cluster's notes."""
    if APP in serve.status().applications:
        return
    deployment = serve.deployment(
        name="keeper", num_replicas=1, ray_actor_options={"num_cpus": 0}, graceful_shutdown_wait_loop_s=0.05
    )(Keeper)
    target = RunTarget(target=deployment.bind(), name=APP, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)


def running() -> bool:
    return APP in serve.status().applications


async def caught_up(broker: Broker, settings: Settings, tell: Callable[[str], None]) -> None:
    """Return once one has applied the catalogue as it is, and the settings.

    Raises ConfigError if it doesn't for long.
    """
    began, told = time.monotonic(), False
    mark = apps.settings_mark(settings)
    # As it is by then: a model that is removed changes it once more when its jobs are over.
    while await asyncio.to_thread(Notes().read, APPLIED_NOTE) != [await broker.specs.revision(), mark]:
        waited_s = time.monotonic() - began
        if waited_s > SLOW_S and not told:
            told = True
            tell("waiting for the keeper, which deploys what has changed")
        if waited_s > CATCH_UP_S:
            raise ConfigError(
                f"the keeper, Serve's application {APP!r}, hasn't deployed what has changed for {waited_s:.0f} s; "
                "the log of its replica may say why. It does so once it can"
            )
        await asyncio.sleep(0.2)


def stop() -> None:
    if running():
        serve.delete(APP)


async def _keep() -> None:
    hanging = Hanging()
    while True:
        try:
            await _follow(shared(), hanging)
        except (RedisError, OSError) as error:
            log.warning("the broker doesn't answer (%s); trying again", type(error).__name__)
        except Exception:
            log.exception("the catalogue isn't followed; trying again")
        await asyncio.sleep(EVERY_S)


async def _follow(settings: Settings, hanging: Hanging) -> None:
    """Go on until the settings are others, or something fails."""
    broker = connect(settings)
    rounds = Rounds(broker, settings, hanging)
    try:
        while shared() == settings:
            await rounds.go()
            await asyncio.sleep(EVERY_S)
    finally:
        await broker.close()


@dataclass
class Rounds:
    """One look after another at what is wanted and what there is."""

    broker: Broker
    settings: Settings
    hanging: Hanging
    _seen: int | None = field(default=None, init=False)
    _nodes: frozenset[str] = field(default=frozenset(), init=False)
    _grown_at: float = field(default=float("-inf"), init=False)
    _applied_at: float = field(default=float("-inf"), init=False)
    _shown_at: float = field(default=float("-inf"), init=False)

    async def go(self) -> None:
        await self.broker.specs.keep()
        # First what jobs wait for: what Serve refuses of the catalogue it may refuse in every round.
        await reap_orphans(self.broker)
        await self.hanging.end(self.broker)
        waiting = await end_unplaced()
        revision, grown = await self.broker.specs.revision(), await self._grown()
        if revision != self._seen or grown or time.monotonic() - self._applied_at > AGAIN_S:
            await self._apply(revision)
            self._seen, self._applied_at = revision, time.monotonic()
        if time.monotonic() - self._shown_at > SHOWN_S:
            self._shown_at = time.monotonic()
            workers = [worker for hosted in await self.broker.models.list() for worker in hosted.copies]
            await self.broker.specs.show(await asyncio.to_thread(inventory, workers, waiting))

    async def _grown(self) -> bool:
        """Whether nodes have come, on which what was refused may fit."""
        before, self._nodes = self._nodes, frozenset(await asyncio.to_thread(total))
        if self._nodes <= before:
            return False
        self._grown_at = time.monotonic()
        return True

    async def _apply(self, revision: int) -> None:
        # Who is refused for its size is looked at again soon: as further nodes come, or in a while.
        joining = time.monotonic() - self._grown_at < JOINING_S
        entries = await self.broker.specs.entries()
        specs = [entry.spec for entry in entries if not entry.removed]
        applied = await asyncio.to_thread(apps.apply, specs, self.settings)
        if applied.changed:
            log.warning("deployed anew: %s", ", ".join(applied.changed))
        for name, why in applied.held_back.items():
            log.warning("%s can't be as its entry says, what was before is served on: %s", name, why.message)
        for name in applied.changed:
            await self.broker.models.forgive(name, TOO_LARGE)
        for name, error in applied.refused.items():
            await self.broker.models.refuse(name, error, joining=joining)
        Notes().write(APPLIED_NOTE, [revision, apps.settings_mark(self.settings)])
        # One that was taken out of the catalogue finishes its jobs first; then it has no entry any more.
        known = {entry.spec.name for entry in entries}
        gone = [name for name in await asyncio.to_thread(apps.states) if name not in known]
        if gone:
            await asyncio.to_thread(apps.remove, gone)
            log.warning("taken down: %s", ", ".join(gone))
