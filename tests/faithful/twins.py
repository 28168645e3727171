"""Interventions written by hand with PyTorch hooks: what our numbers are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor | None]


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def run(
    model: nn.Module, inputs: Mapping[str, Tensor], edits: Mapping[str, Edit] | None = None
) -> dict[str, Tensor]:
    """Run a model and capture every module's first output tensor, and the logits as "".

    Args:
        edits: path -> function of that module's first output; what it returns (if anything) takes its place.
    """
    seen: dict[str, Tensor] = {}
    handles = []

    def watch(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            first = _hidden(output)
            if not isinstance(first, Tensor):
                return None
            new = edits[path](first) if edits and path in edits else None
            if new is None:
                seen[path] = first.clone()
                return None
            seen[path] = new.clone()
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_hook(watch(path)))
    try:
        seen[""] = model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen


def alive(*tensors: Tensor) -> None:
    """Guard against vacuous comparisons: captures must be finite and not all zero."""
    for tensor in tensors:
        assert torch.isfinite(tensor).all()
        assert tensor.abs().max() > 0


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within a share of the largest value, and alike in size, not only in direction."""
    alive(expected)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
    assert abs(float(found.norm() / expected.norm()) - 1) <= tolerance


def same(found: Tensor, expected: Tensor) -> None:
    """Bitwise."""
    alive(expected)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)
