"""Gradients of values inside the model.

Parameters are frozen, so nothing is differentiated until a value is watched: there the graph of gradients is cut,
and what the model computes from it is tracked. A gradient is taken of the whole tensor the model goes on with, then
cut to the rows that asked.

Jobs that share a forward share a backward of their summed losses: rows don't influence one another, so at each
job's own part of a value the gradient is that of its own loss. Where nothing but zeros arrives, it can't be told
whether that is the gradient or whether the way there is another job's; such a job runs again alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from ..errors import BadArgument, NotReached, WrongOrder
from ..graph.model import Node
from .failures import located
from .slots import assign

if TYPE_CHECKING:
    from .interpreter import Interpreter
    from .rows import View


class Gradients:
    """The watched values of one job, and the backwards that are under way."""

    def __init__(self, job: Interpreter) -> None:
        self._job = job
        self._waiting: list[tuple[Node, torch.Tensor]] = []
        """Backwards whose loss is there, to be run with those of other jobs."""
        self.active: dict[int, int] = {}
        """Watched node -> the backward under way whose gradient is asked for there."""
        self._left = len(job.plan.backwards)
        self.reached: set[int] = set()
        """Reads and writes of gradients that were served, here or on shards."""
        self._leaves: list[torch.Tensor] = []
        self._hooks: list[RemovableHandle] = []

    def watch(self, target: int, tensor: torch.Tensor, view: View, *, shared: bool) -> None:
        """Serve gradient reads and writes of a part of `tensor`, itself a part of what jobs share if `shared`."""
        _differentiable(tensor)

        def arrived(gradient: torch.Tensor | None) -> torch.Tensor | None:
            if gradient is None:
                return None
            part = view.cut(gradient)
            if shared and target in self.active and not part.any():
                self._job.doubt()
                return None
            new = self._guarded(target, part)
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
        if value.requires_grad:
            # Of this value alone: a condition or a loop may hand on another's very tensor, here or on its shard.
            with torch.enable_grad():
                value = value.view_as(value)
        else:
            value = value.detach().requires_grad_()
        watched: torch.Tensor = value
        _differentiable(watched)

        def arrived(gradient: torch.Tensor | None) -> torch.Tensor | None:
            if gradient is None:
                return None
            new = self._guarded(target, gradient)
            return None if new is gradient else new

        self._hook(watched, arrived)
        return watched

    def _hook(self, tensor: torch.Tensor, arrived: Callable[[torch.Tensor | None], torch.Tensor | None]) -> None:
        # None arrives where a function of several outputs passes on the gradients of others alone.
        self._hooks.append(tensor.register_hook(arrived))  # type: ignore[no-untyped-call]
        if tensor.is_leaf:
            self._leaves.append(tensor)

    def close(self) -> None:
        """The job is over. What hooks hold, torch's graph holds: no garbage collector would find the circle."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._leaves.clear()
        self._waiting.clear()

    def ask(self, node: Node, loss: torch.Tensor) -> None:
        """A backward's loss is there. Alone it runs now, as what comes later may need its gradients."""
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise NotReached("the loss depends on no value whose gradient was asked for")
        self._waiting.append((node, loss))
        if self._job.exclusive:
            run_backwards([self])

    def ebb(self) -> None:
        """A backward has come by. What was handed out may be this very memory, to which the next would add."""
        for leaf in self._leaves:
            leaf.grad = None

    @property
    def left(self) -> int:
        """How many backwards are still to come."""
        return self._left if self._job.error is None else 0

    def _take(self) -> list[tuple[Node, torch.Tensor]]:
        """The backwards to run next, in order: several as long as no value has a gradient of two of them."""
        plan, taken, reached = self._job.plan, [], set[int]()
        self.active.clear()
        for node, loss in self._waiting if self._job.error is None else ():
            asked = {target for target, by in plan.gradients.items() if node.id in by}
            comes_to = {target for target in plan.gradients if plan.flows(node, target)}
            if asked & reached or comes_to & self.active.keys():
                break
            reached |= comes_to
            self.active.update(dict.fromkeys(asked, node.id))
            taken.append((node, loss))
        self._waiting = self._waiting[len(taken) :] if self._job.error is None else []
        self._left -= len(taken)
        return taken

    def _end(self, nodes: Sequence[Node]) -> None:
        """Raises NotReached for a gradient that was asked for and didn't come."""
        for target, by in self._job.plan.gradients.items():
            for node in nodes:
                for access in by.get(node.id, ()):
                    if access.id not in self.reached or not self._job.plan.flows(node, target):
                        raise NotReached("no gradient flows from the loss to this value").at(
                            access.id, access.op, access.source
                        )

    def _guarded(self, target: int, gradient: torch.Tensor) -> torch.Tensor:
        """Serve the job; what it does wrong is its own failure, and the backward goes on."""
        new = gradient
        with self._job.guard():
            if self._job.error is None:
                new = self._serve(target, gradient)
        return new

    def _serve(self, target: int, gradient: torch.Tensor) -> torch.Tensor:
        """Do what the graph asks at a gradient; returns what goes on upstream."""
        backward = self.active.get(target)
        accesses = () if backward is None else self._job.plan.gradients[target].get(backward, ())
        for node in accesses:
            self.reached.add(node.id)
            if node.op == "grad":
                # What doesn't change this backward waits for its end: another backward, for one.
                with torch.enable_grad():
                    self._job.provide(node.id, gradient, self._job.plan.upstream)
            elif self._job.waits(node):
                error = WrongOrder("a gradient is replaced by something that comes only further upstream")
                raise error.at(node.id, node.op, node.source)
            else:
                gradient = self._replaced(node, gradient)
        return gradient

    def _replaced(self, node: Node, gradient: torch.Tensor) -> torch.Tensor:
        chain, index, new = self._job.arguments(node.args[2:])
        fresh = gradient.clone()
        try:
            assign(fresh, chain, index, new)
        except Exception as error:
            raise located(error, node) from error
        self._job.release(node)
        return fresh


def run_backwards(jobs: Sequence[Gradients]) -> None:
    """Run the backwards that wait, those of several jobs as one; then those that had to wait for them."""
    while batch := [(job, taken) for job in jobs if (taken := job._take())]:
        try:
            losses = [loss.sum() for _, taken in batch for _, loss in taken]
            # By what is left to run: a loss of an early layer runs first, whatever its line.
            torch.autograd.backward(losses, retain_graph=any(job.left for job in jobs))
        finally:
            for job in jobs:
                job.ebb()
        for job, taken in batch:
            with job._job.guard():
                if job._job.error is None:
                    job._end([node for node, _ in taken])
                    job._job.go_on()


def _differentiable(tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise BadArgument(f"a value of {tensor.dtype} has no gradient")
