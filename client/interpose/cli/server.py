"""The verbs that need the server's package: `serve`, `plan`, `status`, `keys`."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import typer
from interpose_server.broker.connect import Broker, connect
from interpose_server.datadir import DataDir, default_dir
from interpose_server.processes import Child
from interpose_server.settings import Settings
from interpose_server.valkey import EmbeddedValkey
from interpose_server.wanted import Served, Wanted, with_adapters

from ..errors import ConfigError
from .common import adapters_of


def serve(
    models: Sequence[str],
    host: str,
    port: int,
    device: str | None,
    dtype: str | None,
    data_dir: Path | None,
    redis_url: str | None,
    print_env: bool,
    adapters: Sequence[str] = (),
) -> None:
    from interpose_server import embedded

    served = with_adapters([Served.parse(text) for text in models], adapters)
    if len({model.name for model in served}) < len(served):
        raise ConfigError("two models have the same name; give one another with NAME=FOLDER")
    asyncio.run(embedded.serve(Wanted(served, host, port, device, dtype, data_dir, redis_url, print_env)))


def plan(
    model: str,
    devices: str | None,
    dtype: str | None,
    quantization: str | None,
    rows: int | None,
    context: int | None,
    shards: int | None,
    placement: str,
    revision: str | None,
    adapters: Sequence[str],
) -> None:
    from interpose_server.models.report import report

    options = {
        "dtype": dtype or "auto",
        "quantization": quantization,
        "revision": revision,
        "adapters": adapters_of(adapters),
    }
    report(model, devices, rows=rows, context=context, shards=shards, placement=placement, **options)


def status(data_dir: Path | None) -> bool:
    """Print it. Returns whether a server runs."""
    data = DataDir(data_dir or default_dir())
    facts = data.noted() if data.busy() else {}
    if not facts:
        typer.echo(f"no server runs on {data.path}")
        return False
    typer.echo(f"{facts['host']}, process {facts['pid']}")

    async def show() -> None:
        async with open_broker(data_dir, None) as broker:
            for hosted in await broker.models.list():
                waiting = await broker.queue.depth(hosted.name)
                typer.echo(f"{hosted.name}  {hosted.state}  {waiting} waiting")

    asyncio.run(show())
    return True


def create_key(user: str, admin: bool, models: Sequence[str], data_dir: Path | None, redis_url: str | None) -> None:
    async def create() -> None:
        async with open_broker(data_dir, redis_url) as broker:
            token, key = await broker.accounts.create(user, admin=admin, models=tuple(models))
            known = await broker.models.names()
        for name in models:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]}?" if close else f"; there is {', '.join(known) or 'none yet'}"
                typer.echo(f"note: no model {name!r} is known here{hint}", err=True)
        typer.echo(f"key {key.id} for {key.user}; it is shown only now:", err=True)
        typer.echo(token)

    asyncio.run(create())


def list_keys(data_dir: Path | None, redis_url: str | None) -> None:
    async def show() -> None:
        async with open_broker(data_dir, redis_url) as broker:
            keys = await broker.accounts.list()
            if not keys:
                typer.echo("there are no keys; `interpose keys create --user NAME` makes one", err=True)
            for key in keys:
                made = datetime.fromtimestamp(key.created_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
                role = "admin" if key.admin else "user"
                typer.echo(f"{key.id}  {key.user}  {role}  {', '.join(key.models) or 'all models'}  {made}")

    asyncio.run(show())


def revoke_key(key: str, data_dir: Path | None, redis_url: str | None) -> None:
    async def revoke() -> None:
        async with open_broker(data_dir, redis_url) as broker:
            await broker.accounts.revoke(key)
        typer.echo(f"key {key} is revoked", err=True)

    asyncio.run(revoke())


@asynccontextmanager
async def open_broker(data_dir: Path | None, redis_url: str | None) -> AsyncIterator[Broker]:
    """The broker at a URL, or that of the running server, or an embedded one started for the moment."""
    data = DataDir(data_dir or default_dir())
    valkey: Child | None = None
    if redis_url is None and data.busy():
        redis_url = data.noted().get("redis_url")
        if redis_url is None:
            raise ConfigError(f"a server is starting or stopping on {data.path}; try again in a moment")
    if redis_url is None:
        lock = data.lock()
        embedded = EmbeddedValkey(data.path)
        valkey = Child("Valkey", embedded.command(), lambda text: typer.echo(text, err=True), pass_fds=[lock])
        await valkey.start()
        await embedded.ready()
        redis_url = embedded.url
    broker = connect(Settings.read().model_copy(update={"redis_url": redis_url, "data_dir": data.path}))
    try:
        await broker.reach()
        yield broker
    finally:
        await broker.close()
        if valkey is not None:
            await valkey.stop(10)
        data.unlock()
