"""Gradients of values inside the model.

Parameters are frozen, so nothing is differentiated until a value is watched: there the graph of gradients is cut,
and what the model computes from it is tracked. A gradient is taken of the whole tensor the model goes on with, then
cut to the rows that asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadArgument, NotReached, WrongOrder
from ..graph.model import Node
from .slots import assign

if TYPE_CHECKING:
    from .interpreter import Interpreter
    from .rows import View


class Gradients:
    """The watched values of one job, and the backward that is under way."""

    def __init__(self, job: Interpreter) -> None:
        self._job = job
        self._backward: int | None = None
        self._left = len(job.plan.backwards)
        self._reached: set[int] = set()
        self._leaves: list[torch.Tensor] = []

    def watch(self, target: int, tensor: torch.Tensor, view: View) -> None:
        """Serve gradient reads and writes of a part of `tensor`."""
        _differentiable(tensor)

        def arrived(gradient: torch.Tensor) -> torch.Tensor | None:
            part = view.cut(gradient)
            new = self._serve(target, part)
            if new is part:
                return None
            fresh = gradient.clone()
            view.paste(fresh, new)
            return fresh

        self._hook(tensor, arrived)

    def watch_value(self, target: int, value: Any) -> torch.Tensor:
        """The same for a value the graph itself computed; returns it, ready for gradients."""
        if not isinstance(value, torch.Tensor):
            raise BadArgument("only a tensor has a gradient")
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        watched: torch.Tensor = value
        _differentiable(watched)

        def arrived(gradient: torch.Tensor) -> torch.Tensor | None:
            new = self._serve(target, gradient)
            return None if new is gradient else new

        self._hook(watched, arrived)
        return watched

    def _hook(self, tensor: torch.Tensor, arrived: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        tensor.register_hook(arrived)  # type: ignore[no-untyped-call]
        if tensor.is_leaf:
            self._leaves.append(tensor)

    def run(self, node: Node, loss: torch.Tensor) -> None:
        """Run a backward. Raises NotReached for a gradient that was asked for and didn't come."""
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise NotReached("the loss depends on no value whose gradient was asked for")
        self._backward = node.id
        self._left -= 1
        try:
            # By what is left to run: a loss of an early layer runs first, whatever its line.
            loss.sum().backward(retain_graph=self._left > 0)  # type: ignore[no-untyped-call]
        finally:
            self._backward = None
            # What was handed out may be this very memory, and the next backward would add to it in place.
            for leaf in self._leaves:
                leaf.grad = None
        for target, by in self._job.plan.gradients.items():
            for access in by.get(node.id, ()):
                if access.id not in self._reached or not self._job.plan.flows(node, target):
                    raise NotReached("no gradient flows from the loss to this value").at(
                        access.id, access.op, access.source
                    )

    def _serve(self, target: int, gradient: torch.Tensor) -> torch.Tensor:
        """Do what the graph asks at a gradient; returns what goes on upstream."""
        backward = self._backward
        accesses: Sequence[Node] = ()
        if backward is not None:
            accesses = self._job.plan.gradients[target].get(backward, ())
        for node in accesses:
            self._reached.add(node.id)
            if node.op == "grad":
                # What doesn't change this backward waits for its end: another backward, for one.
                with torch.enable_grad():
                    self._job.provide(node.id, gradient, self._job.plan.upstream)
            elif self._job.waits(node):
                error = WrongOrder("a gradient is replaced by something that comes only further upstream")
                raise error.at(node.id, node.op, node.source)
            else:
                chain, index, new = self._job.arguments(node.args[2:])
                gradient = gradient.clone()
                assign(gradient, chain, index, new)
                self._job.release(node)
        return gradient


def _differentiable(tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise BadArgument(f"a value of {tensor.dtype} has no gradient")
