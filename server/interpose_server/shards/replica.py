"""A Serve replica: one copy of a model, which takes its jobs from the broker itself. No request comes to it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray

from .. import logs
from ..broker.states import ModelState
from ..models.spec import ModelSpec, Placement
from .cluster import STOPPING_NOTE, Notes, shared
from .naming import worker_name

if TYPE_CHECKING:
    from ..worker.hosting import Host

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often a copy that finishes its jobs looks whether the whole server is being stopped."""

BROKEN = 70
"""Exit status of a process that can't go on."""


class Replica:
    """What Serve makes, asks how it is, and ends.

    It counts as ready when it's made, which is when gateways have its manifest. A copy that can't be loaded stands
    by without a model, and the broker knows why, until none is wanted any more; it is no failure to Serve, which
    gives up for good after a few. Only where another copy runs, it fails: Serve then keeps that older version.

    Args:
        spec: as plain data. The settings are those that were shared on the cluster.
    """

    async def __init__(self, spec: Mapping[str, Any]) -> None:  # type: ignore[misc]
        # Torch is for replicas alone: who deploys them has no need of it.
        from ..worker.engines import engine_for
        from ..worker.hosting import Host, prepare_process
        from .actors import split_engine

        wanted = ModelSpec.model_validate(spec)
        logs.setup(f"replica {wanted.name}")
        self._stop = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        name = worker_name(ray.get_runtime_context().get_actor_id() or "")
        make = split_engine if wanted.placement is Placement.BLOCKS else engine_for
        settings = await asyncio.to_thread(shared)
        if self._stop.is_set():
            return  # Ended before it began, as where its entry changed at once: no failure of the model.
        self._host: Host = Host(wanted, name, settings, make=make)
        prepare_process(self._host.settings)
        try:
            await self._host.load()
        except Exception as error:
            log.warning("it can't be loaded: %s", error)
            if await self._others():
                await self._host.announce(ModelState.STOPPED)
                await self._host.close()
                raise
            return
        self._running = asyncio.create_task(self._host.run(self._stop))
        self._running.add_done_callback(_end_process)

    async def check_health(self) -> None:
        """Raises if another process has to take its place. A loop that hangs doesn't answer, which says so too."""
        if why := self._host.ill():
            raise RuntimeError(why)

    async def __del__(self) -> None:
        """Claim nothing more, finish the running batch, give the rest back.

        What takes longer than a job may, Serve ends; as does this, while the server is being stopped, its grace.
        """
        self._stop.set()
        if not hasattr(self, "_host"):
            return
        if self._host.ill():
            os._exit(BROKEN)  # it would never finish
        if self._running is not None:
            await self._over(self._running)
        else:
            await self._host.announce(ModelState.STOPPED)
        await self._host.close()

    async def _over(self, running: asyncio.Task[None]) -> None:
        ends = math.inf
        while not running.done() and time.monotonic() < ends:
            await asyncio.wait([running], timeout=LOOK_S)
            if math.isinf(ends) and await asyncio.to_thread(Notes().read, STOPPING_NOTE):
                ends = time.monotonic() + self._host.settings.grace_s

    async def _others(self) -> bool:
        """Whether another copy of the model runs jobs."""
        hosted = await self._host.broker.models.get(self._host.spec.name)
        return hosted.state is ModelState.READY


def _end_process(running: asyncio.Task[None]) -> None:
    """A worker that broke, as one does whose device is poisoned, is past mending. Serve starts another process."""
    if not running.cancelled() and (error := running.exception()) is not None:
        log.error("the worker broke; its process ends", exc_info=error)
        os._exit(BROKEN)
