"""Running the operations of the table on real tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import IndexOutOfRange, InterposeError, OpFailed
from ..graph.ops import OPS, bind, lookup
from ..graph.values import DTYPES, TensorSpec
from ..wire.torch_tensors import TORCH as TORCH_DTYPES
from ..wire.torch_tensors import dtype_name
from . import kernels_checks, kernels_index, kernels_table

__all__ = ["KERNELS", "TORCH_DTYPES", "assign", "described", "dtype_name", "execute", "is_tensor"]

assert TORCH_DTYPES.keys() == DTYPES.keys()

KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(kernels_table.build())
"""Operation -> what computes it from arguments by parameter name."""

_PLACED = kernels_table.PLACED
_CHECKS = kernels_checks.CHECKS

_INTERNALS = re.compile(r"\[enforce fail at [^\]]*\] ?|\(?\S*/\S+\.(?:cpp|cu|h|py)(?::\d+)?\)?:? ?")


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def execute(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, device: torch.device | str | None = None
) -> Tensor | tuple[Tensor, ...]:
    """The result of an operation on real tensors.

    Indices are range-checked before the kernel runs.

    Args:
        device: where tensors made from nothing go; the CPU unless told otherwise.

    Raises:
        UnknownOp, BadArgument: it can't be called so.
        IndexOutOfRange: an index outside its dimension, with both figures.
        OpFailed: the kernel refused, in torch's words.
    """
    op = OPS.get(name)
    if op is None:
        op = lookup(name)
    bound = bind(op, args, kwargs, is_tensor)
    try:
        check = _CHECKS.get(name)
        if check is not None:
            check(bound)
        if bound.get("dtype") is not None:
            bound["dtype"] = TORCH_DTYPES[bound["dtype"].name]
        if name in _PLACED:
            bound["device"] = device
        result = KERNELS[name](**bound)
        return tuple(result) if isinstance(result, list) else result
    except Exception as error:
        raise _translated(name, error) from error


def assign(target: Tensor, index: Any, value: Any) -> None:
    """`target[index] = value` in place, indices checked, the value converted to the target's dtype.

    Raises as `execute` does.
    """
    items = index if isinstance(index, tuple) else (index,)
    try:
        kernels_checks.check_index(target, items)
        kernels_index.assign(target, items, value)
    except Exception as error:
        raise _translated("setitem", error) from error


def _translated(name: str, error: Exception) -> Exception:
    """The error a user sees. Failures of the device itself stay what they are."""
    if isinstance(error, (InterposeError, torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)):
        return error
    lines = str(error).strip().splitlines()
    message = _INTERNALS.sub("", lines[0][:600])[:400] if lines else type(error).__name__
    if isinstance(error, IndexError):
        return IndexOutOfRange(f"{name}: {message}")
    return OpFailed(f"{name}: {message}")


assert KERNELS.keys() == OPS.keys()


def described(value: Any) -> Any:
    """Arguments with every tensor replaced by its shape and dtype."""
    if isinstance(value, torch.Tensor):
        return TensorSpec(tuple(value.shape), dtype_name(value.dtype))
    if isinstance(value, (tuple, list)):
        return type(value)(described(item) for item in value)
    return value
