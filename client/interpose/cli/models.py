"""`interpose models`: the catalogue of a server that loads models when somebody asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import DataDir, RedisUrl, plainly

models = typer.Typer(help="Models of a server, loaded and let go on demand.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="As clients name it.")]


@models.command("list")
@plainly
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="All there is to know, for programs.")] = False,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """Show all models: state, copies, queue, and why one couldn't be loaded."""
    from . import catalogue

    catalogue.show(as_json, data_dir, redis_url)


@models.command()
@plainly
def add(
    name: Annotated[str | None, typer.Argument(help="As clients will name it.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Take entries from a YAML file: one, a list, or one with `models:`.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="A hub id, or a folder; default: the name.")] = None,
    revision: Annotated[str | None, typer.Option(help="The hub's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as saved.")] = None,
    quantization: Annotated[str | None, typer.Option(help="A scheme of the transformers library.")] = None,
    placement: Annotated[str | None, typer.Option(help="device, devices or blocks; default: by size.")] = None,
    devices: Annotated[
        float | None, typer.Option(help="Of one copy, also a part of one; default: by size.")
    ] = None,
    shards: Annotated[int | None, typer.Option(help="Of one copy; default: by size.")] = None,
    least: Annotated[int | None, typer.Option("--min", help="Copies that are always there; default 0.")] = None,
    most: Annotated[int | None, typer.Option("--max", help="Copies at most; default 1.")] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="Once loaded it stays.")] = False,
    idle_s: Annotated[float | None, typer.Option(help="Let go after so long without a job; default 900.")] = None,
    load_s: Annotated[float | None, typer.Option(help="Loading may take so long; default 1800.")] = None,
    schedule: Annotated[
        list[str] | None, typer.Option(help='Kept loaded then, in UTC: "mon-fri 08:00-20:00"; may be repeated.')
    ] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="LoRA weights: NAME=SOURCE; may be repeated.")] = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """Add a model, or replace its entry."""
    from . import catalogue

    given: dict[str, Any] = {
        "name": name,
        "source": source,
        "revision": revision,
        "dtype": dtype,
        "quantization": quantization,
        "placement": placement,
        "devices": devices,
        "shards": shards,
        "pinned": pinned or None,
        "idle_s": idle_s,
        "load_s": load_s,
        "schedule": schedule,
    }
    catalogue.add(given, (least, most), adapter or [], file, data_dir, redis_url)


@models.command()
@plainly
def remove(
    name: Name,
    now: Annotated[
        bool, typer.Option("--now", help="End the jobs that wait for it; those that run go on.")
    ] = False,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """Take a model out: it takes no more jobs, and goes once those it has are over."""
    from . import catalogue

    catalogue.remove(name, now, data_dir, redis_url)


@models.command()
@plainly
def load(
    name: Name,
    wait: Annotated[bool, typer.Option("--wait", help="Return once it runs jobs, or can't be loaded.")] = False,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """Have a model loaded before anybody asks, also if that failed before."""
    from . import catalogue

    catalogue.load(name, wait, data_dir, redis_url)


@models.command()
@plainly
def evict(name: Name, data_dir: DataDir = None, redis_url: RedisUrl = None) -> None:
    """Let a model go as soon as it has no work; the next job has it loaded again."""
    from . import catalogue

    catalogue.evict(name, data_dir, redis_url)


@models.command()
@plainly
def pin(name: Name, data_dir: DataDir = None, redis_url: RedisUrl = None) -> None:
    """Keep a model, once it is loaded."""
    from . import catalogue

    catalogue.pin(name, True, data_dir, redis_url)


@models.command()
@plainly
def unpin(name: Name, data_dir: DataDir = None, redis_url: RedisUrl = None) -> None:
    """Let a pinned model go again like any other."""
    from . import catalogue

    catalogue.pin(name, False, data_dir, redis_url)
