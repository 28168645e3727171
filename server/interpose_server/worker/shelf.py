"""Attachments in a worker's memory, where the model is: each brought there once for all jobs of its user."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import torch
from interpose.errors import MissingAttachment
from interpose.graph.values import TensorSpec
from interpose.wire.tensors import decode_tensor

from .. import attachments
from ..blobs import Blobs

_Key: TypeAlias = tuple[str, str, TensorSpec, bool]


@dataclass(frozen=True, slots=True)
class _Kept:
    tensor: torch.Tensor
    version: int

    @property
    def unchanged(self) -> bool:
        """Nothing writes into an attachment; should something do so all the same, other jobs don't see it."""
        return self.tensor._version == self.version


class Shelf:
    """Keeps what was used last. Users don't share: that another has a tensor would tell. Safe to use from threads.

    Args:
        most_bytes: of all that is kept.
        place: brings a tensor to the model's device.
    """

    def __init__(self, blobs: Blobs, most_bytes: int, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._blobs = blobs
        self._most = most_bytes
        self._place = place
        self._bytes = 0
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, user: str, sha: str, spec: TensorSpec, *, placed: bool) -> torch.Tensor:
        """A tensor of a user's over memory that others may read: not to be written to.

        Args:
            placed: whether it is wanted on the model's device; what a model is given is joined elsewhere first.

        Raises:
            MissingAttachment: it has expired.
            InvalidPayload: it was uploaded with another dtype or shape.
        """
        key = user, sha, spec, placed
        with self._lock:
            kept = self._take(key)
        if kept is None:
            kept = self._load(user, sha, spec, placed)
        with self._lock:
            self._put(key, kept)
        return kept.tensor.detach()

    def _load(self, user: str, sha: str, spec: TensorSpec, placed: bool) -> _Kept:
        data = attachments.load(self._blobs, user, sha, spec)
        if data is None:
            raise MissingAttachment(f"tensor {sha} has expired; submit the job again")
        tensor: torch.Tensor = decode_tensor(spec, data, "torch")
        if placed:
            # Where the batch under way has taken the device's memory, the job brings it there when it runs.
            with suppress(torch.OutOfMemoryError):
                tensor = self._place(tensor)
        return _Kept(tensor, tensor._version)

    def _take(self, key: _Key) -> _Kept | None:
        kept = self._kept.pop(key, None)
        if kept is None:
            return None
        self._bytes -= kept.tensor.nbytes
        return kept if kept.unchanged else None

    def _put(self, key: _Key, kept: _Kept) -> None:
        self._take(key)
        self._kept[key] = kept
        self._bytes += kept.tensor.nbytes
        while self._bytes > self._most:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.tensor.nbytes
