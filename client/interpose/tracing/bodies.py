"""The bodies of steps, conditions and loops that lie around a place in what is recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import BadArgument
from ..graph.model import Node


def around(nodes: Sequence[Node], control: int | None) -> Iterator[int]:
    """A control node and those whose bodies hold it, innermost first."""
    while control is not None:
        yield control
        control = nodes[control].when


def scopes(nodes: Sequence[Node], control: int | None) -> Iterator[int | None]:
    """The bodies around a place in the graph whose reads are its own too, innermost first."""
    yield control
    while control is not None and nodes[control].op != "steps":
        control = nodes[control].when
        yield control


def steps(nodes: Sequence[Node], control: int | None) -> int | None:
    """The body of steps that a control node is or lies in."""
    if control is None:
        return None
    *_, outermost = scopes(nodes, control)
    return outermost


def check_repeats(nodes: Sequence[Node], here: int | None, made: int | None) -> None:
    """Raises BadArgument if a body that runs many times is to change what was made outside it, under `made`.

    Each time it would begin with the same value: nothing would add up.
    """
    outside = set(around(nodes, made))
    for control in around(nodes, here):
        if control not in outside and nodes[control].op in ("steps", "loop"):
            raise BadArgument(
                "what was made outside a body that runs many times can't be changed in place in it; read the "
                "point there, or for values that add up use t.loop(n, body, start)"
            )
