"""A saved value as it came over the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..graph.values import TensorSpec
from .tensors import Backend, Buffer, decode_tensor
from .trees import Tree, unflatten


@dataclass(frozen=True, slots=True)
class Saved:
    """One saved value: its tree, and each tensor's meaning and bytes."""

    node: int
    tree: Tree
    specs: tuple[TensorSpec, ...]
    parts: tuple[Buffer, ...]

    def value(self, backend: Backend) -> Any:
        """The nest of tensors or arrays. Raises InvalidPayload if tree or bytes are malformed."""
        tensors = [decode_tensor(spec, part, backend) for spec, part in zip(self.specs, self.parts, strict=True)]
        return unflatten(self.tree, tensors)
