"""Connections that haven't proved yet whose they are: so many at once, and nobody can fill the room for others."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from contextlib import suppress


class Strangers:
    """One too many comes, and another goes: the oldest of the host that has the most of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._hosts: dict[socket.socket, str] = {}

    def come(self, sock: socket.socket, host: str) -> None:
        with self._lock:
            self._hosts[sock] = host
            if len(self._hosts) <= self._most:
                return
            (crowd, _), *_ = Counter(self._hosts.values()).most_common(1)
            oldest = next(other for other, of in self._hosts.items() if of == crowd)
            del self._hosts[oldest]
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # whoever reads from it closes it

    def leave(self, sock: socket.socket) -> bool:
        """Its greeting is over. Whether it was here until now."""
        with self._lock:
            return self._hosts.pop(sock, None) is not None
