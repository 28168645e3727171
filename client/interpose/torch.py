"""torch's names for deferred values, where torch itself may not be installed.

`from interpose import torch`, then `torch.softmax(h, dim=-1)`, `torch.nn.functional.gelu(h)`, `torch.float32`.
A function hands itself to the first deferred value among its arguments, so nothing here computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol

from .errors import DeferredError
from .graph.ops import OPS, SPELLINGS, lookup
from .graph.values import DTYPES, DType


class Recorder(Protocol):
    """What a deferred value has: it records an operation and gives the deferred result."""

    def _interpose_record(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any: ...


RECORDER: ContextVar[Recorder | None] = ContextVar("interpose_torch_recorder", default=None)
"""Who records an operation without deferred arguments, such as `torch.zeros(3)`, within a block."""


def _recorder(values: Any) -> Recorder | None:
    """The first deferred value within nested arguments."""
    for value in values:
        if hasattr(type(value), "_interpose_record"):
            found: Recorder = value
            return found
        if isinstance(value, (list, tuple)):
            nested = _recorder(value)
            if nested is not None:
                return nested
    return None


def _function(spelling: str, op: str) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        recorder = _recorder((*args, *kwargs.values()))
        if recorder is None:
            recorder = RECORDER.get()
        if recorder is None:
            raise DeferredError(
                f"interpose.torch is for deferred values, and none is among the arguments of {spelling}; "
                "from one of them, x.new_zeros(3) makes others; outside a block, use torch or numpy"
            )
        return recorder._interpose_record(op, args, kwargs)

    function.__name__ = spelling.rpartition(".")[2]
    function.__qualname__ = spelling
    function.__doc__ = "\n".join(f"{op}{signature}" for signature in OPS[op].signatures)
    return function


class Namespace:
    """The functions torch has under one dotted name."""

    def __init__(self, path: str, parts: Mapping[str, Namespace] | None = None) -> None:
        self._path = path
        self._parts = parts or {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _found(self._path, name, self._parts)

    def __dir__(self) -> list[str]:
        return sorted((*_names(self._path), *self._parts))

    def __repr__(self) -> str:
        return f"<{self._path} for deferred values>"


def _names(path: str) -> Iterator[str]:
    for spelling in SPELLINGS:
        home, _, name = spelling.rpartition(".")
        if home == path:
            yield name


def _found(path: str, name: str, parts: Mapping[str, Namespace]) -> Any:
    """A function, or a namespace within. Raises UnknownOp, which is an AttributeError, with the nearest names."""
    if name in parts:
        return parts[name]
    spelling = f"{path}.{name}"
    op = SPELLINGS.get(spelling)
    if op is None and path == "torch" and name in _OURS:
        op = name
    if op is None:
        lookup(spelling)
    assert op is not None
    return _function(spelling, op)


_OURS = frozenset(("rearrange", "einops_reduce", "einops_repeat", "lstsq"))
"""Operations torch has no function for, offered beside its own."""

_DTYPES = {
    **{name: DType(name) for name in DTYPES},
    "float": DType("float32"),
    "double": DType("float64"),
    "half": DType("float16"),
    "long": DType("int64"),
    "int": DType("int32"),
    "short": DType("int16"),
    "cfloat": DType("complex64"),
    "cdouble": DType("complex128"),
}

_PARTS: Mapping[str, Namespace] = {
    "nn": Namespace("torch.nn", {"functional": Namespace("torch.nn.functional")}),
    "linalg": Namespace("torch.linalg"),
    "special": Namespace("torch.special"),
}

_NUMBERS = {"inf": float("inf"), "nan": float("nan"), "pi": 3.141592653589793, "e": 2.718281828459045}


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name in _DTYPES:
        return _DTYPES[name]
    if name in _NUMBERS:
        return _NUMBERS[name]
    return _found("torch", name, _PARTS)


def __dir__() -> list[str]:
    return sorted((*_names("torch"), *_DTYPES, *_NUMBERS, *_PARTS, *_OURS))
