"""Blocks divided into ranges, as evenly as their bytes allow."""

from __future__ import annotations

from collections.abc import Sequence

ROUNDS = 40
"""Halvings in the search for the evenest division."""


def divided(blocks: Sequence[int], home: int, rooms: Sequence[int]) -> list[range]:
    """Consecutive ranges of blocks, one for each room, so that the fullest room is as empty as can be.

    Args:
        blocks: bytes of each.
        home: bytes that the first room holds besides.
        rooms: bytes of each; no more of them than blocks, unless there is one.
    """
    low, high = 0.0, 1.0
    while _filled(blocks, home, rooms, high) is None:
        high *= 2
    found = _filled(blocks, home, rooms, high)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        tried = _filled(blocks, home, rooms, middle)
        if tried is None:
            low = middle
        else:
            high, found = middle, tried
    assert found is not None
    return found


def _filled(blocks: Sequence[int], home: int, rooms: Sequence[int], part: float) -> list[range] | None:
    """Each room filled up to a part of it, in order; None where blocks are left over. No room stays empty."""
    ranges, start = [], 0
    for index, room in enumerate(rooms):
        held = home if index == 0 else 0
        stop, later = start, len(rooms) - index - 1
        while stop < len(blocks) - later and (stop == start or held + blocks[stop] <= part * max(room, 1)):
            held += blocks[stop]
            stop += 1
        if held > part * max(room, 1):
            return None
        ranges.append(range(start, stop))
        start = stop
    return ranges if start == len(blocks) else None
