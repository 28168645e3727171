"""Calls of functions inside a module's forward, as the user writes them: `attn.functions.softmax[0].output`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UnknownPoint
from ..graph.functions import calls, function_of, no_such_point

if TYPE_CHECKING:
    from .handles import Module

_POINTS = ("output", "input", "inputs")


class Functions:
    """The calls a module's own forward makes, in order: printed with their shapes, found by function or by name.

    `functions.softmax` are all calls of one function, `functions.softmax_1` is the second of them. Which calls
    there are was measured when the model was loaded.
    """

    def __init__(self, module: Module) -> None:
        self.__dict__.update(_module=module)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _replaced(f"{name}[0]" if name in map(function_of, calls(self._module._info)) else name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        there = calls(self._module._info)
        if name in there:
            return FunctionCall(self._module, name)
        mine = [call for call in there if function_of(call) == name]
        if not mine:
            wanted = name if name[-1:].isdigit() else f"{name}_0"
            where = self._module._path or "the model"
            raise UnknownPoint(no_such_point(self._module._info, f"{wanted}.output", where))
        return FunctionCalls(self._module, name, mine)

    def __iter__(self) -> Iterator[FunctionCall]:
        return iter([FunctionCall(self._module, call) for call in calls(self._module._info)])

    def __len__(self) -> int:
        return len(calls(self._module._info))

    def __repr__(self) -> str:
        from ..draw import draw_functions

        return draw_functions(self._module._manifest, self._module._path)


class FunctionCalls(Sequence["FunctionCall"]):
    """All calls of one function in a module's forward, first to last."""

    def __init__(self, module: Module, function: str, names: Sequence[str]) -> None:
        self.__dict__.update(_module=module, _function=function, _names=names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in _POINTS:
            raise AttributeError(f"the calls of {self._function} have no {name!r}")
        raise self._which(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise self._which(name if name in _POINTS else "output")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _replaced(f"{self._function}[{index}]")

    def _which(self, name: str) -> UnknownPoint:
        times = f"{len(self)} times" if len(self) > 1 else "once"
        return UnknownPoint(
            f"{self._module._path or 'the model'} calls {self._function} {times}; "
            f"name the call: functions.{self._function}[0].{name}"
        )

    def __getitem__(self, index: Any) -> Any:
        try:
            found = self._names[index]
        except IndexError:
            where = self._module._path or "the model"
            raise UnknownPoint(
                f"{where} calls {self._function} {len(self._names)} times; there is no [{index}]"
            ) from None
        if isinstance(index, slice):
            return [FunctionCall(self._module, name) for name in found]
        return FunctionCall(self._module, found)

    def __len__(self) -> int:
        return len(self._names)


class FunctionCall:
    """One call. `output`, `input` (the first argument) and `inputs` (all of them) are read and replaced like a
    module's."""

    def __init__(self, module: Module, name: str) -> None:
        self.__dict__.update(_module=module, _name=name)

    def __getattr__(self, name: str) -> Any:
        return self._module.points[f"{self._name}.{self._checked(name)}"]

    def __setattr__(self, name: str, value: Any) -> None:
        self._module.points[f"{self._name}.{self._checked(name)}"] = value

    def __repr__(self) -> str:
        return f"<{self._name} in {self._module._path or 'the model'}>"

    def _checked(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in _POINTS:
            raise UnknownPoint(f"a function's call has output, input and inputs; {name!r} is none of them")
        return name


def _replaced(call: str) -> UnknownPoint:
    return UnknownPoint(f"a call can't be replaced, its values can: functions.{call}.output = ...")
