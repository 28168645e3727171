"""A module of a shard called on a value at home, gradients included: for these the shard runs it once more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...graph.limits import Limits
from .route import Route


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, route: Route, site: int, request: dict[str, Any]) -> Any:
        ctx.save_for_backward(value)
        ctx.told = route, site, request
        return route.errand(site, "call", {**request, "value": value})

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (value,) = ctx.saved_tensors
        route, site, request = ctx.told
        return route.errand(site, "call", {**request, "value": value, "gradient": gradients[0]}), None, None, None


def call(route: Route, site: int, path: str, value: Any, limits: Limits) -> Any:
    """What the module returns, one tensor. Raises as the module called at home would."""
    request = {"path": path, "limits": limits.as_dict()}
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        return _Call.apply(value, route, site, request)  # type: ignore[no-untyped-call]
    return route.errand(site, "call", {**request, "value": value})
