"""Hooks that exist only where a run touches the model, and act only for that run.

Several runs may be in flight in one process: a hook looks up the run of its own context and stands aside for any
other. Whatever happens inside, nothing stays hooked afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from .functions import Functions
from .fused import explicit


class Visitor(Protocol):
    """What a run does at the moments it asked for.

    Attributes:
        attention: whether attention takes its eager form, so that scores and pattern exist.
    """

    attention: bool

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        """Called at one moment; returns the value the model goes on with.

        `event` is "enter" (value: positional tuple and keyword dict), "exit" (the output), a named point of
        attention, or "softmax_0.inputs" and "softmax_0.output" around a function's call. `call` counts this
        module's calls in this forward, from 0.
        """

    def astray(self, module: str) -> None:
        """A module's forward called other functions than those that were measured."""


class Onlooker:
    """A visitor that changes nothing; no call of a function is out of order to it."""

    attention: bool

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        return value

    def astray(self, module: str) -> None:
        """Nothing was expected."""


class Looking(Onlooker):
    """One for whose sake attention takes its eager form."""

    attention = True


class Scope:
    """One forward of one run: its visitor, and how often each module was called so far."""

    def __init__(self, visitor: Visitor, names: Mapping[nn.Module, str]) -> None:
        self.visitor = visitor
        self.names = names
        self.running: list[str | None] = []
        """Modules under way, innermost last; None for one that isn't touched, and while the run itself computes."""
        self.explicit = 0
        """How often torch's fused attention was written out."""
        self._veils = 0
        self._calls: dict[str, int] = {}
        self._open: dict[str, list[int]] = {}

    @property
    def veiled(self) -> bool:
        """Whether an attention function of the library is under way."""
        return self._veils > 0

    @contextmanager
    def veil(self) -> Iterator[None]:
        """Functions called inside are nobody's."""
        self.running.append(None)
        self._veils += 1
        try:
            yield
        finally:
            self._veils -= 1
            self.running.pop()

    def count(self, module: str) -> int:
        """The number of a module's call, each counted once."""
        call = self._calls.get(module, 0)
        self._calls[module] = call + 1
        return call

    def enter(self, module: str) -> int:
        call = self.count(module)
        self._open.setdefault(module, []).append(call)
        return call

    def leave(self, module: str) -> int:
        return self._open[module].pop()

    def current_call(self, module: str) -> int:
        stack = self._open.get(module)
        return stack[-1] if stack else 0

    def touches(self, module: nn.Module) -> bool:
        """Whether this module is hooked, and its forward is being run right now."""
        name = self.names.get(module)
        return name is not None and bool(self._open.get(name))

    def taps(self, module: nn.Module) -> Callable[[str, Any], Any]:
        """`tap(event, value) -> value` for named points inside one module's forward."""
        return self.tap(self.names[module])

    def tap(self, name: str | None) -> Callable[[str, Any], Any]:
        """The same by the module's path; None for a module that isn't touched."""
        if name is None:
            return lambda event, value: value
        call = self.current_call(name)
        return lambda event, value: self.visitor.visit(name, event, call, value)


CURRENT: ContextVar[Scope | None] = ContextVar("interpose_scope", default=None)


def others(module: nn.Module) -> list[Any]:
    """What is called with a module and isn't ours: hooks, and a forward that was set on it alone."""
    found: list[Any] = []
    if module._forward_hooks or module._forward_pre_hooks:
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        found += [hook for hook in hooks if getattr(hook, "__module__", None) != __name__]
    if "forward" in vars(module):
        found.append(vars(module)["forward"])
    return found


@contextmanager
def no_hooks() -> Iterator[None]:
    """Modules called inside fire no hooks."""
    token = CURRENT.set(None)
    try:
        yield
    finally:
        CURRENT.reset(token)


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module],
    names: Mapping[nn.Module, str],
    visitor: Visitor,
    functions: Mapping[str, Sequence[str] | None] | None = None,
    exits: Collection[str] = (),
) -> Iterator[Scope]:
    """Hook the given modules for the forwards made inside, in this context only.

    Args:
        modules: path -> module, the touched ones; a module whose inner points are touched must be among them.
        names: module -> path for the whole model.
        functions: those of them whose functions' calls are shown -> the calls that were measured, in order; None
            for whatever calls come.
        exits: those of them that are asked for nothing but what they return, a call at a time.
    """
    scope = Scope(visitor, names)
    functions = functions or {}
    handles: list[RemovableHandle] = []
    token = CURRENT.set(scope)
    try:
        with _mode(scope, functions) as mode:
            for name, module in modules.items():
                if mode is None and name in exits:
                    handles.append(_exit(scope, name, module))
                else:
                    handles += _hook(scope, name, module, mode)
            for module in _within(modules, functions):
                handles += _veiled(scope, module)
            yield scope
    finally:
        CURRENT.reset(token)
        for handle in handles:
            handle.remove()


def _mode(scope: Scope, functions: Mapping[str, Sequence[str] | None]) -> AbstractContextManager[Functions | None]:
    """Torch's mode that sees functions, where the run looks at any."""
    if not functions and not scope.visitor.attention:
        return nullcontext()
    return Functions(scope, functions, explicit if scope.visitor.attention else None)


def _within(modules: Mapping[str, nn.Module], functions: Mapping[str, Any]) -> set[nn.Module]:
    """Modules within those whose functions are shown, but for the touched ones, whose functions are their own."""
    inside = {module for name in functions for module in modules[name].modules()}
    return inside - set(modules.values())


def _hook(scope: Scope, name: str, module: nn.Module, mode: Functions | None) -> list[RemovableHandle]:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if CURRENT.get() is not scope:
            return None
        call = scope.enter(name)
        scope.running.append(None)
        shown = scope.visitor.visit(name, "enter", call, (args, kwargs))
        scope.running[-1] = name
        return shown

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if CURRENT.get() is not scope:
            return None
        scope.running[-1] = None
        call = scope.leave(name)
        if mode is not None and mode.astray(name, call):
            scope.visitor.astray(name)
        shown = scope.visitor.visit(name, "exit", call, output)
        scope.running.pop()
        return shown

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, with_kwargs=True),
    ]


def _exit(scope: Scope, name: str, module: nn.Module) -> RemovableHandle:
    """A hook at what a module returns alone."""

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return scope.visitor.visit(name, "exit", scope.count(name), output) if CURRENT.get() is scope else None

    return module.register_forward_hook(leave)


def _veiled(scope: Scope, module: nn.Module) -> list[RemovableHandle]:
    """Hooks by which functions that an untouched module calls aren't taken for its parent's."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        if CURRENT.get() is scope:
            scope.running.append(None)

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if CURRENT.get() is scope:
            scope.running.pop()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
