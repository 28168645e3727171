"""Modules called on a value: the shape of what they give, and the work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import ShapeMismatch
from .manifest import Leaf, Manifest, leaves
from .ops import UNKNOWN
from .specs import Spec
from .values import TensorSpec


def called_spec(points: Mapping[str, Any], given: Spec) -> Spec:
    """The shape of a module's output for an input other than the model's, where its layout tells.

    Known for modules that keep all dimensions but the last: linear maps, norms, activations.
    """
    inputs, output = points.get("inputs"), points.get("output")
    if not isinstance(given, TensorSpec) or not isinstance(output, Leaf) or not given.shape:
        return UNKNOWN
    first = leaves(inputs)[:1]
    if not first or first[0].dims[:-1] != output.dims[:-1] or not isinstance(output.dims[-1], int):
        return UNKNOWN
    if not any(isinstance(dim, str) for dim in output.dims):
        return UNKNOWN  # of sizes that were seen once, none is known to be the module's own
    if first[0].dims[-1] != given.shape[-1]:
        raise ShapeMismatch(f"called on a last dimension of {given.shape[-1]}, where it takes {first[0].dims[-1]}")
    return TensorSpec((*given.shape[:-1], output.dims[-1]), output.dtype)


def module_flops(manifest: Manifest, path: str, given: Spec) -> int:
    """Floating-point operations of a module called on a value: each weight once for each row."""
    weights = manifest.weights(path)
    rows = math.prod(given.shape[:-1]) if isinstance(given, TensorSpec) else 1
    return 2 * weights * rows
