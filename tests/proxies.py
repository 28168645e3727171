"""Between a client and a server: a proxy that resets connections, or lets none through, when a test wants it to."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """Attributes:
    address: "127.0.0.1:port".
    cut: the n-th connection asked for `path` is reset after cut[n] bytes.
    """

    def __init__(self, host: str, cut: list[int], path: bytes) -> None:
        self.cut = cut
        self._path = path
        self._target = _split(host)
        self._next: tuple[str, int] | None = None
        self._up = True
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def retarget(self, host: str, *, after_a_cut: bool = False) -> None:
        """Send whoever connects from now on elsewhere, as a load balancer would; perhaps once one was cut."""
        if after_a_cut:
            self._next = _split(host)
        else:
            self._target = _split(host)

    def shut(self) -> None:
        """Reset every connection, and each new one."""
        self._up = False
        for end in list(self._open):
            _reset(end)

    def reopen(self) -> None:
        self._up = True

    def close(self) -> None:
        # A thread that waits in `accept` keeps the socket alive, unless it is told.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            head = client.recv(65536)
            if not self._up:
                _reset(client)
                return
            server = socket.create_connection(self._target)
            self._open |= {client, server}
            server.sendall(head)
            most = self.cut.pop(0) if self._path in head and self.cut else None
            threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
            self._pump(server, client, most)

    def _pump(self, source: socket.socket, target: socket.socket, most: int | None) -> None:
        sent = 0
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
                sent += len(data)
                if most is not None and sent > most:
                    self._target, self._next = self._next or self._target, None
                    _reset(target)
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open -= {source, target}


def _split(host: str) -> tuple[str, int]:
    name, port = host.removeprefix("http://").split(":")
    return name, int(port)


def _reset(end: socket.socket) -> None:
    """Closing with nothing lingering resets the connection: no goodbye of any kind."""
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@contextmanager
def proxied(host: str, cut: list[int] | None = None, path: bytes = b"") -> Iterator[Proxy]:
    proxy = Proxy(host, [] if cut is None else cut, path)
    try:
        yield proxy
    finally:
        proxy.close()
