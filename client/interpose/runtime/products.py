"""One layer called on values by several jobs of a forward: their rows become one product, once the forward is over.

A large layer costs about the same for one row as for ten, since its weights have to be fetched all the same. A
product of more rows is summed in another order, so forwards of one run alone never take this way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .hooks import no_hooks, others

if TYPE_CHECKING:
    from ..graph.model import Node
    from .interpreter import Interpreter

LARGE_BYTES = 1 << 20
"""Weights of a layer from which on rows wait for others; smaller ones lie in the processor's cache anyway."""

FEW = 32
"""More rows than this are work of their own."""

MOST = 64
"""So many rows don't wait any longer, whoever may still come: what they make is held for all of them."""


class Products:
    """What the jobs of one forward want of the model's linear layers."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[tuple[Interpreter, Node, torch.Tensor]]] = {}
        self._rows: dict[str, int] = {}

    def take(self, job: Interpreter, node: Node, path: str, value: torch.Tensor) -> bool:
        """Whether a call waits for others; the job is given its value later."""
        if node.id not in job.plan.late or job.unknown(node.id) or not _fits(job.world.modules[path], value):
            return False
        rows = self._rows.get(path, 0) + _rows(value)
        if rows > MOST:
            return False
        self._waiting.setdefault(path, []).append((job, node, value))
        self._rows[path] = rows
        return True

    def relieve(self) -> None:
        """Make what needn't wait any longer."""
        for path in [path for path, rows in self._rows.items() if rows > MOST - FEW]:
            self._make(path)

    def settle(self) -> None:
        """Make all that waits, and what is then asked for in turn."""
        while self._waiting:
            self._make(next(iter(self._waiting)))

    def _make(self, path: str) -> None:
        del self._rows[path]
        wanted = [entry for entry in self._waiting.pop(path) if entry[0].error is None]
        if not wanted:
            return
        values = [value for _, _, value in wanted]
        with no_hooks():
            made = wanted[0][0].world.modules[path](torch.cat([value.flatten(0, -2) for value in values]))
        for (job, node, value), part in zip(wanted, made.split([*map(_rows, values)]), strict=True):
            job.settle(node, part.reshape(*value.shape[:-1], part.shape[-1]))


def _fits(module: nn.Module, value: torch.Tensor) -> bool:
    """Whether rows of a value may be multiplied beside others'. Only of torch's own layer is that known."""
    return (
        type(module) is nn.Linear
        and module.weight.nbytes >= LARGE_BYTES
        and value.dim() > 1
        and value.shape[-1] == module.in_features
        and value.dtype == module.weight.dtype
        and value.device == module.weight.device
        and 0 < _rows(value) <= FEW
        and not others(module)
    )


def _rows(value: torch.Tensor) -> int:
    return value.numel() // value.shape[-1]
