"""The far end of a TCP connection on this machine, and the near end. Needs no packages.

Run as a script, it is the far end: prints its port; for each message, a number of 8 bytes, it takes so many bytes
into one buffer and answers with one.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Link:
    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def announce(self, size: int) -> None:
        """So many bytes follow."""
        self._socket.sendall(size.to_bytes(8, "big"))

    def send(self, data: memoryview) -> None:
        self._socket.sendall(data)

    def arrived(self) -> None:
        """Waits until the far end has all that was announced."""
        assert self._socket.recv(1) == b"!"

    def close(self) -> None:
        self._socket.close()


@contextmanager
def link() -> Iterator[Link]:
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        made = Link(int(process.stdout.readline()))
        try:
            yield made
        finally:
            made.close()
    finally:
        process.wait(10)
        process.stdout.close()


def far_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    with connection:
        kept = bytearray()
        while size := int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big"):
            kept = kept if len(kept) == size else bytearray(size)
            view, got = memoryview(kept), 0
            while got < size:
                got += connection.recv_into(view[got:])
            connection.sendall(b"!")


if __name__ == "__main__":
    far_end()
