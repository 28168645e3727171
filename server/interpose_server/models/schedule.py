"""When a model is kept loaded: windows of the week, in UTC, as "mon-fri 08:00-20:00"."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MIN = 24 * 60
_FORM = re.compile(r"(\S+) ([0-2]\d):([0-5]\d)-([0-2]\d):([0-5]\d)")
_SHOWN = "mon-fri 08:00-20:00"


@dataclass(frozen=True, slots=True)
class Window:
    """Attributes:
    days: 0 is Monday.
    begin, end: minutes of the day it begins on. With an end no later than its beginning it ends on the next day.
    """

    days: frozenset[int]
    begin: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """As "mon-fri 08:00-20:00", "sat,sun 22:00-06:00", "daily 00:00-24:00". Raises ValueError."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no time of the week; write it like {_SHOWN!r}")
        hours = [int(part) for part in found.groups()[1:]]
        begin, end = hours[0] * 60 + hours[1], hours[2] * 60 + hours[3]
        if begin >= DAY_MIN or end > DAY_MIN:
            raise ValueError(f"{text!r}: a day goes from 00:00 to 24:00")
        if begin == end:
            raise ValueError(f"{text!r} begins when it ends; a whole day is 00:00-24:00")
        return cls(frozenset(_days(found[1], text)), begin, end)

    def holds(self, at: datetime) -> bool:
        """Whether a moment lies within; its end doesn't."""
        at = at.astimezone(UTC)
        minute, day = at.hour * 60 + at.minute, at.weekday()
        if self.begin < self.end:
            return day in self.days and self.begin <= minute < self.end
        yesterday = (day - 1) % 7
        return (day in self.days and minute >= self.begin) or (yesterday in self.days and minute < self.end)


def scheduled(windows: Iterable[str], now_s: float) -> bool:
    """Whether one of the windows, as text, holds a moment in seconds since 1970."""
    at = datetime.fromtimestamp(now_s, UTC)
    return any(Window.parse(text).holds(at) for text in windows)


def _days(text: str, whole: str) -> set[int]:
    if text == "daily":
        return set(range(7))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            raise ValueError(f"{whole!r}: days are {', '.join(DAYS)}, as in {_SHOWN!r}, or daily")
        begin = DAYS.index(first)
        length = (DAYS.index(last) - begin) % 7 if dash else 0
        found |= {(begin + step) % 7 for step in range(length + 1)}
    return found
