"""The closed vocabulary of a node's arguments, and its plain (JSON and msgpack) form.

None, bool, int, float, str, Ellipsis, slice, `DType`, `Ref`, and lists and tuples of these. In the plain form a
dict is always a tag with one key, so nothing a client sends can be taken for something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, TypeAlias

from ..errors import InvalidGraph

INT_MIN, INT_MAX = -(2**63), 2**63 - 1
MAX_DEPTH = 12
MAX_TEXT = 4096

DTYPES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes an element of every dtype with a wire meaning."""


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of an earlier node."""

    id: int


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype by its torch name, one of `DTYPES`."""

    name: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before it exists."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype]


Arg: TypeAlias = Any
"""A member of the vocabulary above (mypy can't express the recursion usefully)."""


def encode(value: Arg) -> Any:
    """The plain form of an argument. Raises InvalidGraph on anything outside the vocabulary."""
    match value:
        case None | bool() | str():
            return value
        case int():
            if not INT_MIN <= value <= INT_MAX:
                raise InvalidGraph(f"the integer {value} doesn't fit 64 bits")
            return value
        case float():
            return value if math.isfinite(value) else {"float": repr(value)}
        case Ref():
            return {"ref": value.id}
        case DType():
            return {"dtype": value.name}
        case slice():
            return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
        case EllipsisType():
            return {"ellipsis": True}
        case list():
            return [encode(item) for item in value]
        case tuple():
            return {"tuple": [encode(item) for item in value]}
    raise InvalidGraph(f"a {type(value).__name__} can't be an argument of a node")


def decode(plain: Any, depth: int = 0) -> Arg:
    """The argument a plain form stands for. Raises InvalidGraph on anything outside the vocabulary."""
    if depth > MAX_DEPTH:
        raise InvalidGraph(f"arguments nest deeper than {MAX_DEPTH}")
    if plain is None or isinstance(plain, (bool, float)):
        return plain
    if isinstance(plain, str):
        return text(plain, "a text argument", MAX_TEXT)
    if isinstance(plain, int):
        if not INT_MIN <= plain <= INT_MAX:
            raise InvalidGraph("an integer argument doesn't fit 64 bits")
        return plain
    if isinstance(plain, list):
        return [decode(item, depth + 1) for item in plain]
    if isinstance(plain, dict) and len(plain) == 1:
        ((tag, body),) = plain.items()
        reader = _TAGS.get(tag) if isinstance(tag, str) else None
        if reader is not None:
            return reader(body, depth)
    raise InvalidGraph("an argument is outside the vocabulary of graphs")


def _ref(body: Any, depth: int) -> Ref:
    return Ref(whole(body, "a reference"))


def _dtype(body: Any, depth: int) -> DType:
    if not isinstance(body, str) or body not in DTYPES:
        raise InvalidGraph("an argument names an unknown dtype")
    return DType(body)


def _slice(body: Any, depth: int) -> slice:
    if not isinstance(body, list) or len(body) != 3:
        raise InvalidGraph("a slice has three parts")
    parts = [decode(part, depth + 1) for part in body]
    if not all(part is None or isinstance(part, Ref) or type(part) is int for part in parts):
        raise InvalidGraph("a slice takes integers")
    return slice(*parts)


def _tuple(body: Any, depth: int) -> tuple[Arg, ...]:
    if not isinstance(body, list):
        raise InvalidGraph("a tuple argument has no items")
    return tuple(decode(item, depth + 1) for item in body)


def _ellipsis(body: Any, depth: int) -> EllipsisType:
    return ...


def _float(body: Any, depth: int) -> float:
    if body not in ("nan", "inf", "-inf"):
        raise InvalidGraph("a non-finite number is nan, inf or -inf")
    return float(body)


_TAGS: dict[str, Callable[[Any, int], Arg]] = {
    "ref": _ref,
    "dtype": _dtype,
    "slice": _slice,
    "tuple": _tuple,
    "ellipsis": _ellipsis,
    "float": _float,
}


def whole(value: Any, what: str, low: int = 0, high: int = INT_MAX) -> int:
    """`value` if it is an int (not a bool) within bounds. Raises InvalidGraph otherwise."""
    if type(value) is not int or not low <= value <= high:
        raise InvalidGraph(f"{what} isn't a whole number from {low} to {high}")
    return value


def text(value: Any, what: str, longest: int = 128) -> str:
    """`value` if it is a text that UTF-8 can carry. Raises InvalidGraph otherwise."""
    if not isinstance(value, str) or len(value) > longest:
        raise InvalidGraph(f"{what} is a text of at most {longest} characters")
    if not sendable(value):
        raise InvalidGraph(f"{what} holds half of a character")
    return value


def sendable(value: str) -> bool:
    """Whether UTF-8 can carry a text. JSON can spell half a character, which nobody could send on."""
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def refs(value: Arg) -> list[int]:
    """Ids of all nodes an argument refers to, in order, repeats included."""
    found: list[int] = []
    _gather(value, found)
    return found


def _gather(value: Arg, found: list[int]) -> None:
    if isinstance(value, Ref):
        found.append(value.id)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _gather(item, found)
    elif isinstance(value, slice):
        _gather((value.start, value.stop, value.step), found)


def substitute(value: Arg, look: Callable[[int], Any]) -> Any:
    """`value` with every Ref replaced by `look(id)`; lists, tuples and slices are made anew."""
    if isinstance(value, Ref):
        return look(value.id)
    if isinstance(value, list):
        return [substitute(item, look) for item in value]
    if isinstance(value, tuple):
        return tuple([substitute(item, look) for item in value])
    if isinstance(value, slice):
        return slice(substitute(value.start, look), substitute(value.stop, look), substitute(value.step, look))
    return value
