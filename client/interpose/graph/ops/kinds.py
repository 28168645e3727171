"""Kinds of arguments an operation may declare, and how a value is checked against one.

A kind is written `int`, `dtype?` (or None), `tensor|number` (either), `'mean'|'sum'` (one of these texts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Final, TypeAlias

from ..values import DType, Ref, TensorSpec


class _Unknown:
    """The type of `UNKNOWN`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Final = _Unknown()
"""A tensor whose shape isn't known."""

Unknown: TypeAlias = _Unknown
IsTensor: TypeAlias = Callable[[Any], bool]


class _Miss:
    __slots__ = ()


MISS: Final = _Miss()
"""What a check answers for a value outside its kind; None is a value."""

_SPECS = (Ref, TensorSpec, _Unknown)
_NONE = type(None)


def is_spec(value: Any) -> bool:
    """Whether `value` stands for a tensor while a graph is recorded or checked."""
    return isinstance(value, _SPECS)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind.

    Attributes:
        text: as declared.
        exact: types whose every value passes as it is; spares the common cases a call.
        check: (value, is_tensor) -> the value in its normal form, or MISS.
        words: the kind in a message.
    """

    text: str
    exact: frozenset[type]
    check: Callable[[Any, IsTensor], Any]
    words: str


def kind(text: str) -> Kind:
    """The kind of a declaration's text, made once."""
    found = _KINDS.get(text)
    if found is None:
        found = _KINDS[text] = _union(text)
    return found


def _union(text: str) -> Kind:
    body, optional = (text[:-1], True) if text.endswith("?") else (text, False)
    members = [_literal(part) if part.startswith("'") else _KINDS[part] for part in body.split("|")]
    if optional:
        members.append(_KINDS["none"])
    if len(members) == 1:
        return members[0]
    exact = frozenset[type]().union(*(member.exact for member in members))
    checks = [member.check for member in members]

    def check(value: Any, is_tensor: IsTensor) -> Any:
        for one in checks:
            normal = one(value, is_tensor)
            if normal is not MISS:
                return normal
        return MISS

    return Kind(text, exact, check, " or ".join(member.words for member in members))


def _literal(quoted: str) -> Kind:
    word = quoted[1:-1]
    return Kind(quoted, frozenset(), lambda value, _: value if value == word else MISS, repr(word))


def _of(*types: type) -> Callable[[Any, IsTensor], Any]:
    return lambda value, _: value if type(value) in types else MISS


def _tensor(value: Any, is_tensor: IsTensor) -> Any:
    return value if is_tensor(value) else MISS


def _number(value: Any, is_tensor: IsTensor) -> Any:
    return value if isinstance(value, (bool, int, float)) else MISS


def _int(value: Any, is_tensor: IsTensor) -> Any:
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else MISS


def _float(value: Any, is_tensor: IsTensor) -> Any:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else MISS


MAX_INTS = 1 << 13
"""Most integers of one argument: sizes of dimensions, or of pieces."""


def _ints(value: Any, is_tensor: IsTensor) -> Any:
    """A tuple of ints; a bare int is a tuple of one."""
    if type(value) is int:
        return (value,)
    if (
        isinstance(value, (list, tuple))
        and len(value) <= MAX_INTS
        and all(isinstance(item, int) and item is not True for item in value)
    ):
        return tuple(value)
    return MISS


def _tensors(value: Any, is_tensor: IsTensor) -> Any:
    if isinstance(value, (list, tuple)) and value and all(is_tensor(item) for item in value):
        return tuple(value)
    return MISS


def _text(value: Any, is_tensor: IsTensor) -> Any:
    return value if isinstance(value, str) else MISS


def _index(value: Any, is_tensor: IsTensor) -> Any:
    """A tuple of index items. A list of lists is one too, as in torch."""
    spread = isinstance(value, tuple) or (isinstance(value, list) and any(isinstance(item, list) for item in value))
    items = tuple(value) if spread else (value,)
    dots = 0
    for item in items:
        if type(item) is not int and not _index_item(item, is_tensor):
            return MISS
        dots += item is ...
    return items if dots < 2 else MISS


def _index_item(item: Any, is_tensor: IsTensor) -> bool:
    if isinstance(item, slice):
        return all(
            part is None or _int(part, is_tensor) is not MISS or is_tensor(part)
            for part in (item.start, item.stop, item.step)
        )
    if item is None or isinstance(item, EllipsisType):
        return True
    if isinstance(item, list):
        return _number_list(item)
    return not isinstance(item, bool) and (isinstance(item, int) or is_tensor(item))


def _number_list(items: list[Any]) -> bool:
    """Whether it is a list of ints, of bools, or of equally long such lists."""
    if items and all(isinstance(item, list) for item in items):
        return len({len(item) for item in items}) == 1 and all(map(_number_list, items))
    return {type(item) for item in items} in ({int}, {bool}, set())


def _pair(value: Any, is_tensor: IsTensor) -> Any:
    """Two tuples of ints."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return MISS
    sides = tuple(_ints(side, is_tensor) for side in value)
    return MISS if MISS in sides else sides


def _builtin(text: str, exact: tuple[type, ...], check: Callable[[Any, IsTensor], Any], words: str) -> Kind:
    return Kind(text, frozenset(exact), check, words)


_KINDS: dict[str, Kind] = {
    each.text: each
    for each in (
        _builtin("tensor", _SPECS, _tensor, "a tensor"),
        _builtin("number", (bool, int, float), _number, "a number"),
        _builtin("int", (int,), _int, "an integer"),
        _builtin("float", (int, float), _float, "a number"),
        _builtin("bool", (bool,), _of(bool), "True or False"),
        _builtin("str", (str,), _text, "a text"),
        _builtin("dtype", (DType,), _of(DType), "a dtype"),
        _builtin("none", (_NONE,), _of(_NONE), "None"),
        _builtin("ints", (), _ints, "integers"),
        _builtin("tensors", (), _tensors, "a list of tensors"),
        _builtin(
            "index",
            (),
            _index,
            "an index: integers, slices, None, `...` once, lists of integers, tensors of int or bool",
        ),
        _builtin("pair", (), _pair, "two lists of integers"),
    )
}
