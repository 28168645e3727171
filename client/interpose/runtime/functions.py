"""Calls of torch's functions inside a module's own forward, shown to the run that touches them.

A mode of torch sees every call. Those that count are made by the forward of a watched module itself, helpers it
calls included: not those of modules within it, nor those inside the library's attention functions, whose values are
points of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..graph.functions import function_of
from ..graph.ops import INPLACE, OPERATORS, OPS, SPELLINGS
from ..graph.ops.convert import NAMED
from . import nests

if TYPE_CHECKING:
    from .hooks import Scope

_PLUMBING = frozenset(
    {*NAMED, "to", "type", "type_as", "getitem", "setitem", "copy", "detach", "clone", "positive"}
)
"""Operations that move values and compute none, beside views."""

_ALIASES = {spelling.rpartition(".")[2]: op for spelling, op in SPELLINGS.items()}
_ALIASES |= {**INPLACE, "rsub": "sub", "rdiv": "div", **{name: name for name in OPS}}
"""A function's own name -> operation."""


def called(func: Callable[..., Any]) -> str | None:
    """The operation that a function of torch is, None if calls of it are no points."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        bare = name.strip("_")
        name = OPERATORS.get(bare) or OPERATORS.get(bare[1:], bare)
    name = _ALIASES.get(name, name)
    op = OPS.get(name)
    return None if op is None or op.view or name in _PLUMBING else name


def writes(func: Callable[..., Any]) -> bool:
    """Whether a function writes over its first argument."""
    name = getattr(func, "__name__", "")
    return name in INPLACE or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))


def watchable(module: nn.Module) -> bool:
    """Whether calls in a module's forward are points: torch's own modules are one function, and have its points."""
    return not type(module).__module__.startswith("torch.")


def steady(runs: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The calls that several runs of one forward make alike, in order.

    A function that isn't called equally often in all of them has none: the n-th call may be another each time.
    """
    counts = [Counter(map(function_of, run)) for run in runs]
    alike = {name for name in counts[0] if all(count[name] == counts[0][name] for count in counts)}
    kept = {tuple(call for call in run if function_of(call) in alike) for run in runs}
    return kept.pop() if len(kept) == 1 else ()


@dataclass
class Made:
    """What modules' forwards called in several runs.

    Attributes:
        full, later: module -> its calls in each forward of whole prompts, and of one more position after a cache.
    """

    full: dict[str, list[Sequence[str]]] = field(default_factory=dict)
    later: dict[str, list[Sequence[str]]] = field(default_factory=dict)

    def add(
        self, made: Mapping[tuple[str, int], Sequence[str]], entered: Mapping[str, int], *, later: bool
    ) -> None:
        """Args: made: (module, call) -> what it called; entered: module -> how often it was called itself."""
        runs = self.later if later else self.full
        for module, times in entered.items():
            runs.setdefault(module, []).extend(made.get((module, call), ()) for call in range(times))

    def offered(self) -> dict[str, tuple[str, ...]]:
        """Module -> the calls that every forward of whole prompts makes."""
        found = {module: steady(runs) for module, runs in self.full.items()}
        return {module: calls for module, calls in found.items() if calls}

    def first_only(self) -> frozenset[str]:
        """Modules whose forwards are others in a generation's later steps, or weren't seen in one."""
        return frozenset(
            module
            for module, calls in self.offered().items()
            if {tuple(_of(calls, run)) for run in self.later.get(module, ())} != {calls}
        )


def _of(calls: Sequence[str], run: Sequence[str]) -> list[str]:
    """What a run called of the functions that `calls` are calls of."""
    names = set(map(function_of, calls))
    return [call for call in run if function_of(call) in names]


class Functions(TorchFunctionMode):
    """Shows the calls of watched modules to a run's visitor.

    Args:
        watched: module -> its calls in order; None for whatever calls come.
        fused: what stands in for torch's fused attention, given the module that calls it.
    """

    def __init__(
        self,
        scope: Scope,
        watched: Mapping[str, Sequence[str] | None],
        fused: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self._scope = scope
        self._watched = watched
        self._fused = fused
        self._counts: dict[tuple[str, int], Counter[str]] = {}
        self._made: dict[tuple[str, int], list[str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        running = self._scope.running
        if self._fused is not None and func is functional.scaled_dot_product_attention and not self._scope.veiled:
            return self._fused(self._scope, running[-1] if running else None, *args, **kwargs)
        module = running[-1] if running else None
        if module is None or module not in self._watched:
            return func(*args, **kwargs)
        name = called(func)
        if name is None or "out" in kwargs or not nests.tensors((args, kwargs)):
            return func(*args, **kwargs)
        at = module, self._scope.current_call(module)
        counts = self._counts.setdefault(at, Counter())
        call = f"{name}_{counts[name]}"
        counts[name] += 1
        if not self._follows(at, call):
            return func(*args, **kwargs)
        return self._show(at, call, func, args, kwargs)

    def _follows(self, at: tuple[str, int], call: str) -> bool:
        """Whether a call is the next of those that were measured. What comes out of order is shown to nobody."""
        expected = self._watched[at[0]]
        if expected is None:
            return True
        if not _of(expected, [call]):
            return False
        made = self._made.setdefault(at, [])
        made.append(call)
        return len(made) <= len(expected) and made == list(expected[: len(made)])

    def _show(self, at: tuple[str, int], call: str, func: Any, args: Any, kwargs: Any) -> Any:
        module, number = at
        over = writes(func) and isinstance(args[0] if args else None, torch.Tensor)
        visit = self._scope.visitor.visit
        given, named = visit(module, f"{call}.inputs", number, (tuple(args), dict(kwargs)))
        if over:
            # The model goes on with the variable it wrote over, not with what the function returns.
            _into(args[0], given[0])
            given = (args[0], *given[1:])
        output = func(*given, **named)
        if not nests.tensors(output):
            return output
        shown = visit(module, f"{call}.output", number, output)
        if over:
            _into(args[0], shown)
            return args[0]
        return shown

    def astray(self, module: str, call: int) -> bool:
        """Whether a watched module's forward, now over, made other calls than those that were measured."""
        expected = self._watched.get(module)
        return expected is not None and tuple(self._made.get((module, call), ())) != tuple(expected)


def _into(memory: torch.Tensor, value: torch.Tensor) -> None:
    if value is not memory:
        memory.copy_(value)
