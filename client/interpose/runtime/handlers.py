"""Ops that concern the model or the job rather than tensors alone: what each does when it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadArgument
from ..graph.model import Node
from ..graph.specs import nbytes
from ..graph.validate import HANDLERS as CHECKED
from .adapters import parameter
from .calls import called, check_call
from .hooks import no_hooks
from .kernels import described
from .loops import truth
from .plan import ACCESSES, GIVEN, MOMENTS
from .skipped import ABSENT, LATER, SKIPPED
from .slots import assign
from .telling import told

if TYPE_CHECKING:
    from .interpreter import Interpreter
    from .world import Elsewhere


def save(job: Interpreter, node: Node, args: tuple[Any, ...]) -> None:
    value = job.absences.saved(node, args[0])
    if value is ABSENT:
        job.saves.skip(node)
    else:
        job.saves.keep(node, value)


def tell(job: Interpreter, node: Node, args: tuple[Any, ...]) -> None:
    job.saves.tell(node, " ".join(map(told, args)))


def attachment(job: Interpreter, node: Node, args: tuple[Any, ...]) -> torch.Tensor:
    return job.attachments[args[0]].to(job.world.device)


def param(job: Interpreter, node: Node, args: tuple[Any, ...]) -> Any:
    path, name = args
    if (far := _far(job, path)) is not None:
        value, made = far.parameter(path, name, job.choice(node))
    else:
        with job.adapter(node):
            value, made = parameter(job.world.modules[path], name)
    if made:
        job.afford(value.nbytes, 0)
    return value


def call(job: Interpreter, node: Node, args: tuple[Any, ...]) -> Any:
    path, value = args
    far = _far(job, path)
    if far is None:
        check_call(job.world.manifest, job.world.modules[path], path, value, job.limits)
    if job.unknown(node.id) and isinstance(value, torch.Tensor):
        spec, flops = called(job.world.manifest, path, described(value))
        job.afford(5 * nbytes(spec), flops)
    if far is not None:
        return far.call(path, value, job.limits, job.choice(node))
    if job.products is not None and job.products.take(job, node, path, value):
        return LATER
    with no_hooks(), job.adapter(node):
        output = job.world.modules[path](value)
    if not isinstance(output, torch.Tensor):
        raise BadArgument(f"{path} returns no single tensor, so it can't be called on a value")
    return output


def _far(job: Interpreter, path: str) -> Elsewhere | None:
    """Where a module is, if that isn't here."""
    far = job.world.elsewhere
    return far if far is not None and far.has(path) else None


def update(job: Interpreter, node: Node, args: tuple[Any, ...]) -> torch.Tensor:
    base, chain, index, value = args
    if job.unknown(node.id):
        job.afford(base.nbytes, 0)
    fresh: torch.Tensor = base.clone()
    assign(fresh, chain, index, value)
    return fresh


def branch(job: Interpreter, node: Node, args: tuple[Any, ...]) -> bool:
    """Whether the body runs; if not, everything in it is skipped."""
    job.absences.check_condition(node)
    pred, wanted = args
    taken = truth(pred) is wanted
    if not taken:
        job.pass_over(node, SKIPPED)
    return taken


def choose(job: Interpreter, node: Node, args: tuple[Any, ...]) -> Any:
    then, _, one, two = args
    return one if then else two


def backward(job: Interpreter, node: Node, args: tuple[Any, ...]) -> None:
    job.gradients.ask(node, args[0])


def nothing(job: Interpreter, node: Node, args: tuple[Any, ...]) -> None:
    """Control nodes do nothing themselves."""


HANDLERS: Mapping[str, Callable[[Interpreter, Node, tuple[Any, ...]], Any]] = {
    "save": save,
    "tell": tell,
    "attachment": attachment,
    "param": param,
    "call": call,
    "update": update,
    "steps": nothing,
    "branch": branch,
    "choose": choose,
    "loop": nothing,
    "backward": backward,
}
assert set(HANDLERS) | MOMENTS | {"carry", "turn", "end_loop"} == set(CHECKED)
assert GIVEN | ACCESSES < MOMENTS
