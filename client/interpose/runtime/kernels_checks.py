"""Looks at values before a kernel does: on a GPU one bad index would poison the process for everybody."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BadArgument, IndexOutOfRange, ShapeMismatch

Check = Callable[[Mapping[str, Any]], None]


def check_range(index: Tensor, low: int, high: int, what: str) -> None:
    """Raises IndexOutOfRange, naming the value and the bound, unless low <= every index < high."""
    if not index.numel():
        return
    least, most = (int(one) for one in torch.stack(torch.aminmax(index)).tolist())
    if least < low or most >= high:
        bad = least if least < low else most
        raise IndexOutOfRange(
            f"{what}: index {bad} is out of range; it may be {low} to {high - 1}",
            details={"index": bad, "low": low, "size": high},
        )


def _dim_size(tensor: Tensor, dim: int, what: str) -> int:
    if not tensor.ndim:
        return 1
    if not -tensor.ndim <= dim < tensor.ndim:
        raise IndexOutOfRange(f"{what}: dim {dim} of a tensor with {tensor.ndim} dimensions")
    return tensor.shape[dim]


def _along(what: str, name: str = "index", negative: bool = False) -> Check:
    def check(bound: Mapping[str, Any]) -> None:
        tensor, dim = bound["input"], bound["dim"]
        size = tensor.numel() if dim is None else _dim_size(tensor, dim, what)
        check_range(bound[name], -size if negative else 0, size, what)

    return check


def _take(bound: Mapping[str, Any]) -> None:
    size = bound["input"].numel()
    check_range(bound["index"], -size, size, "take")


def _embedding(bound: Mapping[str, Any]) -> None:
    check_range(bound["input"], 0, bound["weight"].shape[0], "embedding")


def _one_hot(bound: Mapping[str, Any]) -> None:
    check_range(bound["tensor"], 0, bound["num_classes"], "one_hot")


def _classes(bound: Mapping[str, Any]) -> None:
    """Class targets, apart from those to be ignored; targets that are probabilities pass."""
    scores, target, ignored = bound["input"], bound["target"], bound["ignore_index"]
    if target.is_floating_point() or not target.numel():
        return
    classes = scores.shape[1 if scores.ndim > 1 else 0]
    check_range(target.masked_fill(target == ignored, 0), 0, max(classes, 1), "class target")


def _getitem(bound: Mapping[str, Any]) -> None:
    if isinstance(bound["input"], Tensor):
        check_index(bound["input"], bound["index"])


def check_index(tensor: Tensor, items: tuple[Any, ...]) -> None:
    """Raises IndexOutOfRange if an index tensor or list within `items` reaches outside its dimension."""
    if not any(isinstance(item, (Tensor, list)) for item in items):
        return
    dim = 0
    for at, item in enumerate(items):
        if item is None:
            continue
        if item is ...:
            dim = tensor.ndim - sum(_consumes(later) for later in items[at + 1 :])
        elif isinstance(item, (Tensor, list)):
            dim = _check_item(tensor, dim, torch.as_tensor(item))
        else:
            dim += 1


def _consumes(item: Any) -> int:
    if item is None:
        return 0
    if isinstance(item, (Tensor, list)):
        item = torch.as_tensor(item)
        return item.ndim if item.dtype == torch.bool else 1
    return 1


def _check_item(tensor: Tensor, dim: int, item: Tensor) -> int:
    """The dimension after those that the item is about."""
    if item.dtype == torch.bool:
        if item.shape != tensor.shape[dim : dim + item.ndim]:
            raise ShapeMismatch(f"a mask of shape {list(item.shape)} over a tensor of shape {list(tensor.shape)}")
        return dim + item.ndim
    if dim >= tensor.ndim or dim < 0:
        raise IndexOutOfRange(f"more indices than the {tensor.ndim} dimensions of the tensor")
    if not item.numel():
        return dim + 1
    if item.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise BadArgument(f"an index tensor is of a signed integer dtype or bool, not {item.dtype}")
    check_range(item, -tensor.shape[dim], tensor.shape[dim], f"dim {dim}")
    return dim + 1


def _within(name: str, low: float, high: float, what: str) -> Check:
    """Real values between two bounds, none of them nan."""

    def check(bound: Mapping[str, Any]) -> None:
        values = bound[name]
        inside = values >= low
        inside = inside & (values <= high) if isinstance(values, Tensor) else inside and values <= high
        if not bool(inside.all() if isinstance(inside, Tensor) else inside):
            raise BadArgument(f"{what}: {name} must lie between {low} and {high}")

    return check


def _multinomial(bound: Mapping[str, Any]) -> None:
    weights = bound["input"]
    sums = weights.sum(-1)
    if not bool((weights >= 0).all() & torch.isfinite(sums).all() & (sums > 0).all()):
        raise BadArgument("multinomial: weights must be finite, not negative, and not all zero")
    if not bound["replacement"] and int((weights != 0).sum(-1).min()) < bound["num_samples"]:
        raise BadArgument("multinomial: more samples than weights that aren't zero; draw with replacement")


CHECKS: Mapping[str, Check] = {
    **{name: _along(name) for name in ("gather", "scatter", "scatter_add", "scatter_reduce", "index_select")},
    **{name: _along(name) for name in ("index_add", "index_copy")},
    "index_fill": _along("index_fill", negative=True),
    "take_along_dim": _along("take_along_dim", "indices"),
    "take": _take,
    "embedding": _embedding,
    "one_hot": _one_hot,
    "nll_loss": _classes,
    "cross_entropy": _classes,
    "getitem": _getitem,
    "setitem": _getitem,
    "quantile": _within("q", 0, 1, "quantile"),
    "nanquantile": _within("q", 0, 1, "nanquantile"),
    "bernoulli": _within("input", 0, 1, "bernoulli"),
    "binary_cross_entropy": _within("input", 0, 1, "binary_cross_entropy"),
    "multinomial": _multinomial,
}
"""Operation -> what is checked of its arguments' values."""
