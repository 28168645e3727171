"""What `interpose serve` was asked to serve, and where."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from interpose.errors import ConfigError
from interpose.graph.adapters import check_name

from .broker.keys import check_model


@dataclass(frozen=True, slots=True)
class Served:
    """A model to serve: the name clients use, and where its files are (a folder, or a hub id).

    `adapters`: name -> folder or hub id of LoRA weights that jobs may choose.
    """

    name: str
    source: str
    adapters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Served:
        """A hub id, a folder (served under its base name), or NAME=FOLDER. Raises ConfigError, InvalidPayload."""
        name, equals, folder = text.partition("=")
        if equals:
            if not Path(folder).expanduser().is_dir():
                raise ConfigError(f"{text!r}: there is no folder {folder!r}")
            return cls(check_model(name), str(Path(folder).expanduser().resolve()))
        path = Path(text).expanduser()
        if path.is_dir():
            return cls(check_model(path.resolve().name), str(path.resolve()))
        if text.startswith((".", "/", "~")):
            raise ConfigError(f"there is no folder {text!r}")
        return cls(check_model(text), text)


def with_adapters(models: Sequence[Served], texts: Sequence[str]) -> list[Served]:
    """The models with the adapters that the command line gives them, each NAME=SOURCE or MODEL:NAME=SOURCE.

    Raises ConfigError.
    """
    found = {model.name: dict(model.adapters) for model in models}
    for text in texts:
        name, equals, source = text.partition("=")
        model, colon, own = name.rpartition(":")
        if not equals or not source or not own:
            raise ConfigError(f"--adapter {text!r}: write NAME=FOLDER, or MODEL:NAME=FOLDER")
        if not colon and len(models) > 1:
            raise ConfigError(f"--adapter {text!r}: say of which model it is: {models[0].name}:{text}")
        if colon and model not in found:
            raise ConfigError(f"--adapter {text!r}: no model {model!r} is served here, but {', '.join(found)}")
        of = found[model if colon else models[0].name]
        if own in of:
            raise ConfigError(f"--adapter {text!r}: there is an adapter {own!r} already")
        of[check_name(own)] = _adapter(text, source)
    return [replace(model, adapters=found[model.name]) for model in models]


def _adapter(text: str, source: str) -> str:
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ConfigError(f"--adapter {text!r}: there is no folder {source!r}")
    return source


@dataclass(frozen=True, slots=True)
class Wanted:
    """The command line of `interpose serve`. `gateway`: whether one is started, too."""

    models: Sequence[Served]
    host: str = "127.0.0.1"
    port: int = 8000
    device: str | None = None
    dtype: str | None = None
    data_dir: Path | None = None
    redis_url: str | None = None
    print_env: bool = False
    gateway: bool = True

    @property
    def private(self) -> bool:
        """Whether only this machine can connect."""
        return loopback(self.host)


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
