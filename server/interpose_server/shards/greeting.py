"""How two processes of one replica know each other: both prove that they hold its secret. Without I/O.

The one that dials says hello, with a fresh number; the other answers with one of its own and with proof over both;
the first proves it too. Nothing else is read before, and whatever is read until then is of fixed length. What
follows is not encrypted: a cluster's network is its operator's.
"""

from __future__ import annotations

import hmac
import secrets
import struct

from interpose.errors import Unauthorized

MAGIC = b"interpose-site-1"
_HELLO = struct.Struct("!16sHH32s")
HELLO_BYTES = _HELLO.size
PROOF_BYTES = 32
SHORTEST = 16
"""Bytes of a secret."""


class Dialing:
    """The side that dials: send `hello`, feed the answer to `answered`, send what it returns."""

    def __init__(self, secret: bytes, site: int, to: int) -> None:
        self._secret = checked(secret)
        self._to = to
        self.hello = _HELLO.pack(MAGIC, site, to, secrets.token_bytes(32))

    def answered(self, hello: bytes, proof: bytes) -> bytes:
        """Raises Unauthorized unless the one who answered holds the secret and is who was dialled."""
        if not hmac.compare_digest(proof, _proof(self._secret, b"answer", self.hello, hello)):
            raise Unauthorized("the process that answered doesn't belong to this replica")
        magic, site, _, _ = _HELLO.unpack(hello)
        if magic != MAGIC or site != self._to:
            raise Unauthorized(f"site {site} answered in place of {self._to}")
        return _proof(self._secret, b"dial", self.hello, hello)


class Answering:
    """The side that listens: feed it the hello, send its answer, feed it the proof."""

    def __init__(self, secret: bytes, site: int) -> None:
        self._secret = checked(secret)
        self._site = site
        self._hellos = (b"", b"")
        self._peer = -1

    def hello(self, hello: bytes) -> bytes:
        """The answer. Raises Unauthorized if whoever dialled speaks something else, or means another site."""
        magic, peer, to, _ = _HELLO.unpack(hello)
        if magic != MAGIC or to != self._site:
            raise Unauthorized("whoever dialled doesn't mean this site")
        own = _HELLO.pack(MAGIC, self._site, peer, secrets.token_bytes(32))
        self._hellos, self._peer = (hello, own), peer
        return own + _proof(self._secret, b"answer", hello, own)

    def proved(self, proof: bytes) -> int:
        """Who dialled. Raises Unauthorized unless it holds the secret."""
        if not hmac.compare_digest(proof, _proof(self._secret, b"dial", *self._hellos)):
            raise Unauthorized("whoever dialled doesn't belong to this replica")
        return self._peer


def _proof(secret: bytes, side: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(secret, side + first + second, "sha256")


def checked(secret: bytes) -> bytes:
    """Raises ValueError if it is too short."""
    if len(secret) < SHORTEST:
        raise ValueError(f"a replica's secret has at least {SHORTEST} bytes")
    return secret
