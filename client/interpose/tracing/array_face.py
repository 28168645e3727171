"""The face of deferred values where torch isn't installed: saved ones delegate to NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ..errors import ControlFlow
from ..graph import ops
from .bases import Base, View
from .deferred import Deferred
from .recorder import Recorder

_UFUNCS = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "power": "pow",
    "equal": "eq",
    "not_equal": "ne",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "left_shift": "bitwise_left_shift",
    "right_shift": "bitwise_right_shift",
}
"""NumPy's functions of other names than the operation's."""


class DeferredArray(Deferred):
    """An array that will exist when the block has run."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """What NumPy hands over: `array * value`, `np.exp(value)`."""
        name = _UFUNCS.get(ufunc.__name__, ufunc.__name__)
        if method != "__call__" or kwargs or name not in ops.OPS:
            raise ControlFlow(
                f"NumPy's {ufunc.__name__} can't have this value before the block has run; "
                "write it with interpose.torch, or save the value and convert it afterwards"
            )
        return self._recorder.op(name, inputs, {})

    @property
    def device(self) -> str:
        """Where values are for the user's code, wherever the model is."""
        return "cpu"

    def _become(self, value: Any) -> None:
        self.__dict__.clear()
        self.__class__ = SavedArray  # type: ignore[assignment]
        self.__dict__["value"] = np.asarray(value)


class _Holder:
    """What delegates to an array. Apart from `SavedArray` so that a deferred value's class can become that one."""

    value: np.ndarray[Any, Any]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(self.value, dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if "out" in kwargs:
            kwargs["out"] = tuple(map(_plain, kwargs["out"]))
        return getattr(ufunc, method)(*map(_plain, inputs), **kwargs)

    def _keep_gradient(self, gradient: Any) -> None:
        self.__dict__["grad"] = np.asarray(gradient)

    @property
    def logits(self) -> np.ndarray[Any, Any]:
        return self.value

    def __getattr__(self, name: str) -> Any:
        if name == "value" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value, name)

    def __getitem__(self, index: Any) -> Any:
        return self.value[_plain(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.value[_plain(index)] = _plain(value)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Any:
        return iter(self.value)

    def __contains__(self, item: Any) -> bool:
        return item in self.value

    def __matmul__(self, other: Any) -> Any:
        return self.value @ _plain(other)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __index__(self) -> int:
        return self.value.__index__()

    def __repr__(self) -> str:
        return repr(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __reduce__(self) -> Any:
        return self.value.__reduce__()


class SavedArray(_Holder, NDArrayOperatorsMixin):
    """A saved value. `value` is the array; everything else is the array's too."""


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, SavedArray) else value


def make(recorder: Recorder, base: Base, chain: tuple[View, ...], node: int) -> DeferredArray:
    """The deferred array of a node."""
    value = DeferredArray()
    value._begin(recorder, base, chain, node)
    return value
