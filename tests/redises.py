"""A Redis of an operator's own: Debian's redis-server behind TLS, with a user and a password, and a log on disk."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

from certificates import certificate
from ports import free_port
from rig import started

BINARY = shutil.which("redis-server")
PASSWORD = "p@ss:word/%?#"
"""Each sign of it has to be written as %XX in a URL."""


class OwnRedis:
    """It can be killed and started again. Attributes: url: with all that a client needs."""

    def __init__(self, folder: Path) -> None:
        assert BINARY is not None
        made = certificate(folder)
        port = free_port()
        digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
        self._config = folder / "redis.conf"
        self._config.write_text(
            f"port 0\ntls-port {port}\nbind 127.0.0.1\ntls-auth-clients no\n"
            f"tls-cert-file {made.file}\ntls-key-file {made.key}\ntls-ca-cert-file {made.file}\n"
            # The log is read back as the default user: with that one off, every transaction in it is lost.
            f"user default on #{digest} ~* &* +@all\nuser lab on #{digest} ~* &* +@all\n"
            f'dir {folder}\nsave ""\nappendonly yes\nappendfsync always\nmaxmemory-policy noeviction\n'
        )
        self.url = (
            f"rediss://lab:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/0?ssl_ca_certs={quote(str(made.file))}"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = started(self.url, str(BINARY), str(self._config))

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
