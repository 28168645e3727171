"""Tensors as bytes: a dtype's name, a shape, and raw little-endian bytes in row-major order.

torch tensors and NumPy arrays alike (bfloat16 and float8 through ml_dtypes). Bytes are views of the tensor's own
memory wherever it is contiguous, and tensors are built over the bytes received, without a copy.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np

from ..errors import BadArgument, InvalidPayload
from ..graph.values import DTYPES, TensorSpec
from .fields import Fields

SAFETENSORS = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
"""dtype -> what the safetensors format calls it, for those it has."""

Backend: TypeAlias = Literal["torch", "numpy"]
Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_DIMS = 16
MAX_SIZE = 1 << 40

NUMPY: dict[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, name) if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2") else name)
    for name in DTYPES
}
_NAMES = {dtype: name for name, dtype in NUMPY.items()}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor's bytes beside what they mean. `data` is flat and keeps the tensor's memory alive."""

    spec: TensorSpec
    data: memoryview

    @property
    def sha(self) -> str:
        return digest(self.spec, self.data)


def is_tensor(value: Any) -> bool:
    """Whether `value` is a torch tensor, a NumPy array or a NumPy scalar. Never imports torch."""
    return isinstance(value, (np.ndarray, np.generic)) or is_torch(value)


def is_torch(value: Any) -> bool:
    """Whether a value is a torch tensor. Never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def encode_tensor(value: Any) -> Encoded:
    """The bytes of a torch tensor, a NumPy array or a NumPy scalar; a view where it can be one.

    Raises:
        BadArgument: not a tensor, or one with no wire form (sparse, quantised, on the meta device, uint16, ...).
    """
    spec = tensor_spec(value)
    if is_torch(value):
        from .torch_tensors import torch_bytes

        return Encoded(spec, memoryview(torch_bytes(value)))
    flat: Any = np.ascontiguousarray(value, dtype=NUMPY[spec.dtype]).reshape(-1).view(np.uint8)
    return Encoded(spec, memoryview(flat))


def tensor_spec(value: Any) -> TensorSpec:
    """What `encode_tensor` would send it as; copies nothing. Raises as it does."""
    if is_torch(value):
        from .torch_tensors import torch_dtype

        name = torch_dtype(value)
    elif isinstance(value, (np.ndarray, np.generic)):
        name = _numpy_dtype(value.dtype)
    else:
        raise BadArgument(f"a {type(value).__name__} isn't a tensor or a NumPy array")
    if value.ndim > MAX_DIMS:
        raise BadArgument(f"a tensor of {value.ndim} dimensions can't be sent; {MAX_DIMS} are the most")
    return TensorSpec(tuple(value.shape), name)


def _numpy_dtype(dtype: np.dtype[Any]) -> str:
    name = _NAMES.get(dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype)
    if name is None:
        raise BadArgument(f"an array of {dtype} can't be sent; convert it to one of {', '.join(DTYPES)}")
    return name


def decode_tensor(spec: TensorSpec, data: Buffer, backend: Backend) -> Any:
    """A tensor or array over `data`, which must not be used for anything else afterwards.

    Writable memory is taken as it is; bytes are copied once, so that what comes out can be written to.

    Raises:
        InvalidPayload: the bytes don't fit the dtype and shape.
    """
    check_bytes(spec, data)
    buffer = bytearray(data) if memoryview(data).readonly else data
    if backend == "torch":
        from .torch_tensors import decode_torch

        return decode_torch(spec, buffer)
    return np.frombuffer(buffer, NUMPY[spec.dtype]).reshape(spec.shape)


def check_bytes(spec: TensorSpec, data: Buffer) -> None:
    """Raises InvalidPayload unless `data` is exactly what the dtype and shape call for."""
    check_spec(spec)
    size = memoryview(data).nbytes
    if size != spec.nbytes:
        raise InvalidPayload(
            f"a {spec.dtype} tensor of shape {list(spec.shape)} is {spec.nbytes:,} bytes, not {size:,}"
        )
    # A bool that is neither 0 nor 1 is undefined to the kernels: counts and copies of it may disagree.
    if spec.dtype == "bool" and size and int(np.frombuffer(data, np.uint8).max()) > 1:
        raise InvalidPayload("a bool tensor holds bytes other than 0 and 1")


def check_spec(spec: TensorSpec) -> None:
    """Raises InvalidPayload on an unknown dtype or a shape no machine could hold."""
    if spec.dtype not in DTYPES:
        raise InvalidPayload(f"unknown dtype {spec.dtype!r}")
    # Sizes are bounded without the zeros too: libraries compute strides from them.
    if len(spec.shape) > MAX_DIMS or math.prod(size for size in spec.shape if size) > MAX_SIZE:
        raise InvalidPayload(f"a tensor has at most {MAX_DIMS} dimensions and {MAX_SIZE:,} elements")


def digest(spec: TensorSpec, data: Buffer) -> str:
    """The tensor's content id: SHA-256, in hex, of its dtype, shape and bytes."""
    sha = hashlib.sha256(f"{spec.dtype} {shape_text(spec)}\n".encode())
    sha.update(data)
    return sha.hexdigest()


def shape_text(spec: TensorSpec) -> str:
    """The sizes separated by commas, as the digest and the upload's header write them."""
    return ",".join(map(str, spec.shape))


def spec_of(dtype: str, shape: str) -> TensorSpec:
    """The spec an upload's headers stand for. Raises InvalidPayload."""
    parts = shape.split(",") if shape.strip() else []
    sizes = [part.strip() for part in parts]
    if len(sizes) > MAX_DIMS or not all(part.isascii() and part.isdigit() and len(part) < 16 for part in sizes):
        raise InvalidPayload("a shape is whole numbers separated by commas")
    spec = TensorSpec(tuple(map(int, sizes)), dtype)
    check_spec(spec)
    return spec


def encode_spec(spec: TensorSpec) -> dict[str, Any]:
    """The plain form."""
    return {"dtype": spec.dtype, "shape": list(spec.shape)}


def decode_spec(plain: Any) -> TensorSpec:
    """Raises InvalidPayload."""
    fields = Fields(plain, "a tensor")
    dtype = fields.text("dtype", 32)
    shape = fields.list("shape", MAX_DIMS)
    fields.done()
    if not all(type(size) is int and 0 <= size <= MAX_SIZE for size in shape):
        raise InvalidPayload("a tensor's sizes are whole numbers")
    spec = TensorSpec(tuple(shape), dtype)
    check_spec(spec)
    return spec


def total(specs: Iterable[TensorSpec]) -> int:
    """Bytes of all of them."""
    return sum(spec.nbytes for spec in specs)
