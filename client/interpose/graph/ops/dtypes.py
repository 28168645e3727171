"""Which dtype comes out: torch's promotion of tensors, tensors without dimensions, and Python numbers."""

from __future__ import annotations

from typing import Any

from ...errors import BadArgument
from ..values import DType, TensorSpec

_SIGNED = ("int8", "int16", "int32", "int64")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_COMPLEX = ("complex64", "complex128")
INTEGERS = frozenset((*_SIGNED, "uint8"))
FLOAT8 = frozenset(("float8_e4m3fn", "float8_e5m2"))


def category(dtype: str) -> int:
    """0 bool, 1 integer, 2 floating, 3 complex."""
    if dtype == "bool":
        return 0
    if dtype in INTEGERS:
        return 1
    return 3 if dtype in _COMPLEX else 2


def promote(one: str, other: str) -> str:
    """The dtype that holds both."""
    if one == other:
        return one
    low, high = sorted((one, other), key=category)
    if high in FLOAT8 or low in FLOAT8:
        raise BadArgument(f"{one} and {other} have no common dtype; convert one first: x.to(torch.float32)")
    if category(low) == category(high):
        return _within(low, high)
    if high == "complex64" and low == "float64":
        return "complex128"
    return high


def _within(one: str, other: str) -> str:
    """The dtype that holds both of one category."""
    if "uint8" in (one, other):
        signed = other if one == "uint8" else one
        return "int16" if signed == "int8" else signed
    if {one, other} == {"float16", "bfloat16"}:
        return "float32"
    order = (*_SIGNED, *_FLOATS, *_COMPLEX)
    return max(one, other, key=order.index)


def result_type(*values: Any) -> str:
    """torch's result type of tensors (TensorSpec) and Python numbers; others are passed over.

    A tensor without dimensions raises only the category of tensors with some, a number that of either.
    """
    dim = zero = number = ""
    for value in values:
        if isinstance(value, TensorSpec):
            if value.shape:
                dim = promote(dim, value.dtype) if dim else value.dtype
            else:
                zero = promote(zero, value.dtype) if zero else value.dtype
        elif isinstance(value, (bool, int, float)):
            dtype = number_dtype(value)
            number = promote(number, dtype) if number else dtype
    return _combine(dim, _combine(zero, number))


def _combine(high: str, low: str) -> str:
    if not high or not low:
        return high or low
    if category(high) >= 2:
        if category(low) == 3 and category(high) == 2:
            if high == "float16":
                raise BadArgument("float16 and complex numbers have no common dtype here; convert first: x.float()")
            return "complex128" if high == "float64" else "complex64"
        return high
    return promote(high, low) if high == "bool" or category(low) >= 2 else high


def number_dtype(value: Any) -> str:
    """The dtype torch gives a Python number."""
    if isinstance(value, bool):
        return "bool"
    return "int64" if isinstance(value, int) else "float32"


def as_float(dtype: str) -> str:
    """What a function with fractional results gives for a dtype."""
    return dtype if category(dtype) >= 2 else "float32"


def as_sum(dtype: str) -> str:
    """What adding up gives for a dtype."""
    return dtype if category(dtype) >= 2 else "int64"


def as_real(dtype: str) -> str:
    """The dtype of magnitudes."""
    return {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)


def chosen(dtype: DType | None, otherwise: str) -> str:
    return otherwise if dtype is None else dtype.name


def need_floating(dtype: str, what: str) -> None:
    if category(dtype) < 2:
        raise BadArgument(f"{what} takes floating numbers, not {dtype}; convert first: x.float()")


def need_real(dtype: str, what: str) -> None:
    if category(dtype) != 2:
        raise BadArgument(f"{what} takes real floating numbers, not {dtype}")


def need_integer(dtype: str, what: str) -> None:
    if dtype not in INTEGERS:
        raise BadArgument(f"{what} takes integers, not {dtype}; convert first: x.long()")
