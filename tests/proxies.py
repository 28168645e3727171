"""Between a client and a server: a proxy that resets connections when a test wants it to."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def proxied(host: str, cut: list[int], path: bytes) -> Iterator[str]:
    """A server's address through a proxy that resets the n-th connection asked for `path` after cut[n] bytes.

    Once the block is left nothing listens there, and what was open stays so.
    """
    name, port = host.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, (name, int(port)), cut, path), daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    # A thread that waits in `accept` keeps the socket alive, unless it is told.
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def _accept(listener: socket.socket, target: tuple[str, int], cut: list[int], path: bytes) -> None:
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(client, target, cut, path), daemon=True).start()


def _serve(client: socket.socket, target: tuple[str, int], cut: list[int], path: bytes) -> None:
    head = client.recv(65536)
    server = socket.create_connection(target)
    server.sendall(head)
    most = cut.pop(0) if path in head and cut else None
    threading.Thread(target=_pump, args=(client, server, None), daemon=True).start()
    _pump(server, client, most)


def _pump(source: socket.socket, target: socket.socket, most: int | None) -> None:
    sent = 0
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
            sent += len(data)
            if most is not None and sent > most:
                # Closing with nothing lingering resets the connection: no goodbye of any kind.
                target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                break
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
