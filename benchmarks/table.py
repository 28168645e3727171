"""The table: what was measured, beside what, and how they relate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Row:
    """Texts with their units. `note`: what one has to know to read the figures."""

    what: str
    ours: str
    beside: str
    relation: str
    note: str = ""


HEADER = Row("measured", "Interpose", "beside it", "relation", "note")


def markdown(rows: Sequence[Row]) -> str:
    lines = [astuple(row) for row in (HEADER, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    texts = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts)


def ms(value: float) -> str:
    """Seconds, as milliseconds."""
    return f"{value * 1e3:.2f} ms"


def us(value: float) -> str:
    """Seconds, as microseconds."""
    return f"{value * 1e6:.0f} us"


def mb_s(size: int, value: float) -> str:
    """The rate of bytes in seconds."""
    return f"{size / value / 1e6:.0f} MB/s"
