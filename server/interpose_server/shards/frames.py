"""Length-prefixed frames: a kind, a head in msgpack, tensors as raw bytes behind it. Without I/O.

    "IS" | kind: 1 byte | 1 spare | head's length: 4 | call: 8 | bytes of tensors: 8 | head | tensors

A call is a forward, a backward or an errand, numbered by who makes it: home, or a shard that asks for an errand. 0
is none.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from interpose.errors import BadArgument, InvalidPayload

from .codec import Opening, Packed

_PREFIX = struct.Struct("!2sBxIQQ")
_MAGIC = b"IS"

MAX_HEAD = 1 << 28
MAX_BODY = 1 << 36
"""No frame's tensors take more; a node has less memory than that to spare."""


class Kind(IntEnum):
    """What a frame says. Home -> shard, shard -> home, or from one to the next."""

    JOIN = 1
    """Home: where the others are. Answered with JOINED."""
    JOINED = 2
    VISIT = 3
    """Home: the visit of a forward, and mail that needs no gradients."""
    PARCEL = 4
    """Hidden states and mail, on."""
    REPLY = 5
    """Shard: what its guest says of a forward or a backward."""
    LANDED = 6
    """The last shard that a forward came to, and what it brings home."""
    WAVE = 7
    """Home: the work of a backward, and mail."""
    EBB = 8
    """Gradients and mail, back."""
    EBBED = 9
    """The first shard: a backward has come by."""
    FAILED = 10
    """A forward, a backward or an errand ends here."""
    ERRAND = 11
    """Home: one for a shard. Shard: one for home, or by home for another shard. Answered with DONE."""
    DONE = 12
    DROP = 13
    PING = 14
    PONG = 15


@dataclass(frozen=True)
class Frame:
    """One that came. `open` makes its nest, on the thread that needs it."""

    kind: Kind
    call: int
    _content: Opening

    def open(self, device: torch.device | None = None) -> Any:
        """Tensors that came from an accelerator go to `device`. Raises InvalidPayload."""
        return self._content.nest(device)


def written(kind: Kind, call: int, packed: Packed) -> list[memoryview]:
    """A frame as buffers to be sent one after another. Raises BadArgument if it is too large."""
    size = sum(view.nbytes for view in packed.tensors)
    if len(packed.head) > MAX_HEAD or size > MAX_BODY:
        raise BadArgument(f"{len(packed.head) + size:,} bytes are too many for one message to a shard")
    prefix = _PREFIX.pack(_MAGIC, kind, len(packed.head), call, size)
    return [memoryview(prefix + packed.head), *(view for view in packed.tensors if view.nbytes)]


Reader = Generator[list[memoryview], None, Frame]
"""Yields buffers to be filled in order, again and again; returns the frame."""


def read() -> Reader:
    """Read one frame. Raises InvalidPayload on anything else, before it takes memory for it."""
    prefix = bytearray(_PREFIX.size)
    yield [memoryview(prefix)]
    magic, number, length, call, size = _PREFIX.unpack(prefix)
    if magic != _MAGIC or length > MAX_HEAD or size > MAX_BODY:
        raise InvalidPayload("no frame of a shard's link")
    try:
        kind = Kind(number)
    except ValueError as error:
        raise InvalidPayload(f"a frame of kind {number}") from error
    head = bytearray(length)
    yield [memoryview(head)]
    content = Opening(head, size)
    if content.nbytes != size:
        raise InvalidPayload("a frame's tensors aren't as long as it says")
    if size:
        yield content.buffers()
    return Frame(kind, call, content)
