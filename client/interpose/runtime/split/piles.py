"""Calls of stubs that pile up until somebody looks at what one of them returned."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ...errors import InternalError
from ..adapters import choice
from ..hooks import CURRENT
from .packing import Call
from .placeholders import Placeholder

Go: TypeAlias = Callable[[Tensor, Sequence[Call], Collection[int], "How"], Mapping[int, Tensor]]
"""Hidden states, calls, which of what they return is asked for, in which way -> what was asked for."""


@dataclass(frozen=True, slots=True)
class How:
    """In which way calls are made: as was the case where they were, whoever looks at what they return.

    Args:
        grad: with gradients.
        adapter: which one is chosen.
    """

    grad: bool
    adapter: str | None

    @classmethod
    def now(cls) -> How:
        return cls(torch.is_grad_enabled(), choice())


class Pile:
    """Calls of stubs that follow one another, each given just what the one before returned."""

    def __init__(self, go: Go, hidden: Tensor, how: How) -> None:
        self._go = go
        self._hidden = hidden
        self._how = how
        self._calls: list[Call] = []
        self._made: list[weakref.ref[Placeholder]] = []
        self._dtypes: list[torch.dtype | None] = []  # None where it isn't known
        self._values: Mapping[int, Tensor] = {}
        self._failed = ""
        self._done = False

    def takes(self, turn: int, how: How) -> bool:
        """Whether a call on what the call of that turn returned can join."""
        return not self._done and how == self._how and turn == len(self._calls) - 1

    def add(self, call: Call, dtype: torch.dtype | None) -> Placeholder:
        """Args: dtype: of what the call returns, None for that of what it is given."""
        dtype = dtype or (self._dtypes[-1] if self._dtypes else None) or self._hidden.dtype
        self._dtypes.append(dtype)
        made = Placeholder(self._hidden, dtype, self, len(self._calls))
        self._calls.append(call)
        self._made.append(weakref.ref(made))
        return made

    def first(self, call: Call) -> Tensor:
        """What one call returns of which nothing is known yet."""
        self._dtypes.append(None)
        self._calls.append(call)
        return self.value(0)

    def value(self, turn: int) -> Tensor:
        """What a call returned; the first time, all calls are made. Raises what that raises."""
        if not self._done:
            self._done = True
            try:
                self._flush(turn)
            except BaseException as error:
                # Not the error itself, whose frames hold this.
                self._failed = f"{type(error).__name__}: {error}"
                raise
            finally:
                self._calls.clear()
        if self._failed:
            raise InternalError(f"the blocks that make this value have failed: {self._failed}")
        return self._values[turn]

    def _flush(self, turn: int) -> None:
        # What nobody has any more nobody can ask for.
        held = {index for index, made in enumerate(self._made) if made() is not None}
        with _apart(), torch.set_grad_enabled(self._how.grad):
            self._values = self._go(self._hidden, self._calls, held | {turn, len(self._calls) - 1}, self._how)
        for index, value in self._values.items():
            dtype = self._dtypes[index] or value.dtype
            if value.shape != self._hidden.shape or value.dtype != dtype:
                raise InternalError(
                    f"{self._calls[index].place.path} makes {tuple(value.shape)} {value.dtype} of "
                    f"{tuple(self._hidden.shape)}, not {dtype}"
                )


@contextmanager
def _apart() -> Iterator[None]:
    """What is done inside is nobody's function call."""
    scope = CURRENT.get()
    if scope is not None:
        scope.running.append(None)
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        if scope is not None:
            scope.running.pop()
