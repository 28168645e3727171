"""Whether copies of models fit on devices together. Conservative: what it takes for fitting fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Parts = tuple[float, ...]
"""The devices of each part of one copy. A part lies within one node: one device or a share of it, or several whole
ones. The parts of a copy may lie on different nodes."""


def packs(copies: Iterable[Parts], nodes: Sequence[float]) -> bool:
    """Whether all copies find a place: the largest parts first, each where it leaves the least.

    Args:
        nodes: how many devices each node has.
    """
    # What is left of each device; floating-point dust mustn't keep three thirds out of one.
    left = [[1.0] * int(node) + ([node % 1] if node % 1 else []) for node in nodes]
    for part in sorted((part for copy in copies for part in copy if part > 0), reverse=True):
        if not (_whole(part, left) if part > 1 else _share(part, left)):
            return False
    return True


def _whole(part: float, left: list[list[float]]) -> bool:
    """Take whole devices of the node that has the fewest to spare."""
    fitting = [node for node in left if node.count(1.0) >= part]
    if not fitting:
        return False
    node = min(fitting, key=lambda one: one.count(1.0))
    for _ in range(int(part)):
        node.remove(1.0)
        node.append(0.0)
    return True


def _share(part: float, left: list[list[float]]) -> bool:
    """Take a share of the device that has the least to spare, in the node with the fewest untouched ones."""
    fitting = [
        (room, node.count(1.0), number, place)
        for number, node in enumerate(left)
        for place, room in enumerate(node)
        if room >= part - 1e-6
    ]
    if not fitting:
        return False
    room, _, number, place = min(fitting)
    left[number][place] = room - part
    return True
