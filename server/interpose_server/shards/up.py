"""`interpose deploy up`: models on Ray Serve, and around them what the configuration doesn't say is elsewhere."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from interpose.errors import ConfigError

from ..broker.connect import Broker
from ..datadir import DataDir
from ..embedded import Supervisor, say
from ..models.spec import ClusterConfig, ModelSpec
from ..settings import Settings
from ..wanted import Served, Wanted
from . import apps, cluster, keeper
from .awaiting import Loading
from .restarts import decided


class ClusterSupervisor(Supervisor):
    """`interpose serve`, but that models run on Ray: on a cluster of this machine's own, or one that is joined."""

    verb = "deploy up"
    fsync = "always"

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
        self._loading = Loading(config.models, say, apps.states)

    def _settings(self, redis_url: str) -> Settings:
        base = settings_of(self._config, redis_url, self._data.path)
        return base.model_copy(update={"metrics_open": base.metrics_open or self._wanted.private})

    async def _host(self, settings: Settings, broker: Broker) -> None:
        loop = asyncio.get_running_loop()
        # Not on this thread, where Ray's Python would take the signals that stop us. Its C++ takes SIGTERM all the
        # same, and would print a stack and end the process.
        address = await asyncio.to_thread(self._reach, lambda: loop.call_soon_threadsafe(self._take_signals))
        self._reached = True
        self._data.note(**self._data.noted(), ray=address, decided=decided(self._config, settings))
        await asyncio.to_thread(
            cluster.Notes().write, cluster.STOPPING_NOTE, False
        )  # of one that was killed meanwhile
        await put(self._config.models, broker, alone=self._wanted.redis_url is None)
        await deploy(self._config.models, settings, broker)

    async def _ended(self, broker: Broker) -> str:
        # As by `deploy down` in another shell.
        return "stopping" if await broker.specs.entries() else "all models are taken down; stopping"

    def _reach(self, connected: Callable[[], object]) -> str:
        if self._config.ray is not None:
            say(f"joining Ray at {self._config.ray}")
            cluster.join(self._config.ray, connected)
            if self._config.redis_url is None and cluster.nodes() > 1:
                raise ConfigError(
                    "Ray has several nodes, and only this one would reach a Valkey here; set redis_url"
                )
            return self._config.ray
        say("starting Ray on this machine")
        self._temp = Path(tempfile.mkdtemp(prefix="interpose-ray-"))
        return cluster.start(self._temp, connected)

    async def _loaded(self, broker: Broker) -> bool:
        return await self._loading.over(broker)

    def _served(self) -> list[str]:
        return [name for name in super()._served() if name not in self._loading.failed]

    async def _finish(self, grace_s: float) -> None:
        """The gateway, then the copies, which finish what they run; the broker last."""
        broker_alone, rest = self._stages[:1], self._stages[1:]
        if self._config.redis_url is not None:
            broker_alone, rest = [], self._stages
        for stage in reversed(rest):
            await asyncio.gather(*(child.stop(grace_s) for child in stage))
        await asyncio.to_thread(self._leave, grace_s)
        for stage in broker_alone:
            await asyncio.gather(*(child.stop(grace_s) for child in stage))

    def _leave(self, grace_s: float) -> None:
        own = self._config.ray is None or self._config.redis_url is None
        if self._reached and own:
            notes = cluster.Notes()
            notes.write(cluster.STOPPING_NOTE, True)
            keeper.stop()
            apps.remove(list(apps.states()), grace_s + apps.BEYOND_GRACE_S)
            notes.write(cluster.STOPPING_NOTE, False)
        cluster.leave()
        if self._temp is not None:
            shutil.rmtree(self._temp, ignore_errors=True)


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
            say(_put(spec, new=known is None or known.removed))
    if alone:
        for name, entry in entries.items():
            if not entry.removed:
                say(f"{name} isn't in the file any more; it is taken down once its jobs are over")
                await broker.specs.remove(name)


def _put(spec: ModelSpec, *, new: bool) -> str:
    """What is said of an entry that was written."""
    said = f"{spec.name} is {'new' if new else 'changed'}"
    if not (spec.replicas.min or spec.pinned):
        said += "; a copy is loaded whenever somebody asks for it"
    # `Path` raises where it may not look.
    if spec.source.startswith("/") and not os.path.exists(spec.source):  # noqa: PTH110
        said += f"; {spec.source} isn't there as seen from this machine"
    return said


async def deploy(specs: Sequence[ModelSpec], settings: Settings, broker: Broker) -> None:
    """Have a cluster that was joined serve models; a keeper that runs on it does so already."""
    if settings.blobs == "file" and await asyncio.to_thread(cluster.nodes) > 1:
        say(
            f"results lie in {settings.blob_dir}: every node has to see that folder, or set blobs: s3://BUCKET/PREFIX"
        )
    await asyncio.to_thread(cluster.share, settings)
    if await asyncio.to_thread(keeper.running):
        await keeper.caught_up(broker, settings, say)
        return
    applied = await asyncio.to_thread(apps.apply, specs, settings)
    for name, error in applied.refused.items():
        await broker.models.refuse(name, error, joining=True)
    await asyncio.to_thread(keeper.start)
