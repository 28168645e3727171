"""What `interpose serve` was asked to serve, and where."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from interpose.errors import ConfigError

from .broker.keys import check_model


@dataclass(frozen=True, slots=True)
class Served:
    """A model to serve: the name clients use, and where its files are (a folder, or a hub id)."""

    name: str
    source: str

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


@dataclass(frozen=True, slots=True)
class Wanted:
    """The command line of `interpose serve`."""

    models: Sequence[Served]
    host: str = "127.0.0.1"
    port: int = 8000
    device: str | None = None
    dtype: str | None = None
    data_dir: Path | None = None
    redis_url: str | None = None
    print_env: bool = False

    @property
    def private(self) -> bool:
        """Whether only this machine can connect."""
        return loopback(self.host)


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
