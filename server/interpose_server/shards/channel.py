"""One connection between two sites: frames out from any thread, frames in on a thread of its own."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from interpose.errors import InvalidPayload, ReplicaLost, Unauthorized

from .codec import pack
from .frames import Frame, Kind, read, written
from .greeting import HELLO_BYTES, PROOF_BYTES, Answering, Dialing

log = logging.getLogger(__name__)

GREETING_S = 10.0
"""A greeting takes no longer, however slowly its bytes come."""
DEAD_S = 20.0
"""A peer whose machine doesn't acknowledge what was sent for so long is gone."""
_BUFFER = 4 << 20
_AT_ONCE = 64
"""Buffers of one call to the system."""


class Channel:
    """An authenticated connection.

    Attributes:
        peer: the site at the other end.
        heard_at: when something last came (monotonic).
    """

    def __init__(self, sock: socket.socket, peer: int) -> None:
        self.peer = peer
        self.heard_at = time.monotonic()
        self._socket = sock
        self._sending = threading.Lock()
        self._closed = False

    @classmethod
    def dial(cls, address: tuple[str, int], secret: bytes, site: int, to: int) -> Channel:
        """Raises ReplicaLost if nobody answers there, Unauthorized if it isn't one of this replica."""
        try:
            sock = socket.create_connection(address, GREETING_S)
        except OSError as error:
            raise ReplicaLost(f"shard {to} can't be reached: {error.strerror or error}") from error
        try:
            until = time.monotonic() + GREETING_S
            dialing = Dialing(secret, site, to)
            sock.sendall(dialing.hello)
            answer = _exactly(sock, HELLO_BYTES + PROOF_BYTES, until)
            sock.sendall(dialing.answered(answer[:HELLO_BYTES], answer[HELLO_BYTES:]))
            return cls(_tuned(sock), to)
        except OSError as error:
            sock.close()
            raise ReplicaLost(f"shard {to} hung up: {error.strerror or error}") from error
        except Unauthorized:
            sock.close()
            raise

    @classmethod
    def answer(cls, sock: socket.socket, secret: bytes, site: int) -> Channel:
        """Raises Unauthorized, OSError; the socket is closed then."""
        try:
            until = time.monotonic() + GREETING_S
            answering = Answering(secret, site)
            sock.sendall(answering.hello(_exactly(sock, HELLO_BYTES, until)))
            peer = answering.proved(_exactly(sock, PROOF_BYTES, until))
            return cls(_tuned(sock), peer)
        except (OSError, Unauthorized):
            sock.close()
            raise

    def send(self, kind: Kind, call: int, nest: Any = None) -> None:
        """Raises BadArgument if that can't be sent, ReplicaLost if the peer is gone."""
        buffers = written(kind, call, pack(nest))
        with self._sending:
            self._write(buffers)

    def offer(self, kind: Kind) -> None:
        """Send a word without waiting for others who are sending: then the peer hears from us anyway."""
        if self._sending.acquire(blocking=False):
            try:
                self._write(written(kind, 0, pack(None)))
            finally:
                self._sending.release()

    def _write(self, buffers: list[memoryview]) -> None:
        try:
            _send(self._socket, buffers)
        except OSError as error:
            self.close()
            raise ReplicaLost(f"site {self.peer} is gone: {error.strerror or error}") from error

    def listen(self, take: Callable[[Channel, Frame], None], ended: Callable[[Channel, str], None]) -> None:
        """Take frames on a thread of its own until the connection ends, which `ended` is told once, and why."""

        def run() -> None:
            try:
                why = self._receive(take)
            except ReplicaLost as error:  # there was no answering it
                why = error.message
            except Exception as error:
                log.exception("the connection with site %d", self.peer)
                why = type(error).__name__
            self.close()
            ended(self, why)

        threading.Thread(target=run, name=f"from-site-{self.peer}", daemon=True).start()

    def _receive(self, take: Callable[[Channel, Frame], None]) -> str:
        while True:
            try:
                frame = _next(self._socket)
            except OSError as error:
                return "closed" if self._closed else str(error.strerror or error)
            except InvalidPayload as error:
                return error.message
            self.heard_at = time.monotonic()
            take(self, frame)

    def close(self) -> None:
        """Harmless to repeat; from any thread."""
        self._closed = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()


def _tuned(sock: socket.socket) -> socket.socket:
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(DEAD_S * 1000))
    return sock


def _exactly(sock: socket.socket, length: int, until: float) -> bytes:
    """Raises OSError, also where the stream ends before, or the time (monotonic) has come."""
    data = b""
    while len(data) < length:
        sock.settimeout(max(until - time.monotonic(), 0.001))
        part = sock.recv(length - len(data))
        if not part:
            raise ConnectionResetError("the peer closed the connection")
        data += part
    return data


def _next(sock: socket.socket) -> Frame:
    reader = read()
    try:
        while True:
            _fill(sock, next(reader))
    except StopIteration as done:
        frame: Frame = done.value
        return frame


def _fill(sock: socket.socket, buffers: list[memoryview]) -> None:
    """Raises OSError, also where the stream ends."""
    for group in _grouped(buffers):
        left = group
        while left:
            count = sock.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
            if not count:
                raise ConnectionResetError("the peer closed the connection")
            left = _after(left, count)


def _send(sock: socket.socket, buffers: list[memoryview]) -> None:
    for group in _grouped(buffers):
        left = group
        while left:
            left = _after(left, sock.sendmsg(left))


def _grouped(buffers: list[memoryview]) -> list[list[memoryview]]:
    some = iter(buffers)
    return list(iter(lambda: list(itertools.islice(some, _AT_ONCE)), []))


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of some buffers after their first `count` bytes."""
    for index, view in enumerate(buffers):
        if count < view.nbytes:
            return [view[count:], *buffers[index + 1 :]]
        count -= view.nbytes
    return []
