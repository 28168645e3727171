"""Loops of a graph: a body that runs turn by turn, in a scope of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadArgument
from ..graph.model import Node
from .failures import located
from .held import compact

if TYPE_CHECKING:
    from .interpreter import Interpreter


def run_loop(job: Interpreter, end: Node, look: Callable[[int], Any]) -> tuple[Any, ...]:
    """Run a loop to its end, turn by turn, in a scope of its own."""
    start, outs, keep, each = end.args
    count, init = job.nodes[start.id].args
    carried = [look(ref.id) for ref in init]
    gathered: list[list[Any]] = [[] for _ in each]
    for turn in range(count):
        job.check_wanted()
        inside = _turn(job, start.id, carried, turn, look)

        def seen(ref: int, inside: dict[int, Any] = inside) -> Any:
            return inside[ref] if ref in inside else look(ref)

        if keep is not None and not truth(seen(keep.id)):
            break
        carried = [seen(ref.id) for ref in outs]
        for values, ref in zip(gathered, each, strict=True):
            values.append(compact(seen(ref.id)))
            if job.unknown(ref.id):
                job.held.add(values[-1])
        _drop_turn(job, inside)
    for values, ref in zip(gathered, each, strict=True):
        if job.unknown(ref.id):
            job.afford(sum(value.nbytes for value in values), 0)
            job.held.drop(values)
    return (*carried, *map(torch.stack, gathered))


def _drop_turn(job: Interpreter, inside: Mapping[int, Any]) -> None:
    for node, value in inside.items():
        if job.unknown(node):
            job.held.drop(value)


def _turn(
    job: Interpreter, loop: int, carried: Sequence[Any], turn: int, look: Callable[[int], Any]
) -> dict[int, Any]:
    """The values of one turn of a loop's body."""
    inside: dict[int, Any] = {}

    def seen(ref: int) -> Any:
        return inside[ref] if ref in inside else look(ref)

    for node in job.plan.bodies.get(loop, ()):
        try:
            if node.op == "carry":
                inside[node.id] = carried[node.args[0]]
            elif node.op == "turn":
                inside[node.id] = torch.tensor(turn, device=job.world.device)
            elif node.op == "loop":
                continue
            else:
                inside[node.id] = job.execute(node, seen)
            if job.unknown(node.id):
                job.held.add(inside[node.id])
        except Exception as error:
            raise located(error, node) from error
    return inside


def truth(value: Any) -> bool:
    """A condition's value. Raises BadArgument if it is more than one."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise BadArgument(f"a condition is one value, not {list(value.shape)}")
        return bool(value.item())
    return bool(value)
