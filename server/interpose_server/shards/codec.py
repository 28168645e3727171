"""Nests with tensors as bytes: what a home and its shards send one another.

The nest itself is msgpack in which a tensor is a number; the tensors' bytes come after it, out of line, from and
into memory of their own. Nothing is unpickled. A tensor that appears twice travels once and is one object again.
It keeps its strides, by which kernels choose how to compute, and asks for gradients if it did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import torch
from interpose.errors import BadArgument, InvalidPayload
from interpose.graph.values import DTYPES
from interpose.runtime.split.route import ArgumentRef, BlockCall, CacheRef, Mail, Visit
from interpose.wire.tensors import MAX_DIMS, MAX_SIZE
from interpose.wire.torch_tensors import TORCH, torch_bytes, torch_dtype
from torch import Tensor

TENSOR, TUPLE, CACHE, MAIL, CALL, VISIT, ARGUMENT, WHOLE = range(1, 9)
"""Kinds of msgpack's extension values."""

SPARSEST = 4
"""A tensor with gaps between its elements keeps them, up to so many times its own size."""

_BITS = 256
"""Whole numbers that msgpack has no form for, such as a limit that is none."""

_GRADIENT, _DEVICE, _GAPS = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Packed:
    """Attributes:
    head: the nest, and of each tensor its dtype, shape, strides (None: row-major) and flags.
    tensors: the bytes of each.
    """

    head: bytes
    tensors: tuple[memoryview, ...]

    @property
    def size(self) -> int:
        return len(self.head) + sum(view.nbytes for view in self.tensors)


def pack(nest: Any) -> Packed:
    """Raises BadArgument if there is something in it that can't be sent."""
    numbers: dict[int, int] = {}
    tensors: list[Tensor] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            number = numbers.setdefault(id(value), len(tensors))
            if number == len(tensors):
                tensors.append(value)
            return msgpack.ExtType(TENSOR, msgpack.packb(number))
        if type(value) is int and value.bit_length() <= _BITS:
            return msgpack.ExtType(WHOLE, value.to_bytes(_BITS // 8 + 1, "big", signed=True))
        if isinstance(value, tuple):
            return msgpack.ExtType(TUPLE, packed(list(value)))
        if isinstance(value, CacheRef):
            return msgpack.ExtType(CACHE, msgpack.packb(value.number))
        if isinstance(value, ArgumentRef):
            return msgpack.ExtType(ARGUMENT, msgpack.packb(value.number))
        if isinstance(value, Mail):
            return msgpack.ExtType(MAIL, packed([value.to, value.address, value.value]))
        if isinstance(value, BlockCall):
            return msgpack.ExtType(CALL, packed([value.path, value.args, dict(value.kwargs)]))
        if isinstance(value, Visit):
            fields = [value.site, value.calls, value.work, value.attention, value.grad, value.adapter]
            return msgpack.ExtType(VISIT, packed(fields))
        if isinstance(value, list):  # one of a class of its own
            return [*value]
        if isinstance(value, dict):
            return {**value}
        raise BadArgument(f"a {type(value).__name__} can't be sent to a shard")

    def packed(value: Any) -> bytes:
        return msgpack.packb(value, default=plain, strict_types=True)  # type: ignore[no-any-return]

    try:
        body = packed(nest)
        forms = [_form(tensor) for tensor in tensors]
        head = msgpack.packb([body, [form for form, _ in forms]])
    except (OverflowError, ValueError, TypeError) as error:
        raise BadArgument(f"this can't be sent to a shard: {error}") from error
    return Packed(head, tuple(view for _, view in forms))


def _form(tensor: Tensor) -> tuple[list[Any], memoryview]:
    """What is said of a tensor, and its bytes."""
    flags = _GRADIENT * tensor.requires_grad | _DEVICE * (tensor.device.type != "cpu")
    data = tensor.detach()
    said: list[Any] = [torch_dtype(tensor), list(tensor.shape), None, flags]
    if len(tensor.shape) > MAX_DIMS:
        raise BadArgument(f"a tensor of {tensor.ndim} dimensions can't be sent")
    if data.numel() and not data.is_contiguous():
        said[2] = list(data.stride())
        order, dense = _order(data.shape, data.stride())
        if dense is None:
            said[2] = None  # its elements lie over one another
        else:
            data = _once(data).permute(order)
            if dense > SPARSEST * data.numel():
                said[2] = None
                data = tensor.detach()
            elif dense > data.numel():
                said[3] |= _GAPS
    return said, memoryview(torch_bytes(data))


def _once(tensor: Tensor) -> Tensor:
    """Without the repetitions that an expanded dimension stands for."""
    return tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]


def _order(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], int | None]:
    """Dimensions from the widest step to the narrowest, and how many elements of memory they span; None if they
    overlap. A dimension of step 0 counts once."""
    real = [dim for dim in range(len(shape)) if shape[dim] > 1 and strides[dim] > 0]
    real.sort(key=lambda dim: strides[dim], reverse=True)
    span = 1
    for dim in reversed(real):
        if strides[dim] < span:
            return [], None
        span = strides[dim] * (shape[dim] - 1) + span
    rest = [dim for dim in range(len(shape)) if dim not in real]
    return [*rest, *real], span


class Opening:
    """A packed nest on its way in: memory for its tensors to be filled, then the nest.

    Args:
        head: as packed.
        most: bytes its tensors may take.

    Raises:
        InvalidPayload: malformed, or over the bound.
    """

    def __init__(self, head: bytes | bytearray | memoryview, most: int) -> None:
        self._body, forms = _listed(_unpack(head), 2)
        if not isinstance(self._body, bytes) or not isinstance(forms, list):
            raise InvalidPayload("not a parcel")
        self._forms = [_Form.of(form) for form in forms]
        if sum(form.nbytes for form in self._forms) > most:
            raise InvalidPayload(f"a parcel's tensors take more than {most:,} bytes")
        # Of torch's own allocator, which aligns it as the kernels like.
        self._memory = [torch.empty(form.numel, dtype=TORCH[form.dtype]) for form in self._forms]

    @property
    def nbytes(self) -> int:
        return sum(form.nbytes for form in self._forms)

    def buffers(self) -> list[memoryview]:
        """To be filled, in order; none of them empty."""
        return [_bytes(memory) for memory in self._memory if memory.numel()]

    def nest(self, device: torch.device | None = None) -> Any:
        """The nest, once all is filled. What came from an accelerator goes to `device`."""
        tensors = [form.tensor(memory, device) for form, memory in zip(self._forms, self._memory, strict=True)]

        def value(code: int, data: bytes) -> Any:
            match code:
                case _ if code == TENSOR:
                    number = msgpack.unpackb(data)
                    if type(number) is not int or not 0 <= number < len(tensors):
                        raise InvalidPayload("a parcel names a tensor that isn't there")
                    return tensors[number]
                case _ if code == WHOLE and len(data) == _BITS // 8 + 1:
                    return int.from_bytes(data, "big", signed=True)
                case _ if code in _MAKERS:
                    return _MAKERS[code](_unpack(data, value))
            raise InvalidPayload(f"a parcel holds something of kind {code}")

        try:
            return _unpack(self._body, value)
        except (TypeError, AttributeError) as error:
            raise InvalidPayload(f"a malformed parcel: {error}") from error


def _bytes(memory: Tensor) -> memoryview:
    flat: Any = memory.view(torch.uint8).numpy()
    return memoryview(flat)


@dataclass(frozen=True, slots=True)
class _Form:
    """How a tensor lies: `numel` elements come."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    flags: int
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype]

    @classmethod
    def of(cls, plain: Any) -> _Form:
        dtype, shape, strides, flags = _listed(plain, 4)
        sizes = [shape, *([] if strides is None else [strides])]
        if (
            dtype not in DTYPES
            or type(flags) is not int
            or not all(isinstance(part, list) and len(part) <= MAX_DIMS for part in sizes)
            or not all(type(size) is int and 0 <= size <= MAX_SIZE for part in sizes for size in part)
            or (strides is not None and len(strides) != len(shape))
        ):
            raise InvalidPayload("a parcel's tensor is malformed")
        numel = 1
        for dim, size in enumerate(shape):
            numel *= min(size, 1) if strides is not None and strides[dim] == 0 else size
        if numel > MAX_SIZE:
            raise InvalidPayload("a parcel's tensor is malformed")
        return cls(dtype, tuple(shape), None if strides is None else tuple(strides), flags, numel)

    def tensor(self, memory: Tensor, device: torch.device | None) -> Tensor:
        made = memory.view(self.shape) if self.strides is None else self._strided(memory, self.strides)
        if self.flags & _DEVICE and device is not None:
            made = made.to(device)
        return made.requires_grad_() if self.flags & _GRADIENT else made

    def _strided(self, memory: Tensor, strides: tuple[int, ...]) -> Tensor:
        order, span = _order(self.shape, strides)
        if span is None or span > SPARSEST * self.numel or (span != self.numel) != bool(self.flags & _GAPS):
            raise InvalidPayload("a parcel's tensor is malformed")
        if not self.flags & _GAPS:
            return memory.as_strided(self.shape, strides)
        wide = memory.new_zeros(span)
        whole = wide.as_strided(self.shape, strides)
        part = _once(whole).permute(order)
        part.copy_(memory.view(part.shape))
        return whole


def _listed(plain: Any, length: int) -> list[Any]:
    if not isinstance(plain, list) or len(plain) != length:
        raise InvalidPayload("a malformed parcel")
    return plain


def _unpack(data: bytes | bytearray | memoryview, value: Callable[[int, bytes], Any] = msgpack.ExtType) -> Any:
    try:
        return msgpack.unpackb(data, ext_hook=value, strict_map_key=False)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise InvalidPayload(f"a malformed parcel: {error}") from error


def _cache(number: Any) -> CacheRef:
    return CacheRef(number)


def _argument(number: Any) -> ArgumentRef:
    return ArgumentRef(number)


def _mail(plain: Any) -> Mail:
    return Mail(*_listed(plain, 3))


def _call(plain: Any) -> BlockCall:
    return BlockCall(*_listed(plain, 3))


def _visit(plain: Any) -> Visit:
    return Visit(*_listed(plain, 6))


_MAKERS: dict[int, Callable[[Any], Any]] = {
    TUPLE: tuple,
    CACHE: _cache,
    ARGUMENT: _argument,
    MAIL: _mail,
    CALL: _call,
    VISIT: _visit,
}
