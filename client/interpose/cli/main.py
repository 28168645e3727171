"""The `interpose` command. Each verb imports what it needs when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import Adapter, DataDir, Device, Dtype, RedisUrl, SharedRedisUrl, plainly
from .deploy import deploy
from .models import models

app = typer.Typer(
    name="interpose",
    help="Read and change the inside of a neural network that runs somewhere else.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="API keys of a server.", no_args_is_help=True)
app.add_typer(keys, name="keys")
app.add_typer(models, name="models")
app.add_typer(deploy, name="deploy")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"interpose {version('interpose')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Read and change the inside of a neural network that runs somewhere else."""


@app.command()
@plainly
def serve(
    models: Annotated[list[str], typer.Argument(help="A hub id, a folder, or NAME=FOLDER.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    device: Device = None,
    dtype: Dtype = None,
    adapter: Adapter = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    print_env: Annotated[bool, typer.Option("--print-env", help="Host and key on stdout once ready.")] = False,
) -> None:
    """Serve models from this machine."""
    from . import server

    server.serve(models, host, port, device, dtype, data_dir, redis_url, print_env, adapter or [])


@app.command()
@plainly
def plan(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or a config.json: no weights are needed.")],
    devices: Annotated[
        str | None,
        typer.Option(
            help="8x80GB; 2x24GB,1x48GB; 4x80GB+4x80GB on two machines. Left out: the fewest of 24, 48, 80, 141 GB."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as saved.")] = None,
    quantization: Annotated[str | None, typer.Option(help="A scheme; default: as saved.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of a batch.", min=1)] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of each row.", min=1)] = None,
    shards: Annotated[int | None, typer.Option(help="Ranges of blocks; default: by size.", min=1)] = None,
    placement: Annotated[str, typer.Option(help="auto, device, devices, blocks.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="The hub's.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="LoRA weights it is to have: NAME=SOURCE; may be repeated.")
    ] = None,
) -> None:
    """Show how a model would lie on devices, and what each would hold. Loads nothing."""
    from . import server

    server.plan(model, devices, dtype, quantization, rows, context, shards, placement, revision, adapter or [])


@app.command()
@plainly
def gateway(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate and its chain, PEM.", exists=True, dir_okay=False)
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.", exists=True, dir_okay=False)] = None,
    data_dir: DataDir = None,
    redis_url: SharedRedisUrl = None,
) -> None:
    """Serve the HTTP API alone, over a Redis and a blob store that workers share."""
    from . import alone

    alone.gateway(host, port, tls_cert, tls_key, data_dir, redis_url)


@app.command()
@plainly
def worker(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or NAME=FOLDER.")],
    device: Device = None,
    dtype: Dtype = None,
    adapter: Adapter = None,
    data_dir: DataDir = None,
    redis_url: SharedRedisUrl = None,
) -> None:
    """Run one copy of a model for the gateways on a Redis. Start several for more copies."""
    from . import alone

    alone.worker(model, device, dtype, adapter or [], data_dir, redis_url)


@app.command()
@plainly
def status(data_dir: DataDir = None) -> None:
    """Show the server that runs on a data folder, and its models."""
    from . import server

    if not server.status(data_dir):
        raise typer.Exit(1)


@keys.command("create")
@plainly
def create_key(
    user: Annotated[str, typer.Option(help="Who will use it.")],
    admin: Annotated[bool, typer.Option("--admin", help="May make keys, manage models, read figures.")] = False,
    models: Annotated[list[str] | None, typer.Option(help="Only these models; may be repeated.")] = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """Make a key. Its token is printed this once, on stdout."""
    from . import server

    server.create_key(user, admin, models or [], data_dir, redis_url)


@keys.command("list")
@plainly
def list_keys(data_dir: DataDir = None, redis_url: RedisUrl = None) -> None:
    """Show all keys, without their tokens."""
    from . import server

    server.list_keys(data_dir, redis_url)


@keys.command("revoke")
@plainly
def revoke_key(
    key: Annotated[str, typer.Argument(help="The key's id, as `keys list` shows it.")],
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """Revoke a key at once, its open streams included."""
    from . import server

    server.revoke_key(key, data_dir, redis_url)


if __name__ == "__main__":
    sys.exit(app())
