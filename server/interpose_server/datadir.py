"""A data folder: one server at a time, and a note of how to reach it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import platformdirs
from interpose.errors import ConfigError

WAIT_S = 3.0
"""How long a folder may still be in use by the last children of a server that was killed."""


def default_dir() -> Path:
    return Path(platformdirs.user_data_dir("interpose")) / "server"


class DataDir:
    """Attributes: path: absolute, made if it wasn't there, for its owner only."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"the data folder {self.path} can't be made: {error.strerror}") from error
        self._lock: int | None = None

    def lock(self, wait_s: float = WAIT_S) -> int:
        """Take the folder. Returns the descriptor that holds it: a child that inherits it holds it too.

        Raises:
            ConfigError: a server is running on it.
        """
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        ends = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > ends:
                    os.close(descriptor)
                    raise ConfigError(
                        f"another server runs on {self.path}; stop it or choose a --data-dir"
                    ) from None
                time.sleep(0.05)
            else:
                self._lock = descriptor
                return descriptor

    def busy(self) -> bool:
        """Whether a server runs on it."""
        try:
            self.lock(wait_s=0)
        except ConfigError:
            return True
        self.unlock()
        return False

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_private(self, name: str, text: str) -> None:
        """Replace a small file that only its owner may read."""
        new = self.path / f".{name}.{os.getpid()}"
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        new.replace(self.path / name)

    def read(self, name: str) -> str | None:
        with suppress(FileNotFoundError):
            return (self.path / name).read_text()
        return None

    def note(self, **facts: str) -> None:
        """Tell the command line how to reach the running server."""
        self.write_private("server.json", json.dumps(facts))

    def noted(self) -> dict[str, str]:
        plain = json.loads(self.read("server.json") or "{}")
        return {str(name): str(value) for name, value in plain.items()} if isinstance(plain, dict) else {}

    def forget(self) -> None:
        (self.path / "server.json").unlink(missing_ok=True)
