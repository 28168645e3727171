"""Hooks that exist only where a run touches the model, and act only for that run.

Several runs may be in flight in one process: a hook looks up the run of its own context and stands aside for any
other. Whatever happens inside, nothing stays hooked afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle


class Visitor(Protocol):
    """What a run does at the moments it asked for.

    Attributes:
        attention: whether attention takes its eager form, so that scores and pattern exist.
    """

    attention: bool

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        """Called at one moment; returns the value the model goes on with.

        `event` is "enter" (value: positional tuple and keyword dict), "exit" (the output), or a named point of
        attention. `call` counts this module's calls in this forward, from 0.
        """


class Scope:
    """One forward of one run: its visitor, and how often each module was called so far."""

    def __init__(self, visitor: Visitor, names: Mapping[nn.Module, str]) -> None:
        self.visitor = visitor
        self.names = names
        self._calls: dict[str, int] = {}
        self._open: dict[str, list[int]] = {}

    def enter(self, module: str) -> int:
        call = self._calls.get(module, 0)
        self._calls[module] = call + 1
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
        name = self.names[module]
        call = self.current_call(name)
        return lambda event, value: self.visitor.visit(name, event, call, value)


CURRENT: ContextVar[Scope | None] = ContextVar("interpose_scope", default=None)


@contextmanager
def no_hooks() -> Iterator[None]:
    """Modules called inside fire no hooks."""
    token = CURRENT.set(None)
    try:
        yield
    finally:
        CURRENT.reset(token)


@contextmanager
def hooked(modules: Mapping[str, nn.Module], names: Mapping[nn.Module, str], visitor: Visitor) -> Iterator[Scope]:
    """Hook the given modules for the forwards made inside, in this context only.

    Args:
        modules: path -> module, the touched ones; a module whose inner points are touched must be among them.
        names: module -> path for the whole model.
    """
    scope = Scope(visitor, names)
    handles: list[RemovableHandle] = []
    token = CURRENT.set(scope)
    try:
        for name, module in modules.items():
            handles += _hook(scope, name, module)
        yield scope
    finally:
        CURRENT.reset(token)
        for handle in handles:
            handle.remove()


def _hook(scope: Scope, name: str, module: nn.Module) -> list[RemovableHandle]:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if CURRENT.get() is not scope:
            return None
        call = scope.enter(name)
        return scope.visitor.visit(name, "enter", call, (args, kwargs))

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if CURRENT.get() is not scope:
            return None
        return scope.visitor.visit(name, "exit", scope.leave(name), output)

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, with_kwargs=True),
    ]
