"""Ports for who binds them later, or again."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress
from pathlib import Path


def free_port() -> int:
    """One of those that this machine gives to nobody by itself, so that nobody else comes by it meanwhile."""
    low, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    first = max(1024, low - 20_000)
    while True:
        port = first + secrets.randbelow(low - first) if low > first else 0
        with suppress(OSError), socket.create_server(("127.0.0.1", port)) as free:
            return int(free.getsockname()[1])
