"""What is wrong with what an operator wrote, in their words: which key, what it may be, what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

from pydantic import BaseModel

Place: TypeAlias = tuple[str | int, ...]
"""Keys and positions, from the outermost on."""

LONGEST = 60
"""Characters of a value that are shown."""

EMPTY = "holds nothing; it has to hold at least one"

_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list",
    "tuple": "a list",
    "dict": "keys with values",
    "mapping": "keys with values",
    "model": "keys with values",
}
"""By the first word of pydantic's name for an error."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """Attributes:
    place: of the value, or of the key.
    at_key: whether the key itself is wrong.
    """

    place: Place
    told: str
    at_key: bool = False

    def __str__(self) -> str:
        name = ".".join(_key(part) for part in self.place)
        return f"{name}: {self.told}" if name else self.told

    def within(self, *outer: str | int) -> Mistake:
        return Mistake((*outer, *self.place), self.told, self.at_key)


def mistakes(
    errors: Iterable[Mapping[str, Any]], kind: type[BaseModel], homes: Mapping[str, Collection[str]] | None = None
) -> list[Mistake]:
    """Every mistake pydantic found.

    Args:
        errors: its own list of them.
        kind: what was to be made.
        homes: where else keys belong -> their names, for those that stand in the wrong place.
    """
    found = list(_all(errors, kind, homes or {}))
    # A list of which nothing could be made counts as empty, too.
    return [one for one in found if not (one.told == EMPTY and any(_is_inside(other, one) for other in found))]


def _all(
    errors: Iterable[Mapping[str, Any]], kind: type[BaseModel], homes: Mapping[str, Collection[str]]
) -> Iterator[Mistake]:
    for found in errors:
        place = tuple(found["loc"])
        of = _model_at(kind, place[:-1])
        if found["type"] == "extra_forbidden":
            name = str(place[-1])
            home = next((home for home, names in homes.items() if name in names), None)
            advice = f"; it belongs {home}" if home else suggestion(name, of.model_fields if of else ())
            yield Mistake(place, f"there is no such key here{advice}", at_key=True)
        else:
            secret = of is not None and bool(place) and _is_secret(of, str(place[-1]))
            yield Mistake(place, words(found, shown=not secret))


def words(found: Mapping[str, Any], *, shown: bool = True) -> str:
    """One of pydantic's errors, without its place.

    Args:
        shown: whether the value may be repeated.
    """
    kind, limits, value = found["type"], found.get("ctx", {}), found.get("input")
    told = f", not {_value(value)}" if shown else ""
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "there is no such key here"
    if kind == "value_error":
        return str(found["msg"]).removeprefix("Value error, ")
    if kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        return f"has to be {word} {limits[bound]:g}{told}"
    if kind in ("enum", "literal_error"):
        allowed = [name.strip(" '") for name in str(limits["expected"]).replace(" or ", ",").split(",")]
        close = suggestion(str(value), allowed, listed=False)
        return f"has to be one of {', '.join(allowed)}{told}{close}"
    if kind == "too_short":
        return EMPTY
    if (wanted := _KINDS.get(kind.partition("_")[0])) is not None:
        quoted = "; write it in quotes" if kind == "string_type" and not isinstance(value, list | dict) else ""
        return f"has to be {wanted}{told}{quoted if value is not None else ''}"
    return str(found["msg"])


def nearest(name: str, names: Collection[str]) -> str | None:
    """What was probably meant."""
    return next(iter(difflib.get_close_matches(name.lower(), names, 1, 0.6)), None)


def suggestion(name: str, names: Collection[str], *, listed: bool = True) -> str:
    """ "; did you mean this?", or else what there is, if that is to be listed."""
    if close := nearest(name, names):
        return f"; did you mean {close}?"
    return f"; there are {', '.join(names)}" if listed and names else ""


def _is_inside(mistake: Mistake, outer: Mistake) -> bool:
    return len(mistake.place) > len(outer.place) and mistake.place[: len(outer.place)] == outer.place


def _key(part: str | int) -> str:
    """As it can be shown in a terminal."""
    name = str(part)
    return name if name.isprintable() else repr(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "keys with values"
    if isinstance(value, list | tuple | set):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        shown = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."


def _model_at(kind: type[BaseModel], place: Place) -> type[BaseModel] | None:
    """Of what kind is what stands at a place."""
    found: type[BaseModel] | None = kind
    for part in place:
        if isinstance(part, int):
            continue  # the items of a list are of the kind that its field names
        field = found.model_fields.get(part) if found else None
        found = _model_in(field.annotation) if field else None
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _is_secret(kind: type[BaseModel], name: str) -> bool:
    """Whether its value may hold a password."""
    field = kind.model_fields.get(name)
    return field is not None and not field.repr
