"""The torch half of `tensors`. Importing it imports torch."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import BadArgument
from ..graph.values import DTYPES, TensorSpec

TORCH: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
_NAMES = {dtype: name for name, dtype in TORCH.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in graphs and on the wire. Raises BadArgument for one that has none."""
    name = _NAMES.get(dtype)
    if name is None:
        raise BadArgument(f"a tensor of {dtype} can't be sent; convert it to one of {', '.join(DTYPES)}")
    return name


def torch_dtype(tensor: torch.Tensor) -> str:
    """The wire's name of its dtype. Raises BadArgument if the tensor has no wire form."""
    name = dtype_name(tensor.dtype)
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        raise BadArgument("a sparse, nested or meta tensor can't be sent; make it a plain one first")
    return name


def torch_bytes(tensor: torch.Tensor) -> Any:
    """A flat NumPy view of the bytes; copied only from a device, a stride or a pending conjugate."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Flat first: a tensor without dimensions can't be viewed as a dtype of another size.
    return plain.reshape(-1).view(torch.uint8).numpy()


def decode_torch(spec: TensorSpec, buffer: bytearray | bytes | memoryview) -> torch.Tensor:
    """A tensor over a writable buffer of exactly the spec's bytes."""
    if not spec.nbytes:
        return torch.zeros(spec.shape, dtype=TORCH[spec.dtype])
    return torch.frombuffer(buffer, dtype=TORCH[spec.dtype]).reshape(spec.shape)
