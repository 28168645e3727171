"""What a job's values take while it runs, where shapes couldn't tell before."""

from __future__ import annotations

from typing import Any

import torch

from ..graph.limits import Limits
from . import nests


class Held:
    """Counts the memory of values, once however many look into it. Raises LimitExceeded beyond the job's limit.

    Attributes:
        bytes: held now.
    """

    def __init__(self, limits: Limits) -> None:
        self.bytes = 0
        self._limits = limits
        self._counts: dict[int, int] = {}

    def add(self, value: Any) -> None:
        for _, tensor in nests.tensors(value):
            memory = tensor.untyped_storage()
            count = self._counts.get(memory.data_ptr(), 0)
            self._counts[memory.data_ptr()] = count + 1
            if not count:
                self.bytes += memory.nbytes()
        self._limits.check("memory_bytes", self.bytes)

    def drop(self, value: Any) -> None:
        """What was added goes; what wasn't changes nothing."""
        for _, tensor in nests.tensors(value):
            memory = tensor.untyped_storage()
            count = self._counts.pop(memory.data_ptr(), 0)
            if count > 1:
                self._counts[memory.data_ptr()] = count - 1
            elif count:
                self.bytes -= memory.nbytes()


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it would keep alive a memory much larger than itself."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > 2 * tensor.nbytes + 4096 else tensor
