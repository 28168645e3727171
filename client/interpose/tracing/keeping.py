"""Saving values that a notebook holds together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, SupportsIndex, TypeVar

from .outside import is_deferred

T = TypeVar("T")


def save(value: T) -> T:
    """Save a deferred value, or all of those in a list, tuple or dict; returns it."""
    if isinstance(value, (list, tuple, set)):
        for item in value:
            save(item)
    elif isinstance(value, dict):
        for item in value.values():
            save(item)
    elif is_deferred(value) or hasattr(value, "save"):
        value.save()  # type: ignore[attr-defined]
    return value


class StepValues(list[Any]):
    """What is saved in a body of steps: after the block a list of values, one for each step that was reached.

    None stands for a step at which the condition around the save wasn't met.
    """

    _absent = ""

    def _become(self, values: Any) -> None:
        self[:] = values

    def save(self) -> StepValues:
        """Nothing more to do: it is saved."""
        return self


class SavedList(list[Any]):
    """A list that saves what is put into it."""

    def __init__(self, values: Iterable[Any] = ()) -> None:
        super().__init__(map(save, values))

    def append(self, value: Any) -> None:
        super().append(save(value))

    def extend(self, values: Iterable[Any]) -> None:
        super().extend(map(save, values))

    def insert(self, index: SupportsIndex, value: Any) -> None:
        super().insert(index, save(value))

    def save(self) -> SavedList:
        """Nothing more to do: its members are saved as they come."""
        return self
