"""Saving values that a notebook holds together."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any, SupportsIndex, TypeVar

from .outside import is_deferred

T = TypeVar("T")


def save(value: T) -> T:
    """Save a deferred value, or all of those in a list, tuple or dict.

    Returns what becomes real: of a list or dict one that also saves what is put into it later in the block.
    """
    kept: Any = value
    if is_deferred(value) or hasattr(value, "save"):
        kept = value.save()  # type: ignore[attr-defined]
    elif isinstance(value, list):
        kept = SavedList(value)
        value[:] = kept
    elif isinstance(value, dict):
        kept = SavedDict(value)
        value.update(kept)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        kept = type(value)(*map(save, value))
    elif isinstance(value, (tuple, set)):
        kept = type(value)(map(save, value))
    return kept  # type: ignore[no-any-return]


class StepValues(list[Any]):
    """What is saved in a body of steps: after the block a list of values, one for each step that was reached.

    None stands for a step at which there was nothing to save: the condition around it wasn't met, or the prompts
    the value comes from had ended.
    """

    _absent = ""
    _holder: SavedList | None = None
    """The list it was put into, which takes its values one by one."""
    _body: int | None = None
    """The control node in whose body it was put there."""
    _come = False

    def _become(self, values: Any) -> None:
        self[:] = values
        self._come = True
        if self._holder is not None:
            self._holder._spread()

    def save(self) -> StepValues:
        """Nothing more to do: it is saved."""
        return self


class SavedList(list[Any]):
    """A list that saves what is put into it. What a body of steps puts there becomes one member a step."""

    def __init__(self, values: Iterable[Any] = ()) -> None:
        super().__init__(map(self._kept, values))

    def append(self, value: Any) -> None:
        super().append(self._kept(value))

    def extend(self, values: Iterable[Any]) -> None:
        super().extend(map(self._kept, values))

    def insert(self, index: SupportsIndex, value: Any) -> None:
        super().insert(index, self._kept(value))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, list(map(self._kept, value)) if isinstance(index, slice) else self._kept(value))

    def __iadd__(self, values: Iterable[Any]) -> SavedList:  # type: ignore[misc]
        self.extend(values)
        return self

    @property
    def value(self) -> SavedList:
        """The list itself: notebooks read `.value` of what was saved."""
        return self

    def save(self) -> SavedList:
        """Nothing more to do: its members are saved as they come."""
        return self

    def _kept(self, value: Any) -> Any:
        kept = save(value)
        if isinstance(kept, StepValues) and is_deferred(value):
            kept._holder, kept._body = self, value._recorder.when
        return kept

    def _spread(self) -> None:
        """Once all steps' values are there: in the order of the steps, as a loop would have put them."""
        if any(isinstance(item, StepValues) and not item._come for item in self):
            return
        plain: list[Any] = []
        for body, items in groupby(self, lambda item: item._body if isinstance(item, StepValues) else None):
            rows = list(items)
            plain += rows if body is None else [value for step in zip(*rows, strict=True) for value in step]
        list.__setitem__(self, slice(None), plain)


class SavedDict(dict[Any, Any]):
    """A dict that saves what is put into it."""

    def __init__(self, values: Any = (), **named: Any) -> None:
        super().__init__({key: save(value) for key, value in dict(values, **named).items()})

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, save(value))

    def update(self, *values: Any, **named: Any) -> None:
        super().update({key: save(value) for key, value in dict(*values, **named).items()})

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    @property
    def value(self) -> SavedDict:
        """The dict itself: notebooks read `.value` of what was saved."""
        return self

    def save(self) -> SavedDict:
        """Nothing more to do: its values are saved as they come."""
        return self


def advise(error: BaseException | None) -> None:
    """Add what to write to the error of a `.save()` on Python's own objects, which have none here."""
    if isinstance(error, AttributeError) and error.name == "save" and type(error.obj).__module__ == "builtins":
        kind = type(error.obj).__name__
        error.add_note(
            f"interpose: nothing is mounted on Python's own types; a {kind} is kept with interpose.save(...), "
            "which returns it: kept = interpose.save([]), then kept.append(value). Numbers known now need no save"
        )
