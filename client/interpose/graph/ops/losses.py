"""torch.nn.functional: normalisation, losses, attention, convolution, pooling."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...errors import BadArgument, ShapeMismatch
from ..values import DTYPES, TensorSpec
from .declare import Bound, Family, Outputs
from .dtypes import need_floating, need_integer, need_real, promote, result_type
from .matmul import one_dtype, product
from .shapes import Shape, broadcast, dim_of, expandable, same, with_size, without

family = Family()


def several(flops: int, copies: int) -> Callable[[Bound, Outputs], tuple[int, int]]:
    """So many operations, and so many wide copies, for each element of the input."""

    def work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
        numel = max([value.numel for value in bound.values() if isinstance(value, TensorSpec)])
        return flops * numel, copies * numel * 8

    return work


def _layer_norm(bound: Bound) -> TensorSpec:
    spec, last = bound["input"], bound["normalized_shape"]
    need_real(spec.dtype, "a norm")
    if not last or spec.shape[-len(last) :] != last:
        raise ShapeMismatch(f"normalized_shape {list(last)} isn't how the shape {list(spec.shape)} ends")
    for name in ("weight", "bias"):
        other = bound.get(name)
        if other is not None and other.shape != last:
            raise ShapeMismatch(f"the {name} has shape {list(other.shape)}, not {list(last)}")
    assert isinstance(spec, TensorSpec)
    return spec


family.declare(
    """
    f layer_norm(input: tensor, normalized_shape: ints, weight: tensor? = None, bias: tensor? = None,
        eps: float = 1e-05)
    """,
    _layer_norm,
    several(16, 3),
)
family.declare(
    "f rms_norm(input: tensor, normalized_shape: ints, weight: tensor? = None, eps: float? = None)",
    lambda bound: _rms_norm(bound),
    several(16, 3),
)


def _rms_norm(bound: Bound) -> TensorSpec:
    if bound["weight"] is not None:
        need_real(bound["weight"].dtype, "a norm's weight")
    return _layer_norm(bound)


def _group_norm(bound: Bound) -> TensorSpec:
    spec, groups = bound["input"], bound["num_groups"]
    need_floating(spec.dtype, "a norm")
    if len(spec.shape) < 2 or groups <= 0 or spec.shape[1] % groups:
        raise ShapeMismatch(f"group_norm: {groups} groups of the channels (dim 1) of {list(spec.shape)}")
    for name in ("weight", "bias"):
        if bound[name] is not None and bound[name].shape != spec.shape[1:2]:
            raise ShapeMismatch(f"the {name} has shape {list(bound[name].shape)}, not {[spec.shape[1]]}")
    assert isinstance(spec, TensorSpec)
    return spec


family.declare(
    "f group_norm(input: tensor, num_groups: int, weight: tensor? = None, bias: tensor? = None, "
    "eps: float = 1e-05)",
    _group_norm,
    several(16, 3),
)


def _normalize(bound: Bound) -> TensorSpec:
    spec = bound["input"]
    need_floating(spec.dtype, "normalize")
    dim_of(bound["dim"], len(spec.shape))
    assert isinstance(spec, TensorSpec)
    return spec


family.declare(
    "f normalize(input: tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12)", _normalize, several(48, 3)
)


def _reduction(bound: Bound, shape: Shape, dtype: str) -> TensorSpec:
    return TensorSpec(shape if bound["reduction"] == "none" else (), dtype)


def _pair_loss(bound: Bound) -> TensorSpec:
    one, other = bound["input"], bound["target"]
    dtype = one_dtype("huber_loss", one, other) if "delta" in bound else result_type(one, other)
    need_real(dtype, "a loss")
    return _reduction(bound, broadcast(one.shape, other.shape), dtype)


_REDUCTION = "reduction: 'mean'|'sum'|'none' = 'mean'"
family.declare(
    f"""
    f mse_loss(input: tensor, target: tensor, {_REDUCTION})
    f l1_loss(input: tensor, target: tensor, {_REDUCTION})
    f smooth_l1_loss(input: tensor, target: tensor, {_REDUCTION}, beta: float = 1.0)
    f huber_loss(input: tensor, target: tensor, {_REDUCTION}, delta: float = 1.0)
    f kl_div(input: tensor, target: tensor, reduction: 'mean'|'sum'|'none'|'batchmean' = 'mean',
        log_target: bool = False)
    """,
    _pair_loss,
    lambda bound, outputs: _broadcast_work(bound),
)


def _broadcast_work(bound: Bound) -> tuple[int, int]:
    numel = math.prod(broadcast(bound["input"].shape, bound["target"].shape))
    return 48 * numel, 5 * 8 * numel


def _binary_loss(bound: Bound) -> TensorSpec:
    one, other = bound["input"], bound["target"]
    if one.shape != other.shape:
        raise ShapeMismatch(f"input {list(one.shape)} and target {list(other.shape)} must have one shape")
    weights = [bound[name] for name in ("weight", "pos_weight") if bound.get(name) is not None]
    for weight in weights:
        expandable(weight.shape, one.shape, "a weight")
    need_real(one.dtype, "a binary cross entropy")
    return _reduction(bound, one.shape, one_dtype("a binary cross entropy", one, other, *weights))


family.declare(
    f"""
    f binary_cross_entropy(input: tensor, target: tensor, weight: tensor? = None, {_REDUCTION})
    f binary_cross_entropy_with_logits(input: tensor, target: tensor, weight: tensor? = None, {_REDUCTION},
        pos_weight: tensor? = None)
    """,
    _binary_loss,
    several(64, 5),
)


def _nll_loss(bound: Bound) -> TensorSpec:
    """Class indices: the target has the input's shape without the classes (dim 1, or 0 for one row)."""
    spec, target, weight = bound["input"], bound["target"], bound["weight"]
    need_real(spec.dtype, "a loss")
    if not spec.shape:
        raise ShapeMismatch("a loss over classes takes scores with a dimension")
    classes = 0 if len(spec.shape) == 1 else 1
    if weight is not None and weight.shape != (spec.shape[classes],):
        raise ShapeMismatch(f"the weight has shape {list(weight.shape)}, one for each class is needed")
    rows = without(spec.shape, (classes,))
    if target.shape != rows:
        raise ShapeMismatch(f"a target of shape {list(target.shape)} for scores of shape {list(spec.shape)}")
    if target.dtype not in ("int64", "uint8"):
        need_integer(target.dtype, "a target of class indices")
        raise BadArgument("a target of class indices is int64; convert it: target.long()")
    return _reduction(bound, rows, spec.dtype)


def _cross_entropy(bound: Bound) -> TensorSpec:
    """Class indices, or as many probabilities as scores."""
    spec, target = bound["input"], bound["target"]
    if not 0 <= bound["label_smoothing"] <= 1:
        raise BadArgument("cross_entropy: label_smoothing is between 0 and 1")
    if target.shape != spec.shape or not spec.shape:
        return _nll_loss(bound)
    need_real(spec.dtype, "a loss")
    need_real(target.dtype, "a target of probabilities")
    classes = 0 if len(spec.shape) == 1 else 1
    return _reduction(bound, without(spec.shape, (classes,)), promote(spec.dtype, target.dtype))


family.declare(
    f"f nll_loss(input: tensor, target: tensor, weight: tensor? = None, ignore_index: int = -100, {_REDUCTION})",
    _nll_loss,
    several(8, 2),
)
family.declare(
    "f cross_entropy(input: tensor, target: tensor, weight: tensor? = None, ignore_index: int = -100, "
    f"{_REDUCTION}, label_smoothing: float = 0.0)",
    _cross_entropy,
    several(64, 4),
)


def _cosine(bound: Bound) -> TensorSpec:
    one, other = bound["x1"], bound["x2"]
    shape = broadcast(one.shape, other.shape)
    dtype = result_type(one, other)
    need_real(dtype, "cosine_similarity")
    return TensorSpec(without(shape, (dim_of(bound["dim"], len(shape)),) if shape else ()), dtype)


def _cosine_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    numel = math.prod(broadcast(bound["x1"].shape, bound["x2"].shape))
    return 16 * numel, 4 * 8 * numel


family.declare(
    "tf cosine_similarity(x1: tensor, x2: tensor, dim: int = 1, eps: float = 1e-08)", _cosine, _cosine_work
)


def _pairwise(bound: Bound) -> TensorSpec:
    one, other = bound["x1"], bound["x2"]
    shape, dtype = broadcast(one.shape, other.shape), result_type(one, other)
    need_real(dtype, "pairwise_distance")
    if not shape:
        raise ShapeMismatch("pairwise_distance takes tensors with a dimension")
    return TensorSpec((*shape[:-1], 1) if bound["keepdim"] else shape[:-1], dtype)


family.declare(
    "tf pairwise_distance(x1: tensor, x2: tensor, p: float = 2.0, eps: float = 1e-06, keepdim: bool = False)",
    _pairwise,
    _cosine_work,
)


def _one_hot(bound: Bound) -> TensorSpec:
    spec, classes = bound["tensor"], bound["num_classes"]
    if spec.dtype != "int64":
        raise BadArgument(f"one_hot takes int64, not {spec.dtype}; convert it: x.long()")
    if classes <= 0:
        raise BadArgument("one_hot: num_classes must be given and positive: the size can't depend on values")
    return TensorSpec((*spec.shape, classes), "int64")


family.declare("f one_hot(tensor: tensor, num_classes: int)", _one_hot)


def _attention(bound: Bound) -> TensorSpec:
    query, key, value, mask = (bound[name] for name in ("query", "key", "value", "attn_mask"))
    if bound["dropout_p"] != 0:
        raise BadArgument("scaled_dot_product_attention: dropout_p must be 0 here")
    if min(len(spec.shape) for spec in (query, key, value)) < 2:
        raise ShapeMismatch("attention takes tensors of at least 2 dimensions")
    if bound["enable_gqa"]:
        key, value = (_repeat_heads(spec, query.shape) for spec in (key, value))
    scores = product("query @ key", query.shape, (*key.shape[:-2], key.shape[-1], key.shape[-2]))
    if mask is not None:
        if bound["is_causal"]:
            raise BadArgument("attention takes a mask or is_causal, not both")
        expandable(mask.shape, scores, "a mask")
    return TensorSpec(product("scores @ value", scores, value.shape), one_dtype("attention", query, key, value))


def _repeat_heads(spec: TensorSpec, query: Shape) -> TensorSpec:
    if len(spec.shape) < 3 or len(query) < 3 or not spec.shape[-3] or query[-3] % spec.shape[-3]:
        raise ShapeMismatch(f"grouped heads: {list(query)} and {list(spec.shape)}")
    return TensorSpec(with_size(spec.shape, len(spec.shape) - 3, query[-3]), spec.dtype)


def _attention_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    query, key, out = bound["query"], bound["key"], outputs[0]
    scores = math.prod(out.shape[:-1]) * key.shape[-2]
    return scores * (2 * query.shape[-1] + 2 * out.shape[-1] + 32), 3 * 8 * scores + 3 * out.nbytes


family.declare(
    "f scaled_dot_product_attention(query: tensor, key: tensor, value: tensor, attn_mask: tensor? = None, "
    "dropout_p: float = 0.0, is_causal: bool = False, scale: float? = None, enable_gqa: bool = False)",
    _attention,
    _attention_work,
)


def _each(values: Shape, count: int, what: str, low: int) -> Shape:
    """One number for each spatial dimension."""
    if len(values) not in (1, count) or min(values, default=low) < low:
        raise BadArgument(f"{what} is one number or {count}, at least {low}, not {list(values)}")
    return values if len(values) == count else values * count


def window(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool = False) -> int:
    """How many windows fit."""
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (reach + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= size + padding:
        count -= 1
    if count < 1:
        raise ShapeMismatch(f"a window of {kernel} doesn't fit a size of {size} padded by {padding}")
    return count


def _conv(bound: Bound) -> TensorSpec:
    spec, weight, bias, groups = (bound[name] for name in ("input", "weight", "bias", "groups"))
    ndim = len(weight.shape) - 2
    if len(spec.shape) not in (ndim + 1, ndim + 2):
        raise ShapeMismatch(f"a convolution of {list(spec.shape)} with a weight of {list(weight.shape)}")
    channels = spec.shape[-ndim - 1]
    if groups <= 0 or weight.shape[0] % groups or channels != weight.shape[1] * groups:
        raise ShapeMismatch(f"{channels} channels in {groups} groups don't fit a weight of {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeMismatch(f"the bias has shape {list(bias.shape)}, not {[weight.shape[0]]}")
    stride, dilation = (_each(bound[name], ndim, name, 1) for name in ("stride", "dilation"))
    padding = _each(bound["padding"], ndim, "padding", 0)
    spatial = tuple(
        window(spec.shape[at - ndim], weight.shape[2 + at], stride[at], padding[at], dilation[at])
        for at in range(ndim)
    )
    dtype = one_dtype("a convolution", *(one for one in (spec, weight, bias) if one is not None))
    return TensorSpec((*spec.shape[: -ndim - 1], weight.shape[0], *spatial), dtype)


def _conv_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """Direct convolution; its windows may be written out, for all rows at once."""
    weight, out = bound["weight"], outputs[0]
    ndim = len(weight.shape) - 2
    taps = math.prod(weight.shape[1:])
    windows = math.prod(out.shape[-ndim:]) * (out.shape[0] if len(out.shape) == ndim + 2 else 1)
    padded = 4 * (bound["input"].numel + 2 * sum(bound["padding"]) * bound["input"].numel + out.numel)
    return 2 * out.numel * taps, (windows * taps * bound["groups"] + padded) * DTYPES[out.dtype]


def _conv_of(ndim: int) -> Callable[[Bound], TensorSpec]:
    def rule(bound: Bound) -> TensorSpec:
        same(len(bound["weight"].shape), ndim + 2, f"conv{ndim}d: dimensions of the weight")
        return _conv(bound)

    return rule


for _ndim in (1, 2):
    family.declare(
        f"tf conv{_ndim}d(input: tensor, weight: tensor, bias: tensor? = None, stride: ints = (1,), "
        "padding: ints = (0,), dilation: ints = (1,), groups: int = 1)",
        _conv_of(_ndim),
        _conv_work,
    )


def _pool(bound: Bound, ndim: int) -> TensorSpec:
    spec = bound["input"]
    if len(spec.shape) not in (ndim + 1, ndim + 2):
        raise ShapeMismatch(f"pooling takes {ndim + 1} or {ndim + 2} dimensions, not {list(spec.shape)}")
    kernel = _each(bound["kernel_size"], ndim, "kernel_size", 1)
    stride = _each(bound["stride"] or kernel, ndim, "stride", 1)
    padding = _each(bound["padding"], ndim, "padding", 0)
    dilation = _each(bound.get("dilation", (1,)), ndim, "dilation", 1)
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        raise BadArgument("pooling: padding is half the window at most")
    spatial = tuple(
        window(spec.shape[at - ndim], kernel[at], stride[at], padding[at], dilation[at], bound["ceil_mode"])
        for at in range(ndim)
    )
    return TensorSpec((*spec.shape[:-ndim], *spatial), spec.dtype)


def _pool_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    kernel = bound["kernel_size"]
    taps = math.prod(kernel) ** (2 if len(kernel) == 1 else 1)
    return 4 * taps * outputs[0].numel, 8 * outputs[0].numel + bound["input"].nbytes


for _ndim in (1, 2):

    def _pooled(bound: Bound, ndim: int = _ndim) -> TensorSpec:
        return _pool(bound, ndim)

    family.declare(
        f"""
        f avg_pool{_ndim}d(input: tensor, kernel_size: ints, stride: ints? = None, padding: ints = (0,),
            ceil_mode: bool = False, count_include_pad: bool = True)
        f max_pool{_ndim}d(input: tensor, kernel_size: ints, stride: ints? = None, padding: ints = (0,),
            dilation: ints = (1,), ceil_mode: bool = False)
        """,
        _pooled,
        _pool_work,
    )


def _adaptive(bound: Bound) -> TensorSpec:
    spec, size = bound["input"], bound["output_size"]
    if len(spec.shape) not in (2, 3) or size < 0:
        raise ShapeMismatch(f"adaptive_avg_pool1d: {size} of {list(spec.shape)}")
    return TensorSpec((*spec.shape[:-1], size), spec.dtype)


family.declare(
    "tf adaptive_avg_pool1d(input: tensor, output_size: int)",
    _adaptive,
    lambda bound, outputs: (outputs[0].numel + 2 * bound["input"].numel * max(outputs[0].shape[-1], 1), 0),
)
