"""Which operation a function of torch is: all that `__torch_function__` may be handed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..graph.ops import OPERATORS, SPELLINGS

_UNARY: Mapping[str, str] = {
    "__neg__": "neg",
    "__pos__": "positive",
    "__abs__": "abs",
    "__invert__": "bitwise_not",
    "__getitem__": "getitem",
    "__eq__": "eq",
    "__ne__": "ne",
    "__lt__": "lt",
    "__le__": "le",
    "__gt__": "gt",
    "__ge__": "ge",
}
_HOMES: Mapping[str, Any] = {
    "torch": torch,
    "torch.Tensor": Tensor,
    "torch.nn.functional": torch.nn.functional,
    "torch.linalg": torch.linalg,
    "torch.special": torch.special,
}


@cache
def function_table() -> Mapping[Callable[..., Any], tuple[str, bool]]:
    """Function of torch -> (operation, whether its first two arguments are swapped).

    Attributes such as `x.T` are under the getter that torch hands over.
    """
    return MappingProxyType(dict(_entries()))


def _entries() -> Iterator[tuple[Callable[..., Any], tuple[str, bool]]]:
    for spelling, op in SPELLINGS.items():
        home, _, name = spelling.rpartition(".")
        found = getattr(_HOMES[home], name, None)
        if found is None:
            continue
        if not callable(found):
            found = found.__get__
        yield found, (op, False)
    for python, op in (*OPERATORS.items(), ("div", "div")):
        for prefix, swapped in (("", False), ("r", True)):
            found = getattr(Tensor, f"__{prefix}{python}__", None)
            # torch gives an operator that commutes as the method itself: its arguments are in order already.
            if found is not None and not (swapped and found in _methods()):
                yield found, (op, swapped)
    for name, op in _UNARY.items():
        yield getattr(Tensor, name), (op, False)
    yield torch.rsub, ("sub", True)
    yield Tensor.where, ("where", True)


@cache
def _methods() -> frozenset[Callable[..., Any]]:
    return frozenset(getattr(Tensor, name) for name in ("add", "mul", "bitwise_and", "bitwise_or", "bitwise_xor"))
