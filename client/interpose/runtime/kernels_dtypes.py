"""Dtypes by name: one fixed map."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..errors import BadArgument
from ..wire.torch_tensors import TORCH

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(TORCH)

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in graphs. Raises BadArgument for one without a wire meaning."""
    name = _NAMES.get(dtype)
    if name is None:
        raise BadArgument(f"{dtype} can't travel; convert first, for instance x.to(torch.float32)")
    return name
