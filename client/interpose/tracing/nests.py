"""Several deferred values held together, as modules take and return them and operations give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UnknownPoint
from ..graph.manifest import UNKNOWN, Layout, Leaf, leaves, walk
from ..graph.model import Key, Point

if TYPE_CHECKING:
    from .recorder import Recorder


class Several(tuple[Any, ...]):
    """Several deferred values that came out of one operation; named where torch names them."""

    _names: tuple[str, ...]

    def __new__(cls, parts: Sequence[Any], names: Sequence[str] = ()) -> Several:
        made = super().__new__(cls, parts)
        made._names = tuple(names)
        return made

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            return self[self._names.index(name)]
        raise AttributeError(name)

    def save(self) -> Several:
        return Several([part.save() for part in self], self._names)


class Nest:
    """What a module takes or returns where that is more than one tensor: a tuple or mapping of deferred values."""

    def __init__(self, recorder: Recorder, point: Point, layout: Layout) -> None:
        self._recorder, self._point, self._layout = recorder, point, layout
        self._saved: dict[Key, Any] = {}

    def __getitem__(self, key: Key) -> Any:
        if key in self._saved:
            return self._saved[key]
        if isinstance(self._layout, tuple) and isinstance(key, int) and key < 0:
            return self[key + len(self._layout)]
        part = self._part(key)
        if part is None:
            raise UnknownPoint(f"{self._point}[{key!r}] is no tensor: there is nothing to read")
        return self._recorder.points.at(self._point.inner(key))

    def __setitem__(self, key: Key, value: Any) -> None:
        if isinstance(self._layout, tuple) and isinstance(key, int) and key < 0:
            key += len(self._layout)
        self._part(key)
        self._recorder.points.replace(self._point.inner(key), value)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and isinstance(self._layout, dict) and name in self._layout:
            return self[name]
        raise AttributeError(f"{self!r} has no {name!r}")

    def __len__(self) -> int:
        return len(self._keys())

    def __iter__(self) -> Any:
        if isinstance(self._layout, dict):
            return iter(self._layout)
        return iter([self[key] for key in self._keys()])

    def keys(self) -> Sequence[Key]:
        return self._keys()

    def items(self) -> list[tuple[Key, Any]]:
        return [(key, self[key]) for key in self._keys()]

    def save(self) -> Nest:
        """Save every tensor in it. Not those whose size isn't known: a forward may go without them, as a mask."""
        if not leaves(self._layout):
            raise UnknownPoint(f"{self._point} holds no tensor: there is nothing to save")
        for key in self._keys():
            part = self._part(key)
            if leaves(part) and not (isinstance(part, Leaf) and UNKNOWN in part.dims):
                self._saved[key] = self[key].save()
        return self

    def first(self) -> Any:
        """The first tensor that was saved, None without any."""
        for part in self._saved.values():
            found = part.first() if isinstance(part, Nest) else part
            if found is not None:
                return found
        return None

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self._keys()))
        return f"<{self._point}: {type(self._layout).__name__} of {shown}>"

    def _keys(self) -> Sequence[Key]:
        if isinstance(self._layout, dict):
            return list(self._layout)
        return range(len(self._layout)) if isinstance(self._layout, tuple) else ()

    def _part(self, key: Key) -> Layout:
        try:
            return walk(self._layout, (key,))
        except KeyError:
            keys = [repr(key) for key in self._keys()]
            first = f"; take one first: {self._point.name}[{keys[0]}]" if keys else ""
            raise UnknownPoint(
                f"{self._point} has no {key!r}: it is a {type(self._layout).__name__} of {', '.join(keys)}{first}"
            ) from None
