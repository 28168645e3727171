"""`interpose deploy up`: models on Ray Serve, and around them what the configuration doesn't say is elsewhere."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from interpose.errors import ConfigError

from ..broker.connect import Broker
from ..broker.states import ModelState
from ..datadir import DataDir
from ..embedded import Supervisor, say
from ..models.spec import ClusterConfig, ModelSpec
from ..settings import Settings
from ..wanted import Served, Wanted
from . import apps, cluster, keeper

POLL_S = 0.1

NO_ROOM_S = 90.0
"""A model for which there was no room for so long isn't waited for any more."""


class ClusterSupervisor(Supervisor):
    """`interpose serve`, but that models run on Ray: on a cluster of this machine's own, or one that is joined."""

    def __init__(self, config: ClusterConfig, data: DataDir, lock: int, *, print_env: bool = False) -> None:
        served = [Served(spec.name, spec.place) for spec in config.models]
        gateway = config.gateway is not False
        wanted = Wanted(
            served, config.host, config.port, None, None, data.path, config.redis_url, print_env, gateway
        )
        super().__init__(wanted, data, lock)
        self._config = config
        self._temp: Path | None = None
        self._reached = False
        self._loading = Loading(config.models, say)

    def _settings(self, redis_url: str) -> Settings:
        base = settings_of(self._config, redis_url, self._data.path)
        return base.model_copy(update={"metrics_open": base.metrics_open or self._wanted.private})

    async def _host(self, settings: Settings, broker: Broker) -> None:
        # Not on this thread: Ray would take the signals that stop us.
        address = await asyncio.to_thread(self._reach)
        self._reached = True
        self._data.note(**self._data.noted(), ray=address)
        await put(self._config.models, broker, alone=self._wanted.redis_url is None)
        await deploy(self._config.models, settings, broker)

    def _reach(self) -> str:
        if self._config.ray is not None:
            say(f"joining Ray at {self._config.ray}")
            cluster.join(self._config.ray)
            if self._config.redis_url is None and cluster.nodes() > 1:
                raise ConfigError(
                    "Ray has several nodes, and only this one would reach a Valkey here; set redis_url"
                )
            return self._config.ray
        say("starting Ray on this machine")
        self._temp = Path(tempfile.mkdtemp(prefix="interpose-ray-"))
        return cluster.start(self._temp)

    async def _loaded(self, broker: Broker) -> bool:
        return await self._loading.over(broker)

    async def _finish(self, grace_s: float) -> None:
        """The gateway, then the copies, which finish what they run; the broker last."""
        broker_alone, rest = self._stages[:1], self._stages[1:]
        if self._config.redis_url is not None:
            broker_alone, rest = [], self._stages
        for stage in reversed(rest):
            await asyncio.gather(*(child.stop(grace_s) for child in stage))
        await asyncio.to_thread(self._leave)
        for stage in broker_alone:
            await asyncio.gather(*(child.stop(grace_s) for child in stage))

    def _leave(self) -> None:
        own = self._config.ray is None or self._config.redis_url is None
        if self._reached and own:
            keeper.stop()
            apps.remove(list(apps.states()))
        cluster.leave()
        if self._temp is not None:
            shutil.rmtree(self._temp, ignore_errors=True)


class Loading:
    """Models on their way, told of as they go. Those that are loaded when somebody asks are not waited for."""

    def __init__(self, specs: Sequence[ModelSpec], tell: Callable[[str], None]) -> None:
        self.failed: list[str] = []
        self._tell = tell
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
        serves = (await asyncio.to_thread(apps.states)).get(name)
        status = serves.status if serves else ""
        if state is ModelState.FAILED or status in ("DEPLOY_FAILED", "UNHEALTHY"):
            self.failed.append(name)
        elif status != "RUNNING":
            return
        self._waiting.discard(name)


def settings_of(config: ClusterConfig, redis_url: str, data_dir: Path | None) -> Settings:
    """The environment's, with what the configuration says. Raises ConfigError."""
    settings = Settings.read().changed(config.settings, only=Settings.model_fields)
    where = {"redis_url": redis_url} | ({"data_dir": data_dir.resolve()} if data_dir is not None else {})
    return settings.model_copy(update=where)


async def put(specs: Sequence[ModelSpec], broker: Broker, *, alone: bool = True) -> None:
    """Make the catalogue say what a configuration says.

    Args:
        alone: models it doesn't name are removed, once their jobs are over.
    """
    entries = {entry.spec.name: entry for entry in await broker.specs.entries()}
    for spec in specs:
        known = entries.pop(spec.name, None)
        if known is None or known.removed or known.spec != spec:
            await broker.specs.put(spec)
    if alone:
        for name, entry in entries.items():
            if not entry.removed:
                say(f"{name} isn't in the file any more; it is taken down once its jobs are over")
                await broker.specs.remove(name)


async def deploy(specs: Sequence[ModelSpec], settings: Settings, broker: Broker) -> None:
    """Have a cluster that was joined serve models; a keeper that runs on it does so already."""
    if settings.blobs == "file" and await asyncio.to_thread(cluster.nodes) > 1:
        say(
            f"results lie in {settings.blob_dir}: every node has to see that folder, or set blobs: s3://BUCKET/PREFIX"
        )
    if await asyncio.to_thread(keeper.running):
        await asyncio.to_thread(apps.share, settings)
        await keeper.caught_up(broker, settings)
        return
    applied = await asyncio.to_thread(apps.apply, specs, settings)
    for name, error in applied.refused.items():
        await broker.models.refuse(name, error)
    await asyncio.to_thread(keeper.start)
