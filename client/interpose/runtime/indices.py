"""Whole numbers that a graph writes into a model: they say where in a table something lies, and must lie in it.

Some kernels take them as they come: beyond their table lies memory of somebody else's, and on a GPU one that is
outside ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import IndexOutOfRange
from ..graph.model import Point

_TABLES = ("num_experts", "num_local_experts", "n_routed_experts")
"""What routers and experts call the number of experts."""


def check_written(modules: Mapping[str, nn.Module], point: Point, before: Tensor, after: Tensor) -> None:
    """What a write left at a point, against its table; where that isn't known, against what the model had there.

    Raises IndexOutOfRange.
    """
    if after.is_floating_point() or after.is_complex() or after.dtype == torch.bool or not after.numel():
        return
    least, most = min(0, int(before.min())), max(int(before.max()), _table(modules, point.module) - 1)
    low, high = int(after.min()), int(after.max())
    if low < least or high > most:
        raise IndexOutOfRange(f"{point} is given {low if low < least else high}, where it takes {least} to {most}")


def _table(modules: Mapping[str, nn.Module], path: str) -> int:
    """How many entries the table has that a module looks up, 0 where that isn't known."""
    module = modules[path]
    if isinstance(module, nn.Embedding):
        before: int = getattr(module, "offset", 0)  # entries of OPT's table of positions that no position names
        return module.num_embeddings - before
    for holder in (module, modules[path.rpartition(".")[0]]):
        found = next((value for name in _TABLES if isinstance(value := getattr(holder, name, None), int)), None)
        if found is not None:
            return found
    return 0
