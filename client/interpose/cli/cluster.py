"""The verbs `deploy up | status | down`. Ray is imported once it's needed, after what it reads is set."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import typer
from interpose_server.broker.connect import Broker, connect
from interpose_server.datadir import DataDir, default_dir
from interpose_server.mistakes import suggestion
from interpose_server.models.overview import overview
from interpose_server.models.spec import ClusterConfig
from interpose_server.settings import PREFIX, Settings
from interpose_server.shards import local

from ..errors import ConfigError, UnknownModel
from .catalogue import told_of

POLL_S = 0.2

STOP_S = 120.0
"""A cluster that was started here ends within so long."""


@dataclass(frozen=True, slots=True)
class Place:
    """A configuration, and what runs on its data folder by now: nothing, or the facts that were noted there."""

    config: ClusterConfig
    data: DataDir
    running: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> Place:
        """What the file leaves out comes from the environment, where passwords stand. Raises ConfigError."""
        config = ClusterConfig.read(path)
        if config.redis_url is None and (url := os.environ.get(f"{PREFIX}REDIS_URL")):
            config = config.model_copy(update={"redis_url": url})
        if config.data_dir is None and (folder := os.environ.get(f"{PREFIX}DATA_DIR")):
            config = config.model_copy(update={"data_dir": Path(folder)})
        data = DataDir(config.data_dir or default_dir())
        if not data.busy():
            return cls(config, data, {})
        running = data.noted()
        if running.get("verb", "deploy up") != "deploy up":
            raise ConfigError(f"`interpose serve` runs on {data.path}; stop it, or choose another data_dir")
        if "ray" not in running:
            raise ConfigError(f"a cluster is starting or stopping on {data.path}; try again in a moment")
        return cls(config, data, running)

    @property
    def redis_url(self) -> str | None:
        return self.running.get("redis_url") or self.config.redis_url

    @property
    def ray(self) -> str | None:
        return self.running.get("ray") or self.config.ray

    @property
    def elsewhere(self) -> bool:
        """Whether all there is to start runs elsewhere, or here already."""
        config = self.config
        return bool(self.running) or bool(config.redis_url and config.ray and not config.gateway)

    def settings(self, redis_url: str) -> Settings:
        from interpose_server.shards.up import settings_of

        return settings_of(self.config, redis_url, self.data.path)

    def ignored(self) -> list[str]:
        """What the file says that changes nothing of what runs."""
        from interpose_server.shards.restarts import ignored, unused

        if not self.running:
            return unused(self.config)
        noted = self.running.get("decided")
        return ignored(noted, self.config, self.settings(self.redis_url or "")) if noted else []

    @asynccontextmanager
    async def broker(self) -> AsyncIterator[Broker]:
        """Raises ConfigError if it doesn't run."""
        if self.redis_url is None:
            raise ConfigError(f"nothing is deployed on {self.data.path}")
        broker = connect(Settings.read().model_copy(update={"redis_url": self.redis_url}))
        try:
            await broker.reach()
            yield broker
        finally:
            await broker.close()

    def join(self) -> None:
        """Use the Ray cluster. Raises ConfigError."""
        local.prepare(self.data.path, own=self.config.ray is None)
        from interpose_server.shards import cluster

        assert self.ray is not None
        cluster.join(self.ray)


def up(path: Path, print_env: bool) -> bool:
    """Returns whether all models that are to be loaded are."""
    place = Place.of(path)
    _need_ray()
    if place.elsewhere:
        place.join()
        for line in place.ignored():
            typer.echo(f"{path}: {line}", err=True)
        return asyncio.run(_change(place))
    local.prepare(place.data.path, own=place.config.ray is None)
    from interpose_server.shards.up import ClusterSupervisor

    lock = place.data.lock()
    try:
        asyncio.run(ClusterSupervisor(place.config, place.data, lock, print_env=print_env).run())
    finally:
        place.data.unlock()
    return True


async def _change(place: Place) -> bool:
    """Have a cluster that runs serve what the configuration says by now."""
    from interpose_server.shards import apps
    from interpose_server.shards.awaiting import Loading
    from interpose_server.shards.up import deploy, put

    assert place.redis_url is not None
    settings = place.settings(place.redis_url)
    async with place.broker() as broker:
        await put(place.config.models, broker)
        await deploy(place.config.models, settings, broker)
        loading = Loading(place.config.models, lambda line: typer.echo(line, err=True), apps.states)
        await loading.watch(broker)
    return not loading.failed


def status(path: Path) -> bool:
    """Print it. Returns whether there is something to keep models up."""
    place = Place.of(path)

    async def show() -> bool:
        async with place.broker() as broker:
            kept = await broker.specs.kept()
            for line in told_of(await overview(broker), await broker.specs.shown()):
                typer.echo(line)
            if not kept:
                typer.echo("the cluster isn't heard of: models are neither loaded nor let go")
            return kept

    return asyncio.run(show())


def down(path: Path, models: Sequence[str]) -> None:
    place = Place.of(path)
    _need_ray()
    asyncio.run(_down(place, models))


async def _down(place: Place, models: Sequence[str]) -> None:
    async with place.broker() as broker:
        known = [entry.spec.name for entry in await broker.specs.entries()]
        for name in models:
            if name not in known:
                raise UnknownModel(f"no model {name!r} is deployed{suggestion(name, known)}")
        await _taken_down(broker, sorted(set(models) or {spec.name for spec in place.config.models} & {*known}))
        others = [entry.spec.name for entry in await broker.specs.entries()]
    if others:
        typer.echo(f"all goes on for {', '.join(others)}; name what else is to be taken down", err=True)
    elif "pid" in place.running:
        await _stopped(place)
    else:
        place.join()
        from interpose_server.shards import keeper

        await asyncio.to_thread(keeper.stop)


async def _taken_down(broker: Broker, models: Sequence[str]) -> None:
    """Remove models, and return once they are gone."""
    for name in models:
        await broker.specs.remove(name)
    if models and not await broker.specs.kept():
        typer.echo("the cluster isn't heard of; models are taken down once it is back", err=True)
    told: dict[str, str] = {}
    left = list(models)
    while left:
        for name in list(left):
            if await broker.specs.find(name) is None:
                typer.echo(f"{name}: taken down", err=True)
                left.remove(name)
                continue
            demand = await broker.queue.demand(name)
            line = f"{name}: {demand.waiting} jobs wait and {demand.running} run; it goes once they are over"
            if demand.waiting + demand.running and told.get(name) != line:
                typer.echo(line, err=True)
                told[name] = line
        await asyncio.sleep(POLL_S)


async def _stopped(place: Place) -> None:
    """End the `deploy up` that started all, and return once it has ended. Raises ConfigError."""
    with suppress(ProcessLookupError):
        os.kill(int(place.running["pid"]), signal.SIGTERM)
    ends = time.monotonic() + STOP_S
    while place.data.busy():
        if time.monotonic() > ends:
            raise ConfigError(f"process {place.running['pid']}, which `deploy up` is, doesn't end")
        await asyncio.sleep(POLL_S)
    typer.echo("stopped", err=True)


def _need_ray() -> None:
    if find_spec("ray") is None:
        raise ModuleNotFoundError("no Ray", name="ray")
