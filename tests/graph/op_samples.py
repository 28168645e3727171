"""At least one call of every operation, on small real tensors."""

from __future__ import annotations

from typing import Any

import torch
from interpose.graph.values import DType, TensorSpec
from interpose.runtime.kernels import dtype_name

Call = tuple[tuple[Any, ...], dict[str, Any]]

_GENERATOR = torch.Generator().manual_seed(0)


def real(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=_GENERATOR).to(dtype)


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=_GENERATOR) * 0.8 + 0.1


def whole(high: int, *shape: int, low: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=_GENERATOR, dtype=dtype)


def mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=_GENERATOR) > 0.5


def square(size: int = 3) -> torch.Tensor:
    one = real(size, size)
    return one @ one.T + size * torch.eye(size)


def call(*args: Any, **kwargs: Any) -> Call:
    return args, kwargs


def specs(value: Any) -> Any:
    """Arguments with specs in place of tensors."""
    if isinstance(value, torch.Tensor):
        return TensorSpec(tuple(value.shape), dtype_name(value.dtype))
    if isinstance(value, list):
        return [specs(item) for item in value]
    if isinstance(value, tuple):
        return tuple(specs(item) for item in value)
    if isinstance(value, slice):
        return slice(*map(specs, (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: specs(item) for key, item in value.items()}
    return value


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors within nested arguments."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [one for item in value for one in tensors(item)] if isinstance(value, (list, tuple)) else []


def each(names: str, *calls: Call) -> dict[str, list[Call]]:
    return {name: list(calls) for name in names.split()}


X = real(2, 3, 4)
M = real(3, 4)
V = real(4)
ZERO_D = torch.tensor(1.5)
WHOLE = whole(9, 3, 4, low=1)
HALF = real(3, 4, dtype=torch.float16)
F64, F16, I64 = DType("float64"), DType("float16"), DType("int64")

POINTWISE = {
    **each("exp exp2 expm1 sin cos tan atan sinh cosh tanh asinh erf erfc sinc i0 deg2rad", call(M), call(WHOLE)),
    **each(
        "log log2 log10 log1p sqrt rsqrt asin acos atanh erfinv lgamma digamma reciprocal", call(positive(3, 4))
    ),
    **each("acosh rad2deg sigmoid", call(positive(3) + 1), call(WHOLE)),
    **each("neg sign sgn square positive abs", call(M), call(WHOLE), call(HALF)),
    **each("ceil floor trunc frac", call(M)),
    **each("bitwise_not", call(WHOLE), call(mask(3))),
    **each("isnan isinf isfinite isposinf isneginf logical_not signbit", call(M), call(WHOLE)),
    **each("relu relu6", call(M), call(WHOLE)),
    **each("hardsigmoid hardswish silu mish softsign tanhshrink logsigmoid selu", call(M), call(HALF)),
    **each("mul", call(X, V), call(2, M), call(M, 2.5), call(WHOLE, 0.5), call(mask(3), 2), call(HALF, ZERO_D)),
    **each("remainder fmod floor_divide", call(M, V), call(M, 2), call(7, WHOLE), call(WHOLE, 3), call(5.5, M)),
    **each("maximum minimum fmax fmin", call(M, V), call(M, HALF), call(M, 0.5)),
    **each("pow", call(M, 2), call(2, M), call(WHOLE, 2), call(positive(3), real(3)), call(WHOLE, 0.5)),
    **each("bitwise_and bitwise_or bitwise_xor", call(WHOLE, WHOLE), call(WHOLE, 3), call(mask(4), mask(3, 4))),
    **each("bitwise_left_shift bitwise_right_shift", call(WHOLE, 1), call(1, WHOLE)),
    **each("eq ne lt le gt ge", call(M, V), call(M, 0), call(WHOLE, 2.5), call(1, M)),
    **each("logical_and logical_or logical_xor", call(M, V), call(mask(4), M), call(M, True)),
    **each("atan2 copysign", call(M, V), call(WHOLE, WHOLE)),
    **each("xlogy", call(M, positive(4)), call(2, positive(4))),
    **each("hypot logaddexp logaddexp2", call(M, V)),
    **each("heaviside", call(M, real(4))),
    **each(
        "add sub", call(X, V), call(M, 1), call(1, M), call(M, V, alpha=2), call(WHOLE, 1.5), call(WHOLE, WHOLE)
    ),
    **each(
        "div",
        call(M, V),
        call(WHOLE, 2),
        call(1, M),
        call(WHOLE, 2, rounding_mode="floor"),
        call(WHOLE, WHOLE, rounding_mode="trunc"),
        call(M, V, rounding_mode="trunc"),
    ),
    **each("isclose", call(M, M + 1e-9), call(M, V, rtol=0.1)),
    **each("isin", call(WHOLE, whole(5, 3)), call(WHOLE, 3), call(WHOLE, whole(5, 3), invert=True)),
    **each(
        "where", call(mask(3, 4), M, 0.0), call(mask(4), 1, 2.5), call(mask(2, 1, 1), M, V), call(M > 0, 1, WHOLE)
    ),
    **each("lerp", call(M, V, 0.3), call(M, V, positive(3, 1))),
    **each("clamp", call(M, 0), call(M, max=0.5), call(WHOLE, 1, 2.5), call(M, min=V), call(M, V, 2.0)),
    **each("addcmul addcdiv", call(M, V, positive(3, 1)), call(M, V, positive(3, 4), value=2)),
    **each("round", call(M), call(M, decimals=1)),
    **each("nan_to_num", call(M / 0), call(M, nan=1.0, posinf=2.0)),
    **each("threshold", call(M, 0.1, 20)),
    **each("hardtanh", call(M), call(M, -0.5, 0.5)),
    **each("gelu", call(M), call(HALF), call(M, approximate="tanh")),
    **each("softplus", call(M), call(M, beta=2)),
    **each("elu celu", call(M), call(M, 0.5)),
    **each("leaky_relu", call(M), call(M, 0.2)),
    **each("hardshrink softshrink", call(M), call(M, 0.3)),
    **each("logit", call(positive(3)), call(positive(3), eps=0.2)),
    **each("prelu", call(X, positive(3)), call(M, positive(1))),
    **each("glu", call(M), call(X, dim=0)),
    **each("copy", call(M, V), call(M, 2), call(WHOLE, M)),
}

_SPREAD = (call(M), call(M, 1), call(X, (0, 2), keepdim=True), call(M, unbiased=False), call(M, 0, correction=0))
REDUCE = {
    **each("sum nansum", call(X), call(X, 1), call(X, (0, -1), keepdim=True), call(M, dtype=F64)),
    **each("prod", call(M), call(M, 1), call(M, 0, True), call(WHOLE), call(M, keepdim=True)),
    **each("mean nanmean", call(X), call(HALF, 1), call(X, dim=(0, 1)), call(M, 0, True, dtype=F64)),
    **each("std var", *_SPREAD, call(M, False)),
    **each("std_mean var_mean", *_SPREAD),
    **each("amax amin", call(X), call(X, 1), call(X, (0, 1), True), call(WHOLE, 0)),
    **each("aminmax", call(M), call(M, dim=1), call(M, dim=0, keepdim=True)),
    **each("max min", call(M), call(M, 1), call(M, dim=0, keepdim=True), call(M, V), call(WHOLE)),
    **each("median nanmedian", call(M), call(M, 1), call(M, dim=0, keepdim=True)),
    **each("mode", call(WHOLE), call(WHOLE, 0, True)),
    **each("argmax argmin", call(M), call(M, 1), call(M, dim=0, keepdim=True), call(M, keepdim=True)),
    **each("all any", call(M > 0), call(M, 1), call(M, dim=0, keepdim=True), call(M, (0, 1))),
    **each("count_nonzero", call(M), call(M, 1), call(X, (0, 1))),
    **each("logsumexp", call(M, 1), call(M, (0, 1)), call(M, -1, keepdim=True), call(WHOLE, 0)),
    **each("norm", call(M), call(M, 2, 1), call(X, dim=(0, 1), keepdim=True), call(M, p=1), call(M, dtype=F64)),
    **each("linalg_vector_norm", call(M), call(M, 1, dim=1), call(HALF, dim=0, keepdim=True)),
    **each("kthvalue", call(M, 2), call(M, 1, 0, True)),
    **each("quantile nanquantile", call(M, 0.5), call(M, positive(2), dim=1), call(M, 0.2, dim=0, keepdim=True)),
    **each("topk", call(M, 2), call(M, 1, 0, False), call(M, k=0)),
    **each("sort", call(M), call(M, 0, True), call(M, descending=True, stable=True)),
    **each("argsort", call(M), call(M, 0, True)),
    **each("msort", call(M)),
    **each("cumsum cumprod", call(M, 1), call(WHOLE, 0), call(M, 0, dtype=F64)),
    **each("logcumsumexp", call(M, 1)),
    **each("cummax cummin", call(M, 1)),
    **each("softmax log_softmax softmin", call(M, -1), call(X, dim=1), call(HALF, 0, dtype=DType("float32"))),
    **each("diff", call(M), call(M, 2, 0), call(M, 9)),
    **each(
        "bucketize",
        call(M, torch.arange(3.0)),
        call(0.5, torch.arange(3.0)),
        call(M, torch.arange(3.0), right=True),
    ),
    **each(
        "searchsorted", call(torch.arange(3.0), M), call(M.sort(-1)[0], real(3, 2)), call(torch.arange(3.0), 1.5)
    ),
    **each("histc", call(M), call(M, 5, -1, 1)),
}

VIEW = {
    **each("view", call(X, 6, -1), call(X, (2, 12)), call(X, -1)),
    **each("reshape", call(X, 6, -1), call(X.transpose(0, 1), (24,))),
    **each("view_as reshape_as", call(X, real(6, 4))),
    **each("flatten", call(X), call(X, 1), call(X, 0, 1), call(ZERO_D)),
    **each("ravel", call(X)),
    **each("unflatten", call(M, 1, (2, -1)), call(M, -1, (2, 2))),
    **each("transpose swapdims swapaxes", call(X, 0, 1), call(X, -1, 0)),
    **each("t", call(M), call(V)),
    **each("T", call(M)),
    **each("mT", call(X)),
    **each("permute", call(X, 2, 0, 1), call(X, (-1, 0, 1))),
    **each("movedim moveaxis", call(X, 0, 2), call(X, (0, 1), (2, 0))),
    **each("squeeze", call(real(1, 3, 1)), call(real(1, 3, 1), 0), call(M, 0), call(real(1, 1, 2), (0, 1))),
    **each("unsqueeze", call(M, 0), call(M, -1), call(ZERO_D, 0)),
    **each("expand", call(V, 3, 4), call(real(3, 1), -1, 5), call(ZERO_D, (2,))),
    **each("broadcast_to", call(V, (3, 4))),
    **each("expand_as", call(V, M)),
    **each("narrow", call(M, 1, 1, 2), call(M, 0, -2, 1)),
    **each("select", call(M, 1, 2), call(M, 0, -1)),
    **each("diagonal", call(M), call(X, 1, 1, 2), call(M, -1), call(M, 3)),
    **each("unfold", call(V, 0, 2, 1), call(M, 1, 3, 2)),
    **each("atleast_1d atleast_2d atleast_3d", call(ZERO_D), call(V), call(M), call(X)),
    **each("detach contiguous cpu clone", call(M), call(X.transpose(0, 1))),
    **each("still_contiguous", call(M)),
    **each("chunk", call(V, 3), call(X, 2, -1), call(V, 9)),
    **each("split", call(V, 3), call(M, (1, 3), 1), call(M, 2, dim=-1)),
    **each("tensor_split", call(V, 3), call(V, (1, 3)), call(M, 2, 1)),
    **each("unbind", call(M), call(X, 2)),
    **each("tril triu", call(M), call(X, 1), call(M, diagonal=-1)),
    **each("diag", call(V), call(M), call(V, 1), call(M, -2)),
    **each("diag_embed", call(V), call(M, 1), call(M, 0, 0, 2)),
}

POSITIONS = whole(3, 2, 4)
INDEX = {
    **each(
        "getitem",
        call(X, (slice(None), -1)),
        call(X, 0),
        call(X, (..., None, slice(1, 3))),
        call(X, (0, slice(None), [0, 2])),
        call(X, (slice(None), whole(3, 5), slice(0, 2))),
        call(X, (whole(2, 3, 1), slice(None), whole(4, 2))),
        call(X, mask(2, 3)),
        call(X, (slice(None), mask(3), None)),
        call(X, (torch.tensor(1), slice(None), torch.tensor([1]))),
        call((M, V), 1),
        call((M, V, M), slice(1, None)),
        call(V, (slice(torch.tensor(1), None),)),
        call(M, [[0, 1], [2, 1]]),
        call(M, ([True, False, True],)),
    ),
    **each(
        "setitem",
        call(X, (slice(None), -1), 0.0),
        call(X, (0,), real(3, 4)),
        call(X, (slice(None), [0, 2]), real(1, 1, 1, 4)),
        call(HALF, (mask(3, 4),), 2),
        call(HALF, (whole(3, 2),), real(2, 4)),
    ),
    **each("gather", call(X, 1, whole(3, 2, 5, 4)), call(M, 0, whole(3, 2, 2)), call(V, 0, whole(4, 7))),
    **each("scatter", call(X, 1, whole(3, 2, 2, 3), real(2, 3, 4)), call(M, 0, whole(3, 2, 4), 2.5)),
    **each("scatter_add", call(M, 0, whole(3, 2, 4), real(2, 4))),
    **each(
        "scatter_reduce", call(M, 0, whole(3, 2, 4), real(2, 4), "sum"), call(M, 0, POSITIONS, real(2, 4), "amax")
    ),
    **each("index_select", call(M, 1, whole(4, 7)), call(V, 0, torch.tensor(2))),
    **each("index_add", call(M, 0, whole(3, 2), real(2, 4)), call(M, 1, whole(4, 3), real(3, 3), alpha=2)),
    **each("index_copy", call(M, 0, torch.tensor([2, 0]), real(2, 4))),
    **each("index_fill", call(M, 1, whole(4, 2), 1.0), call(M, 0, whole(3, 2), ZERO_D)),
    **each("take_along_dim", call(M, whole(4, 3, 2), 1), call(M, whole(12, 5)), call(X, whole(3, 2, 5, 1), dim=1)),
    **each("take", call(M, whole(12, 2, 2))),
    **each("masked_fill", call(M, mask(4), 0.0), call(X, mask(3, 1), ZERO_D)),
    **each("masked_select", call(M, mask(4)), call(M, mask(3, 4))),
    **each("nonzero argwhere", call(M > 0), call(X)),
    **each("embedding", call(whole(5, 2, 3), real(5, 4)), call(whole(5, 2), real(5, 4), padding_idx=0)),
    **each("roll", call(M, 1), call(M, (1, -1), (0, 1)), call(M, 2, 1)),
    **each("flip", call(M, 0), call(X, (0, 2)), call(M, -1)),
    **each("flipud fliplr", call(M)),
    **each("rot90", call(M, 1, (0, 1)), call(X, 2, (1, 2)), call(X, -1, (0, 2))),
    **each("select_scatter", call(M, real(4), 0, 1)),
    **each("slice_scatter", call(M, real(3, 2), 1, 1, 3), call(M, real(2, 4), 0, None, None, 2)),
}

BATCH = real(2, 4, 5)
MATMUL = {
    **each("matmul", call(M, real(4, 2)), call(X, BATCH), call(V, real(4, 2)), call(X, V), call(V, V)),
    **each("mm", call(M, real(4, 2))),
    **each("bmm", call(X, BATCH)),
    **each("mv", call(M, V)),
    **each("dot vdot", call(V, real(4))),
    **each("inner", call(M, real(2, 4)), call(V, V)),
    **each("outer ger", call(V, real(3))),
    **each("linear", call(X, real(5, 4)), call(M, real(5, 4), real(5)), call(X, V)),
    **each("bilinear", call(M, real(3, 2), real(5, 4, 2), real(5))),
    **each("addmm", call(real(2), M, real(4, 2)), call(real(3, 2), M, real(4, 2), beta=0.5, alpha=2)),
    **each("addmv", call(real(3), M, V)),
    **each("addr", call(real(3, 4), real(3), V)),
    **each("baddbmm", call(real(2, 3, 5), X, BATCH), call(real(5), X, BATCH)),
    **each("addbmm", call(real(3, 5), X, BATCH)),
    **each(
        "einsum",
        call("ij,jk->ik", M, real(4, 2)),
        call("bij,bjk", X, BATCH),
        call("...ij->...ji", X),
        call("ii->i", real(3, 3)),
        call("ij,jk,kl->il", M, real(4, 2), real(2, 5)),
        call("b...d,d->b...", X, V),
        call("ij,kj->", M, real(2, 4)),
        call("ij", M),
    ),
    **each("tensordot", call(M, real(4, 2), 1), call(X, BATCH, ((0, 2), (0, 1))), call(V, V, 0)),
    **each("kron", call(M, real(2, 2)), call(V, M)),
    **each("cdist", call(M, real(2, 4)), call(X, real(2, 5, 4), p=1.0), call(X, M)),
    **each("linalg_cross", call(real(2, 3), real(2, 3)), call(real(3, 2), real(3, 1), dim=0)),
}

JOIN = {
    **each("cat", call((M, M)), call((M, HALF), 1), call([M, real(0)], dim=-2), call((M, WHOLE))),
    **each("stack", call((M, M)), call([V, V], -1), call([ZERO_D, ZERO_D])),
    **each("hstack", call((M, M)), call((V, ZERO_D))),
    **each("vstack", call((M, M)), call((V, V)), call((V, M))),
    **each("row_stack", call((V, M))),
    **each("dstack", call((M, M)), call((V, V)), call((ZERO_D, ZERO_D))),
    **each("column_stack", call((V, V)), call((V, real(4, 2)))),
    **each("block_diag", call(M, V, ZERO_D)),
    **each("repeat", call(M, 2, 1), call(V, (2, 3))),
    **each("tile", call(M, 2), call(V, (2, 3))),
    **each("repeat_interleave", call(M, 2), call(M, 3, 1), call(M, 2, dim=0)),
    **each("pad", call(M, (1, 2)), call(X, (0, 1, 2, -1), value=1.0), call(X, (1, 1), mode="reflect")),
    **each("meshgrid", call(V, real(3)), call(V, real(3), indexing="xy")),
    **each("broadcast_tensors", call(V, M), call(ZERO_D, V)),
    **each("cartesian_prod", call(V, real(3)), call(V)),
}

CLASSES = whole(4, 3)
LOSSES = {
    **each("layer_norm", call(M, (4,)), call(X, (3, 4), real(3, 4), real(3, 4)), call(HALF, (4,))),
    **each("rms_norm", call(M, (4,)), call(M, (4,), V)),
    **each("group_norm", call(real(2, 6, 3), 2), call(real(2, 6), 3, real(6), real(6))),
    **each("normalize", call(M), call(X, dim=-1, p=1.0)),
    **each(
        "mse_loss l1_loss smooth_l1_loss huber_loss", call(M, real(3, 4)), call(M, real(3, 4), reduction="none")
    ),
    **each("kl_div", call(M, positive(3, 4), reduction="batchmean"), call(M, positive(3, 4), reduction="none")),
    **each(
        "binary_cross_entropy", call(positive(3), positive(3)), call(positive(3), positive(3), reduction="none")
    ),
    **each(
        "binary_cross_entropy_with_logits", call(M, positive(3, 4)), call(M, positive(3, 4), pos_weight=positive(4))
    ),
    **each("nll_loss", call(M, CLASSES), call(M, CLASSES, positive(4), reduction="none"), call(V, torch.tensor(1))),
    **each(
        "cross_entropy",
        call(M, CLASSES),
        call(M, torch.tensor([1, -100, 0]), reduction="none"),
        call(M, M.softmax(-1), reduction="sum"),
        call(real(2, 5, 3), whole(5, 2, 3), label_smoothing=0.1),
        call(V, torch.tensor(2)),
    ),
    **each("cosine_similarity", call(M, real(3, 4)), call(X, V, dim=-1)),
    **each("pairwise_distance", call(M, real(3, 4)), call(M, V, keepdim=True)),
    **each("one_hot", call(whole(3, 4), 3), call(whole(3, 2, 2), num_classes=5)),
    **each(
        "scaled_dot_product_attention",
        call(real(2, 3, 4), real(2, 5, 4), real(2, 5, 6)),
        call(real(1, 2, 3, 4), real(1, 2, 3, 4), real(1, 2, 3, 4), is_causal=True),
        call(real(2, 3, 4), real(2, 5, 4), real(2, 5, 4), mask(3, 5), scale=0.3),
        call(real(1, 4, 3, 2), real(1, 2, 5, 2), real(1, 2, 5, 2), enable_gqa=True),
    ),
    **each("conv1d", call(X, real(5, 3, 2)), call(X, real(6, 1, 2), real(6), 2, 1, 1, 3), call(M, real(2, 3, 1))),
    **each(
        "conv2d", call(real(2, 3, 5, 5), real(4, 3, 2, 2)), call(real(3, 5, 4), real(4, 3, 2, 1), stride=(2, 1))
    ),
    **each("avg_pool1d max_pool1d", call(X, 2), call(X, 3, 1, 1), call(X, 3, ceil_mode=True)),
    **each("avg_pool2d max_pool2d", call(real(2, 3, 5, 5), 2), call(real(3, 5, 5), (3, 2), stride=2, padding=1)),
    **each("adaptive_avg_pool1d", call(X, 3)),
}

CREATE = {
    **each("zeros ones", call(2, 3), call((2,), dtype=I64), call(())),
    **each("full", call((2, 3), 1.5), call((2,), 3), call(2, True), call((), 1, dtype=F16)),
    **each("zeros_like ones_like", call(M), call(WHOLE, dtype=F64)),
    **each("full_like", call(M, 2), call(WHOLE, 1.5, dtype=F64), call(M, ZERO_D)),
    **each("new_zeros new_ones", call(HALF, 2, 3), call(M, (2,), dtype=I64)),
    **each("new_full", call(HALF, (2, 3), 1.5)),
    **each("arange", call(5), call(2, 7), call(0, 1, 0.3), call(5, 0, -2), call(2.5), call(3, dtype=F64)),
    **each("linspace", call(0, 1, 5)),
    **each("logspace", call(0, 1, 5), call(0, 1, 4, base=2.0)),
    **each("eye", call(3), call(2, 4, dtype=F64), call(4, 2)),
    **each(
        "tril_indices triu_indices",
        *(call(r, c, o) for r in (0, 2, 4) for c in (1, 3) for o in (-9, -3, -1, 0, 1, 9)),
    ),
    **each("randn rand", call(2, 3, seed=1), call((2,), seed=1, dtype=F64)),
    **each("randint", call(5, (2, 3), seed=1), call(2, 5, (4,), seed=1)),
    **each("randn_like rand_like", call(M, seed=1), call(HALF, seed=1)),
    **each("randint_like", call(M, 5, seed=1), call(WHOLE, 2, 5, seed=1)),
    **each("randperm", call(5, seed=1)),
    **each("normal", call(M, 1.0, seed=1), call(0.0, positive(3), seed=1), call(M, positive(4), seed=1)),
    **each("bernoulli", call(positive(3), seed=1)),
    **each("dropout", call(M, 0.5, seed=1), call(HALF, seed=1)),
    **each("multinomial", call(positive(4), 2, seed=1), call(positive(2, 4), 6, True, seed=1)),
}

LINALG = {
    **each("linalg_inv linalg_det linalg_slogdet linalg_cholesky logdet", call(square())),
    **each("linalg_eigh linalg_eigvalsh", call(square()), call(square()[None].expand(2, 3, 3))),
    **each(
        "linalg_solve", call(square(), real(3, 2)), call(square(), real(3)), call(square(), real(2, 3), left=False)
    ),
    **each("linalg_solve_triangular", call(square().triu(), real(3, 2), upper=True)),
    **each("linalg_qr", call(M), call(real(4, 3), mode="complete"), call(X)),
    **each("linalg_svd", call(M), call(M, full_matrices=False), call(X)),
    **each("linalg_svdvals", call(M), call(X)),
    **each("linalg_pinv linalg_matrix_rank", call(M), call(X), call(M, rtol=0.01)),
    **each("lstsq", call(real(4, 3), real(4, 2))),
    **each("matrix_power", call(square(), 3), call(square(), 0), call(square(), -1), call(square(), 1)),
    **each("trace", call(square()), call(whole(5, 2, 2))),
    **each(
        "linalg_norm",
        call(M),
        call(X),
        call(M, 1, dim=1),
        call(M, "nuc"),
        call(X, dim=(0, 1), keepdim=True),
        call(M, float("inf")),
    ),
    **each("linalg_matrix_norm", call(M), call(X, 2), call(X, "nuc", dim=(0, 1))),
    **each("linalg_lu", call(M), call(square())),
    **each("cov", call(M), call(V), call(M, correction=0)),
    **each("corrcoef", call(M)),
}

CONVERT = {
    **each("to", call(M, F16), call(M, WHOLE), call(M, DType("float32"))),
    **each("type", call(M, I64)),
    **each("type_as", call(M, HALF)),
    **each("float double half bfloat16 long int short char byte bool", call(M.abs()), call(WHOLE)),
}

PATTERNS = {
    **each(
        "rearrange",
        call(X, "b t (h d) -> b h t d", h=2),
        call(X, "b t d -> (b t) d"),
        call(X, "... d -> d ..."),
        call(X, "b t d -> b t d"),
        call(real(1, 4), "1 d -> d 1"),
    ),
    **each(
        "einops_reduce",
        call(X, "b t d -> b d", "mean"),
        call(X, "b (t1 t2) d -> b t1", "max", t2=3),
        call(WHOLE, "a b -> ", "sum"),
        call(M, "a b -> b 1", "prod"),
        call(M, "a b -> b a", "min"),
    ),
    **each(
        "einops_repeat",
        call(M, "a b -> a c b", c=3),
        call(M, "a b -> (a 2) b"),
        call(M, "a b -> a b"),
        call(V, "d -> n d 1", n=2),
    ),
}

SAMPLES: dict[str, list[Call]] = {
    **POINTWISE,
    **REDUCE,
    **VIEW,
    **INDEX,
    **MATMUL,
    **JOIN,
    **LOSSES,
    **CREATE,
    **LINALG,
    **CONVERT,
    **PATTERNS,
}
