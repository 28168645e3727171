"""Nests of tensors: a plain tree that names tensors by number, and the tensors beside it.

The tree holds None, bool, int, float, str and lists; a map is always a tag with one key: {"tensor": k},
{"tuple": [...]}, {"dict": [[key, value], ...]} or {"float": "nan"}, so nothing can be taken for something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ..errors import BadArgument, InvalidPayload
from ..graph.values import INT_MAX, INT_MIN
from .tensors import is_tensor

Tree: TypeAlias = Any
"""The plain form above (mypy can't express the recursion usefully)."""

MAX_DEPTH = 32


def flatten(value: Any) -> tuple[Tree, list[Any]]:
    """The tree of a nest and its tensors in order of first appearance; one that appears twice is sent once.

    Raises:
        BadArgument: it holds something that isn't a tensor or plain data, or nests too deep.
    """
    tensors: list[Any] = []
    return _flatten(value, tensors, {}, 0), tensors


def _flatten(value: Any, tensors: list[Any], seen: dict[int, int], depth: int) -> Tree:
    if depth > MAX_DEPTH:
        raise BadArgument(f"a value nests deeper than {MAX_DEPTH}")
    if is_tensor(value):
        number = seen.setdefault(id(value), len(tensors))
        if number == len(tensors):
            tensors.append(value)
        return {"tensor": number}
    match value:
        case None | bool() | str():
            return value
        case int():
            if not INT_MIN <= value <= INT_MAX:
                raise BadArgument(f"the integer {value} doesn't fit 64 bits")
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        case list():
            return [_flatten(item, tensors, seen, depth + 1) for item in value]
        case tuple():
            return {"tuple": [_flatten(item, tensors, seen, depth + 1) for item in value]}
        case dict():
            return {"dict": [[_key(key), _flatten(item, tensors, seen, depth + 1)] for key, item in value.items()]}
    raise BadArgument(f"a {type(value).__name__} can't be sent; tensors, numbers, texts and nests of them can")


def _key(key: Any) -> str | int:
    if type(key) is not str and (type(key) is not int or not INT_MIN <= key <= INT_MAX):
        raise BadArgument("keys of a dict that is sent are texts or whole numbers")
    return key


def unflatten(tree: Tree, tensors: Sequence[Any]) -> Any:
    """The nest a tree stands for, with `tensors[k]` at each {"tensor": k}.

    Raises:
        InvalidPayload: the tree is malformed.
    """
    return _unflatten(tree, tensors, 0)


def _unflatten(tree: Tree, tensors: Sequence[Any], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise InvalidPayload(f"a value nests deeper than {MAX_DEPTH}")
    if tree is None or isinstance(tree, (bool, float, str)):
        return tree
    if isinstance(tree, int):
        if not INT_MIN <= tree <= INT_MAX:
            raise InvalidPayload("an integer of a value doesn't fit 64 bits")
        return tree
    if isinstance(tree, list):
        return [_unflatten(item, tensors, depth + 1) for item in tree]
    if isinstance(tree, dict) and len(tree) == 1:
        ((tag, body),) = tree.items()
        reader = _TAGS.get(tag) if isinstance(tag, str) else None
        if reader is not None:
            return reader(body, tensors, depth)
    raise InvalidPayload("a value is outside the vocabulary of trees")


def _tensor(body: Any, tensors: Sequence[Any], depth: int) -> Any:
    if type(body) is not int or not 0 <= body < len(tensors):
        raise InvalidPayload("a value names a tensor that isn't there")
    return tensors[body]


def _tuple(body: Any, tensors: Sequence[Any], depth: int) -> tuple[Any, ...]:
    if not isinstance(body, list):
        raise InvalidPayload("a tuple of a value has no items")
    return tuple(_unflatten(item, tensors, depth + 1) for item in body)


def _dict(body: Any, tensors: Sequence[Any], depth: int) -> dict[str | int, Any]:
    found: dict[str | int, Any] = {}
    if not isinstance(body, list):
        raise InvalidPayload("a dict of a value has no items")
    for pair in body:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int) or pair[0] in found:
            raise InvalidPayload("a dict of a value is pairs of distinct keys and values")
        found[pair[0]] = _unflatten(pair[1], tensors, depth + 1)
    return found


def _float(body: Any, tensors: Sequence[Any], depth: int) -> float:
    if body not in ("nan", "inf", "-inf"):
        raise InvalidPayload("a non-finite number is nan, inf or -inf")
    return float(body)


_TAGS: dict[str, Callable[[Any, Sequence[Any], int], Any]] = {
    "tensor": _tensor,
    "tuple": _tuple,
    "dict": _dict,
    "float": _float,
}
