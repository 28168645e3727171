"""What all verbs share: how errors end them, and the options that say which server is meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from ..errors import ConfigError, InterposeError

P = ParamSpec("P")
T = TypeVar("T")

DataDir = Annotated[Path | None, typer.Option(help="The server's data folder.", envvar="INTERPOSE_SERVER_DATA_DIR")]
RedisUrl = Annotated[
    str | None,
    typer.Option(help="A Redis of your own instead of the embedded Valkey.", envvar="INTERPOSE_SERVER_REDIS_URL"),
]
SharedRedisUrl = Annotated[
    str | None,
    typer.Option(
        help="The Redis that gateways and workers share. One with a password is better set by the variable.",
        envvar="INTERPOSE_SERVER_REDIS_URL",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the best there is.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as saved.")]
Adapter = Annotated[
    list[str] | None,
    typer.Option(help="LoRA weights that jobs may choose: NAME=FOLDER, or MODEL:NAME=FOLDER; may be repeated."),
]


def plainly(verb: Callable[P, T]) -> Callable[P, T]:
    """Errors of ours end the command with one line; a missing extra names the extra."""

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return verb(*args, **kwargs)
        except InterposeError as error:
            typer.echo(f"interpose: {error}", err=True)
            raise typer.Exit(1) from None
        except ModuleNotFoundError as error:
            extra = "cluster" if (error.name or "").partition(".")[0] == "ray" else "server"
            missing = ConfigError(f'this needs {error.name}; install it with: pip install "interpose[{extra}]"')
            typer.echo(f"interpose: {missing}", err=True)
            raise typer.Exit(1) from None

    return run


def adapters_of(texts: Sequence[str]) -> dict[str, str]:
    """Name -> source of adapters, each NAME=SOURCE. Raises ConfigError."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise ConfigError(f"{text!r}: an adapter is NAME=SOURCE")
        if name in found:
            raise ConfigError(f"{text!r}: there is an adapter {name!r} already")
        found[name] = source
    return found
