"""Values from outside a block: what may go into a graph, and as what."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import BadArgument
from ..graph.values import DTYPES, DType, TensorSpec


def is_deferred(value: Any) -> bool:
    """Whether a value is still to come."""
    return getattr(type(value), "_interpose_deferred", False)


def dtype_of(value: Any) -> DType | None:
    """A torch or NumPy dtype as the graph's."""
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        name = np.dtype(value).name
    else:
        name = str(value).removeprefix("torch.") if type(value).__name__ == "dtype" else ""
    return DType(name) if name in DTYPES else None


def is_dtype(value: Any) -> bool:
    """Whether a value is a dtype: the graph's, torch's or NumPy's."""
    return isinstance(value, DType) or dtype_of(value) is not None


def spec_of(tensor: Any) -> TensorSpec:
    """Shape and dtype of a real tensor or array. Raises BadArgument for dtypes without a wire meaning."""
    dtype = dtype_of(tensor.dtype) if hasattr(tensor, "dtype") else None
    if dtype is None:
        raise BadArgument(f"a {type(tensor).__name__} of {getattr(tensor, 'dtype', '?')} can't go into a graph")
    return TensorSpec(tuple(tensor.shape), dtype.name)


def snapshot(tensor: Any) -> Any:
    """The tensor as it is now, free of its autograd history; what doesn't count its writes is copied."""
    if not hasattr(tensor, "detach"):
        return np.array(tensor)
    return tensor.detach() if counts_writes(tensor) else tensor.clone()


def counts_writes(tensor: Any) -> bool:
    """Whether `version_of` tells of every write: not of arrays, nor of tensors made in inference mode."""
    return hasattr(tensor, "detach") and not tensor.is_inference()


def version_of(tensor: Any) -> int:
    """How often a tensor was written; 0 where that isn't counted."""
    return int(tensor._version) if counts_writes(tensor) else 0
