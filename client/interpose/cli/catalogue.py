"""What `interpose models` does: needs the server's package, and talks to its broker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import typer
from interpose_server.broker.connect import Broker
from interpose_server.broker.states import ModelState
from interpose_server.datadir import DataDir, default_dir
from interpose_server.models.inventory import Inventory, copies, count
from interpose_server.models.overview import overview, take_out
from interpose_server.models.spec import ModelSpec, read_specs

from ..errors import ConfigError, ModelFailed
from .common import adapters_of
from .server import open_broker

T = TypeVar("T")

POLL_S = 0.3


def show(as_json: bool, data_dir: Path | None, redis_url: str | None) -> None:
    async def look(broker: Broker) -> tuple[list[dict[str, Any]], bool, Inventory | None]:
        return await overview(broker), await broker.specs.kept(), await broker.specs.shown()

    found, kept, devices = _on(look, data_dir, redis_url)
    if as_json:
        told = None if devices is None else devices.summary()
        typer.echo(json.dumps({"models": found, "kept": kept, "devices": told}, indent=2))
        return
    for line in told_of(found, devices):
        typer.echo(line)
    if not found:
        typer.echo("there are no models; `interpose models add` adds one", err=True)
    if not kept and any(model["spec"] for model in found):
        typer.echo("nothing loads them at the moment: `interpose deploy up` does", err=True)


def told_of(models: Sequence[Mapping[str, Any]], devices: Inventory | None) -> Iterator[str]:
    """Models, and the devices they are on, for people. `models`: as `overview` has them."""
    if devices is not None:
        why = "" if devices.kind == "GPU" else "; no node has a GPU"
        nodes = f"{len(devices.nodes)} node{'s' * (len(devices.nodes) != 1)}"
        yield f"{devices.free:g} of {count(devices.total, devices.kind)} free, {nodes}{why}"
        if len(devices.nodes) > 1:
            yield from (f"    {node.name}: {node.free:g} of {node.total:g} free" for node in devices.nodes)
    for model in models:
        yield "\n    ".join(_lines(model, devices.kind if devices else ""))


def add(
    given: dict[str, Any],
    replicas: tuple[int | None, int | None],
    adapters: Sequence[str],
    file: Path | None,
    data_dir: Path | None,
    redis_url: str | None,
) -> None:
    """Add what options say (None: not given), or what is in a file."""
    plain = {name: value for name, value in given.items() if value is not None}
    least, most = replicas
    if least is not None or most is not None:
        plain["replicas"] = {"min": least or 0, "max": most if most is not None else max(least or 0, 1)}
    if adapters:
        plain["adapters"] = adapters_of(adapters)
    if (file is None) == (not plain):
        raise ConfigError("give a name with its options, or --file")
    if file is None and "name" not in plain:
        raise ConfigError("give the model a name")
    specs = read_specs(file) if file is not None else [ModelSpec.checked(plain).located(Path.cwd())]

    async def put(broker: Broker) -> list[bool]:
        return [await broker.specs.put(spec) for spec in specs]

    for spec, new in zip(specs, _on(put, data_dir, redis_url), strict=True):
        typer.echo(f"{spec.name} is {'in the catalogue' if new else 'replaced'}", err=True)


def remove(name: str, now: bool, data_dir: Path | None, redis_url: str | None) -> None:
    ended = _on(lambda broker: take_out(broker, name, now=now), data_dir, redis_url)
    told = f"; {ended} jobs that waited for it have ended" if now else ""
    typer.echo(f"{name} takes no more jobs, and goes once those it has are over{told}", err=True)


def load(name: str, wait: bool, data_dir: Path | None, redis_url: str | None) -> None:
    async def ask(broker: Broker) -> None:
        await broker.specs.load(name)
        if wait:
            await _loaded(broker, name)

    _on(ask, data_dir, redis_url)
    typer.echo(f"{name} {'is ready' if wait else 'is to be loaded'}", err=True)


def evict(name: str, data_dir: Path | None, redis_url: str | None) -> None:
    _on(lambda broker: broker.specs.evict(name), data_dir, redis_url)
    typer.echo(f"{name} goes as soon as it has no work", err=True)


def pin(name: str, pinned: bool, data_dir: Path | None, redis_url: str | None) -> None:
    _on(lambda broker: broker.specs.pin(name, pinned), data_dir, redis_url)
    typer.echo(f"{name} {'stays, once it is loaded' if pinned else 'may be let go'}", err=True)


async def _loaded(broker: Broker, name: str) -> None:
    """Return once a model runs jobs. Raises ModelFailed."""
    while True:
        hosted = await broker.models.get(name)
        if hosted.state is ModelState.READY:
            return
        if hosted.failure is not None and hosted.failure.final:
            # The operator's own words for it, not those for users.
            raise ModelFailed(f"{name} can't be loaded ({hosted.failure.reason}): {hosted.failure.detail}")
        await asyncio.sleep(POLL_S)


def _on(ask: Callable[[Broker], Awaitable[T]], data_dir: Path | None, redis_url: str | None) -> T:
    """What the broker answers. Says so where no server runs: the entries are kept for one that may come."""
    data = DataDir(data_dir or default_dir())
    if redis_url is None and not data.busy():
        typer.echo(f"no server runs on {data.path}; --data-dir names another folder", err=True)

    async def run() -> T:
        async with open_broker(data_dir, redis_url) as broker:
            return await ask(broker)

    return asyncio.run(run())


def _lines(model: Mapping[str, Any], kind: str) -> list[str]:
    """A model for people: one line, and below it what needs one of its own. `kind`: of the devices."""
    ready = model["copies"].get("ready", 0)
    head = [model["id"], model["state"], f"{ready} {'copy' if ready == 1 else 'copies'}"]
    head += [f"{model['waiting']} waiting", f"{model['running']} running"]
    head += [word for word in ("pinned", "removed") if model[word]]
    lines = ["  ".join(head)]
    lines += [f"a copy takes {copies(model['takes'], kind)}"] if model["takes"] else []
    lines += [_held(worker, held, kind) for worker, held in _by_worker(model).items()]
    if model["pending"]:
        lines.append(f"{model['pending']} more to come: there is no room yet, or it is being started")
    if (held := model["held_back"]) is not None:
        lines.append(f"its entry can't be ({held['reason']}): {held['detail']}")
        before = "the version before is served" if held["served"] else "it isn't loaded"
        lines.append(f"{before} until it can, or until the entry is another")
    if (failure := model["failure"]) is not None:
        at = datetime.fromtimestamp(failure["retry_ms"] / 1000, UTC).strftime("%H:%M:%S")
        again = f"tried again from {at} UTC on if somebody asks, or by: interpose models load {model['id']}"
        lines += [f"{failure['reason']}: {failure['detail']}", again]
    return lines + ([model["note"]] if model["note"] else [])


def _by_worker(model: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for held in model["holds"]:
        found.setdefault(held["worker"], []).append(held)
    return found


def _held(worker: str, held: Sequence[Mapping[str, Any]], kind: str) -> str:
    """One copy: its worker, and the devices it has of each node."""
    nodes: dict[str, float] = {}
    for part in held:
        nodes[part["node"]] = nodes.get(part["node"], 0.0) + part["devices"]
    name = worker.rpartition("#")[2][:8]
    return f"copy {name}: " + ", ".join(f"{count(number, kind)} of {node}" for node, number in nodes.items())
