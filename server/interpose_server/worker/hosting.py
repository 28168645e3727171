"""One copy of a model at work: load, tell the gateways, run jobs, stop.

A process of its own and a Ray Serve replica are shells around it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import torch
import transformers
from interpose.errors import ConfigError, InterposeError, ModelUnavailable
from interpose.graph.manifest import Manifest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .. import blob_keys
from ..blobs import open_blobs
from ..broker.connect import connect
from ..broker.states import ModelState
from ..models.spec import ModelSpec
from ..settings import Settings
from ..tasks import end
from .budget import describe, told
from .engines import Ready, engine_for
from .loop import Worker

log = logging.getLogger(__name__)

Make: TypeAlias = Callable[[ModelSpec, Settings, str | None], Ready]

_Known: TypeAlias = tuple[str, str, Manifest, str, Mapping[str, Any]]
"""What the broker is told of a copy that is loaded: model, worker, manifest, tokenizer, budget."""

WATCH_S = 0.5
"""How often a copy at rest is asked whether it can go on."""

OWED_S = 0.2
"""How often a copy that is replaced looks whether it is still needed."""

STAND_IN_S = 5.0
"""How often a copy looks whether it counts as gone, or its model as serving what only others did, that are gone."""

FOREVER_S = 10 * 365 * 86_400.0


def prepare_process(settings: Settings) -> None:
    """What has to be said to torch before it computes."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Before torch allocates: fresh memory in huge pages costs a third of what it does page by page.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if settings.worker_threads:
        torch.set_num_threads(settings.worker_threads)


class Host:
    """Make it inside a running event loop; `load`, then `run`, then `close`.

    Args:
        name: under which its jobs are leased; no other live worker's.
        settings: of the server; the spec's own are applied on top, and one that can't be fails the loading.
        device: overrides where the spec puts it.
        make: makes the engine; called on a thread of its own.
    """

    def __init__(
        self, spec: ModelSpec, name: str, settings: Settings, device: str | None = None, make: Make = engine_for
    ) -> None:
        self.spec = spec
        self.name = name
        self._fault: ConfigError | None = None
        try:
            self.settings = settings.changed(spec.settings)
        except ConfigError as error:
            self.settings, self._fault = settings, error
        self.broker = connect(self.settings)
        self._device = device
        self._make = make
        self._blobs = open_blobs(self.settings)
        self._workers: list[Worker] = []
        """One for each batch that is under way at once."""
        self._check: Callable[[], None] = lambda: None
        self._known: _Known | None = None

    async def load(self) -> None:
        """Return once gateways know that it runs jobs.

        Raises:
            InterposeError: it can't; the broker knows why, too.
        """
        await self.announce(ModelState.LOADING)
        start = time.monotonic()
        say(f"{self.spec.name}: loading from {self.spec.place}")
        beat = asyncio.create_task(self._beat())
        try:
            ready = await self._engine()
            await self._publish(ready)
        except Exception as error:
            if not isinstance(error, InterposeError):
                log.exception("%s can't be loaded", self.spec.name)
            self._workers = []
            await self._fail(error)
            raise
        finally:
            await end([beat])
        parts = f"{ready.manifest.architecture}, {ready.manifest.dtype}, {len(ready.manifest.blocks)} blocks"
        alone = "" if ready.manifest.row_independent else f"; serves jobs one by one: {ready.manifest.row_note}"
        took_s = time.monotonic() - start
        say(f"{self.spec.name}: ready after {took_s:.1f} s ({parts}, on {ready.device}){alone}")
        say(f"{self.spec.name}: {describe(ready.allowed, ready.measured)}")

    async def run(self, stop: asyncio.Event) -> None:
        """Run jobs until told to stop; then finish the running batch, and give back what was claimed beyond it.

        Raises whatever leaves this process unable to go on, as a broken device does: another has to be started.
        """
        assert self._workers, "it isn't loaded"
        last = asyncio.Event()
        beside = [asyncio.create_task(self._leave(stop, last)), asyncio.create_task(self._stand_in(stop))]
        try:
            await self._work(last)
        except Exception:
            # Its jobs needn't wait for their leases to end.
            with suppress(RedisError, OSError):
                await self.broker.queue.reap(self.name)
            raise
        finally:
            await end(beside)
        await self.announce(ModelState.STOPPED)

    async def _work(self, stop: asyncio.Event) -> None:
        working = {asyncio.create_task(worker.run(stop)) for worker in self._workers}
        watching = asyncio.create_task(self._watch())
        left = working
        try:
            while left:
                done, _ = await asyncio.wait({*left, watching}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                left = left - done
        finally:
            await end([*working, watching])

    async def _watch(self) -> None:
        """Raises what the model's check raises: no batch may ever follow that would tell."""
        while True:
            await asyncio.sleep(WATCH_S)
            await asyncio.to_thread(self._check)

    async def _stand_in(self, stop: asyncio.Event) -> None:
        """Where copies of another revision came and went, have jobs be recorded against this one's again; where
        this one was taken for gone, as it was cut off, tell of it again."""
        assert self._known is not None
        models, name = self.broker.models, self.spec.name
        while not stop.is_set():
            await asyncio.sleep(STAND_IN_S)
            with suppress(RedisError, OSError):
                if await models.rejoin(*self._known):
                    log.warning("%s: this copy counted as gone; it is told of again", name)
                if await models.outlived(name, self.name):
                    log.warning("%s: the copies of another revision are gone", name)
                    await models.describe(*self._known)

    def _lane(self, number: int) -> str:
        """The name under which one of its workers has its leases."""
        return f"{self.name}+{number}" if number else self.name

    async def _leave(self, stop: asyncio.Event, last: asyncio.Event) -> None:
        """Once told to stop, set `last` when it needn't claim any more."""
        await stop.wait()
        try:
            async with asyncio.timeout(self.settings.finish_s):
                while await self._needed():  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(OWED_S)
        except TimeoutError:
            log.warning("jobs are left that no other copy can run; %g s are over", self.settings.finish_s)
        finally:
            last.set()
        await self.announce(ModelState.DRAINING)

    async def _needed(self) -> bool:
        """Whether jobs are left that were recorded against what only this copy serves; no more are accepted."""
        models, name = self.broker.models, self.spec.name
        try:
            replaced = await self._replaced()
            return await models.close(name, self.name, replaced=replaced) and await models.owed(name, self.name)
        except (RedisError, OSError) as error:
            log.warning("what is left to do isn't known (%s); trying again", type(error).__name__)
            return True

    async def _replaced(self) -> bool:
        """Whether the model's next copy will serve something else. It may, where the entry can't be read."""
        try:
            entry = await self.broker.specs.find(self.spec.name)
        except ConfigError:
            return True
        return entry is not None and not entry.removed and entry.spec.weights != self.spec.weights

    async def announce(self, state: ModelState, why: BaseException | None = None) -> None:
        await self.broker.models.announce(self.spec.name, self.name, state, why)

    async def _fail(self, why: Exception) -> None:
        """Tell why it can't be loaded, as soon as the broker can be told; nothing, if it was to go meanwhile."""
        while True:
            try:
                for since in (ModelState.LOADING, ModelState.READY):
                    await self.broker.models.announce(
                        self.spec.name, self.name, ModelState.FAILED, why, since=since
                    )
                return
            except (RedisError, OSError) as error:
                log.warning("the broker can't be told of it (%s)", type(error).__name__)
                await asyncio.sleep(1)

    def ill(self) -> str | None:
        """Why this process should be ended and another started; None while it is well."""
        return next((why for worker in self._workers if (why := worker.stuck())), None)

    async def close(self) -> None:
        await self.broker.close()

    async def _engine(self) -> Ready:
        if self._fault is not None:
            raise self._fault
        try:
            async with asyncio.timeout(self.spec.load_s):
                return await asyncio.to_thread(self._make, self.spec, self.settings, self._device)
        except TimeoutError:
            why = f"{self.spec.name} wasn't loaded after {self.spec.load_s:g} s"
            raise ModelUnavailable(why, details={"reason": "timeout"}) from None

    async def _publish(self, ready: Ready) -> None:
        tokenizer = ""
        if ready.tokenizer is not None:
            data, tokenizer = ready.tokenizer, hashlib.sha256(ready.tokenizer).hexdigest()
            key = blob_keys.tokenizer(tokenizer)
            await self._blobs.run(lambda: self._blobs.put(key, [data], FOREVER_S))
        # One that died under this name holds leases on jobs nobody runs.
        await self._told(lambda: self.broker.queue.reap(self.name))
        self._check = ready.check
        # The workers come first: one that can't be made is never told of.
        self._workers = [
            Worker(
                self.spec.name, self._lane(lane), ready.engine, self.broker, self._blobs, self.settings,
                partial(_placed, ready.device), partial(_check, ready.check), budget=ready.lane,
                prepare=ready.engine.prepare, copy=self.name, lanes=ready.lanes,
            )
            for lane in range(ready.lanes)
        ]  # fmt: skip
        budget = told(ready.allowed, ready.measured)
        known = self._known = (self.spec.name, self.name, ready.manifest, tokenizer, budget)
        await self._told(lambda: self.broker.models.publish(*known))

    async def _told(self, tell: Callable[[], Awaitable[object]]) -> None:
        """Have the broker told something, however long it is away: loading has taken long, and would again."""
        while True:
            try:
                await tell()
                return
            except (RedisConnectionError, RedisTimeoutError) as error:
                log.warning("%s is loaded; the broker can't be told (%s)", self.spec.name, type(error).__name__)
                await asyncio.sleep(1)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(1)
            with suppress(RedisError, OSError):
                await self.broker.models.beat(self.spec.name, self.name)


def _placed(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(device)


def _check(model: Callable[[], None]) -> None:
    """Raises if model or GPU was left broken, which only a new process can mend: its jobs are then tried again."""
    model()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def say(text: str) -> None:
    """One line for the operator."""
    print(text, file=sys.stderr, flush=True)
