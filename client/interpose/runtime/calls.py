"""Modules called on a value: what is looked at before, as their forwards expect only what the model gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import BadArgument, LimitExceeded
from ..graph.calls import called_spec, module_flops
from ..graph.limits import Limits
from ..graph.manifest import Manifest
from ..graph.specs import Spec
from .kernels_checks import check_range


def check_call(manifest: Manifest, module: nn.Module, path: str, value: Any, limits: Limits) -> None:
    """Raises what the module's own kernels would, or worse: on a GPU one bad index ends the process.

    Raises:
        BadArgument: integers for a module that isn't an embedding.
        IndexOutOfRange: an id the embedding doesn't have.
        LimitExceeded: more positions than a forward may have.
    """
    if not isinstance(value, torch.Tensor):
        raise BadArgument(f"{path} is called on one tensor")
    if isinstance(module, nn.Embedding):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise BadArgument(f"{path} is an embedding: it takes ids, not {value.dtype}")
        check_range(value, 0, module.num_embeddings, path)
        return
    if not value.is_floating_point():
        raise BadArgument(f"{path} takes floating-point numbers, not {value.dtype}")
    # Attention grows with the square of the length; single layers take what comes.
    if next(module.children(), None) is None:
        return
    limits.check("tokens", value.numel() // max(value.shape[-1:], default=1) if value.numel() else 0)
    length = value.shape[-2] if value.dim() > 1 else 1
    if manifest.positions is not None and length > manifest.positions:
        raise LimitExceeded(
            f"{path} called on {length} positions, where {manifest.model} has {manifest.positions}",
            details={"limit": "positions", "asked": length, "allowed": manifest.positions},
        )


def called(manifest: Manifest, path: str, given: Spec) -> tuple[Spec, int]:
    """The output's spec where the layout tells, and the floating-point operations of a call."""
    return called_spec(manifest.modules[path].points, given), module_flops(manifest, path, given)
