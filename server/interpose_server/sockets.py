"""A listening socket, and where it is found."""

from __future__ import annotations

import errno
import socket

from interpose.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError."""
    try:
        return _listen(host, port)
    except OSError as error:
        advice = (
            "; choose another port (--port, or `port` in a cluster's file), 0 takes a free one"
            if error.errno == errno.EADDRINUSE
            else ""
        )
        reason = f"{error.strerror or error}{advice}"
        raise ConfigError(f"can't listen on {host}:{port}: {reason}") from error


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(2048)
    except OSError:
        bound.close()
        raise
    return bound


def address_of(bound: socket.socket) -> tuple[str, int]:
    """Where this machine itself finds the socket."""
    host, port = bound.getsockname()[:2]
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


def url_of(bound: socket.socket, scheme: str = "http") -> str:
    host, port = address_of(bound)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
