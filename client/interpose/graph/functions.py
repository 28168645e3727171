"""Points at the calls of torch's functions inside a module's own forward: "softmax_0.output", "matmul_1.inputs".

A call is named by its function and by how many calls of that function came before it in the same forward. Which
calls there are is measured when a model is loaded; a client can name no others.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from .manifest import ATTENTION, leaves
from .ops.dtypes import category

if TYPE_CHECKING:
    from .manifest import ModuleInfo

_POINT = re.compile(r"([a-z]\w*_\d+)\.(?:output|inputs)", re.ASCII)
_CALL = re.compile(r"([a-z]\w*)_(\d+)", re.ASCII)


def call_of(point: str) -> str | None:
    """ "softmax_0" for "softmax_0.output"; None for a point that lies at no function's call."""
    found = _POINT.fullmatch(point)
    return found[1] if found else None


def function_of(call: str) -> str:
    """ "softmax" for "softmax_0"."""
    found = _CALL.fullmatch(call)
    assert found is not None, call
    return found[1]


def calls(info: ModuleInfo) -> list[str]:
    """A module's calls in the order of its forward: ["matmul_0", "softmax_0", "matmul_1"]."""
    return [call for name in info.points if name.endswith(".output") and (call := call_of(name)) is not None]


SELECTS = frozenset({"topk", "sort", "argsort", "argmax", "argmin", "max", "min"})
"""Functions whose whole numbers are places in what they are given, whatever that holds."""


def placing(info: ModuleInfo) -> frozenset[str]:
    """The calls by which a module computes where things lie: up to the last that makes whole numbers of others.

    What they give goes to kernels that look at no bounds, so a graph may read it and not write it.
    """
    there = calls(info)
    makes = [index for index, call in enumerate(there) if _makes_places(info, call)]
    return frozenset(there[: makes[-1] + 1]) if makes else frozenset()


def _makes_places(info: ModuleInfo, call: str) -> bool:
    if not _whole(info, f"{call}.output"):
        return False
    return function_of(call) not in SELECTS or _whole(info, f"{call}.inputs")


def _whole(info: ModuleInfo, point: str) -> bool:
    return any(category(leaf.dtype) == 1 for leaf in leaves(info.points.get(point)))


def own(info: ModuleInfo) -> list[str]:
    """A module's points that lie at no function's call."""
    return [name for name in info.points if call_of(name) is None]


def no_such_point(info: ModuleInfo, name: str, where: str) -> str:
    """Why a module has no point of a name, and which there are of that kind."""
    if name.rpartition(".")[2] not in ("output", "inputs") or "." not in name:
        offered = ", ".join(own(info)) or "none: the model's forward doesn't call it"
        return f"{where} has no hook point {name!r}; it has {offered}"
    call, there = name.rpartition(".")[0], calls(info)
    close = difflib.get_close_matches(call, there, 3, 0.5)
    if close:
        return f"{where} calls no {call}; did you mean {' or '.join(close)}?"
    if "pattern" in info.points:
        return (
            f"{where} calls no {call}: what its attention function computes are the points {', '.join(ATTENTION)}"
        )
    return (
        f"{where} calls no {call}; {'it calls ' + ', '.join(there) if there else 'no function it calls is a point'}"
    )
