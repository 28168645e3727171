"""`interpose deploy`: models on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import plainly

deploy = typer.Typer(help="Models on a Ray cluster.", no_args_is_help=True)

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file: models, and where Ray and Redis are.")]


@deploy.command()
@plainly
def up(
    config: ConfigFile,
    print_env: Annotated[bool, typer.Option("--print-env", help="Host and key on stdout once ready.")] = False,
) -> None:
    """Serve the models of a file on a Ray cluster; with a changed file, change what is served."""
    from . import cluster

    if not cluster.up(config, print_env):
        raise typer.Exit(1)


@deploy.command()
@plainly
def status(config: ConfigFile) -> None:
    """Show what is deployed and how it is."""
    from . import cluster

    if not cluster.status(config):
        raise typer.Exit(1)


@deploy.command()
@plainly
def down(
    config: ConfigFile,
    models: Annotated[list[str] | None, typer.Argument(help="Only these; default: all of the file.")] = None,
) -> None:
    """Take models down, once the jobs they have are over."""
    from . import cluster

    cluster.down(config, models or [])
