"""Tensors users upload: a line with dtype and shape, then the bytes; a blob's name is the SHA-256 of all that."""

from __future__ import annotations

from interpose.errors import InvalidPayload
from interpose.graph.values import TensorSpec
from interpose.wire.tensors import Buffer, shape_text

from . import blob_keys
from .blobs import Blobs


def head(spec: TensorSpec) -> bytes:
    return f"{spec.dtype} {shape_text(spec)}\n".encode()


def store(blobs: Blobs, user: str, sha: str, spec: TensorSpec, data: Buffer, ttl_s: float) -> None:
    """Keep a tensor whose name was checked. Raises StorageFull."""
    key = blob_keys.tensor(user, sha)
    if blobs.keep(key, ttl_s) is None:
        blobs.put(key, [head(spec), data], ttl_s)


def load(blobs: Blobs, user: str, sha: str, spec: TensorSpec) -> bytearray | None:
    """The tensor's raw bytes, in memory of their own; None if it isn't there.

    Raises:
        InvalidPayload: it was uploaded with another dtype or shape than the graph says.
    """
    reader = blobs.open(blob_keys.tensor(user, sha))
    if reader is None:
        return None
    try:
        expected = head(spec)
        found = bytearray(len(expected))
        reader.readinto(0, memoryview(found))
        if found != expected or reader.size != len(expected) + spec.nbytes:
            raise InvalidPayload(f"attachment {sha} was uploaded with another dtype or shape than the graph says")
        data = bytearray(spec.nbytes)
        done = 0
        while done < len(data):
            more = reader.readinto(len(expected) + done, memoryview(data)[done:])
            if not more:
                return None
            done += more
        return data
    finally:
        reader.close()
