"""What the user's code hands to a graph: arguments in the graph's vocabulary, and tensors from outside."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadArgument
from ..graph.values import DType, Ref, TensorSpec
from .outside import counts_writes, dtype_of, is_deferred, snapshot, spec_of, version_of

if TYPE_CHECKING:
    from .recorder import Recorder


class Attachments:
    """Tensors from outside the block, each attached once.

    Attributes:
        specs, tensors: by provisional key.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.specs: dict[str, TensorSpec] = {}
        self.tensors: dict[str, Any] = {}
        self._attached: dict[int, tuple[Any, int, int]] = {}
        self._kept: list[tuple[Any, int]] = []

    def plain(self, value: Any) -> Any:
        """An argument as the user wrote it, in the vocabulary of graphs. Tensors from outside are attached."""
        if value is None or value is ... or isinstance(value, (bool, str)):
            return value
        if is_deferred(value):
            return Ref(self._recorder.ref(value))
        if isinstance(value, (tuple, list)):
            items = [self.plain(item) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, slice):
            return slice(self.plain(value.start), self.plain(value.stop), self.plain(value.step))
        if type(value) is int or type(value) is float or isinstance(value, DType):
            return value
        if isinstance(value, (np.integer, np.floating, np.bool_)):
            return value.item()
        if isinstance(value, range):
            return list(value)
        dtype = dtype_of(value)
        if dtype is not None:
            return dtype
        if hasattr(value, "__array__") or hasattr(value, "__torch_function__"):
            return Ref(self.attach(value))
        if hasattr(value, "__index__"):
            return operator.index(value)
        raise BadArgument(
            f"a {type(value).__name__} can't go into a graph; tensors, arrays, numbers and slices can"
        )

    def attach(self, tensor: Any) -> int:
        """The node of a tensor from outside."""
        known = self._attached.get(id(tensor))
        if known is None or not self._as_attached(tensor):
            key = self._hold(tensor)
            node = self._recorder.node("attachment", (key,), invoke=None, when=None)
            known = self._attached[id(tensor)] = tensor, version_of(tensor), node
        return known[2]

    def keep(self, tensor: Any) -> str:
        """The key of a tensor that no node names: an input of a prompt."""
        self._kept.append((tensor, version_of(tensor)))
        return self._hold(tensor)

    def _hold(self, tensor: Any) -> str:
        key = f"{len(self.tensors):064x}"  # a digest is only worth its time where the tensor has to travel
        self.specs[key], self.tensors[key] = spec_of(tensor), snapshot(tensor)
        return key

    def check_unchanged(self) -> None:
        """Raises BadArgument if a tensor was changed after the line that used it."""
        for tensor, version in [*self._kept, *(entry[:2] for entry in self._attached.values())]:
            if version_of(tensor) != version:
                raise BadArgument("a tensor from outside was changed in the block after it was used; use a clone")

    def _as_attached(self, tensor: Any) -> bool:
        """Whether an array is still what it was when it was attached; most tensors count their writes instead."""
        if counts_writes(tensor):
            return True
        kept = self.tensors[self._recorder.nodes[self._attached[id(tensor)][2]].args[0]]
        if hasattr(tensor, "detach"):
            return bool(tensor.equal(kept))
        return bool(np.asarray(tensor).tobytes() == kept.tobytes())
