"""Reading a plain map field by field: each of the right type, none left over."""

from __future__ import annotations

import sys
from typing import Any

import msgpack

from ..errors import InvalidPayload
from ..graph.values import INT_MAX, sendable

HEX = frozenset("0123456789abcdef")


class Fields:
    """A decoded map whose fields are taken one at a time. Every complaint is an InvalidPayload."""

    def __init__(self, plain: Any, what: str) -> None:
        if not isinstance(plain, dict):
            raise InvalidPayload(f"{what} isn't a map")
        self._left = dict(plain)
        self.what = what

    def take(self, name: str) -> Any:
        """A field of any type that must be there."""
        if name not in self._left:
            raise InvalidPayload(f"{self.what} has no {name!r}")
        return self._left.pop(name)

    def maybe(self, name: str) -> Any:
        """A field of any type, None if it isn't there."""
        return self._left.pop(name, None)

    def text(self, name: str, longest: int = 256) -> str:
        value = self.take(name)
        if not isinstance(value, str) or len(value) > longest or not sendable(value):
            raise self.wrong(name, f"a text of at most {longest} characters")
        return value

    def whole(self, name: str, low: int = 0, high: int = INT_MAX) -> int:
        value = self.take(name)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if type(value) is not bool:
            raise self.wrong(name, "true or false")
        return value

    def seconds(self, name: str) -> float | None:
        value = self.maybe(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.wrong(name, "a positive number of seconds")
        return float(value)

    def job(self, name: str = "job") -> str:
        """A job's id: 32 lower-case hex digits."""
        return check_job(self.take(name), f"{self.what}'s {name!r}")

    def mapping(self, name: str) -> dict[Any, Any]:
        value = self.take(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "a map")
        return value

    def list(self, name: str, most: int) -> list[Any]:
        value = self.take(name)
        if not isinstance(value, list) or len(value) > most:
            raise self.wrong(name, f"a list of at most {most}")
        return value

    def done(self) -> None:
        """Raises InvalidPayload if a field was never taken."""
        if self._left:
            raise InvalidPayload(f"{self.what} has unknown fields: {', '.join(map(repr, list(self._left)[:5]))}")

    def wrong(self, name: str, expected: str) -> InvalidPayload:
        return InvalidPayload(f"{self.what}'s {name!r} isn't {expected}")


def check_job(value: Any, what: str = "a job's id") -> str:
    """`value` if it is 32 lower-case hex digits. Raises InvalidPayload otherwise."""
    if not isinstance(value, str) or len(value) != 32 or not set(value) <= HEX:
        raise InvalidPayload(f"{what} isn't 32 lower-case hex digits")
    return value


def check_sha(value: Any, what: str = "a tensor's name") -> str:
    """`value` if it is 64 lower-case hex digits. Raises InvalidPayload otherwise."""
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= HEX:
        raise InvalidPayload(f"{what} isn't a SHA-256 in lower-case hex")
    return value


def unpack(body: bytes | bytearray | memoryview, *, longest: int, containers: int) -> Any:
    """What msgpack bytes stand for, with bounds on what a short body can blow up to.

    Args:
        longest: items of one list or map.
        containers: lists and maps altogether; each costs some 60 bytes, however few the body spent on it.

    Raises:
        InvalidPayload: not msgpack, or over a bound.
    """
    left = containers

    def count(value: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {containers} lists and maps")
        return value

    try:
        return msgpack.unpackb(
            body,
            list_hook=count,
            object_hook=count,
            max_array_len=longest,
            max_map_len=longest,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise InvalidPayload(f"not the msgpack expected here: {error}") from error
