"""Over one or several dimensions: sums, extremes, order, running totals, softmax."""

from __future__ import annotations

import math

from ...errors import BadArgument, IndexOutOfRange, ShapeMismatch
from ..values import DTYPES, TensorSpec
from .declare import Bound, Family, Outputs, Rule
from .dtypes import as_float, as_real, as_sum, chosen, need_floating, result_type
from .shapes import broadcast, dim_of, dims_of, with_size, without

family = Family()


def read_input(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """A few operations for each element that goes in, computed in place."""
    return 4 * bound["input"].numel, 0


def hold_input(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """Transcendental work on each element that goes in, with three wide copies of the input held."""
    numel = bound["input"].numel
    return 48 * numel, 3 * numel * 8


def order_input(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """Sorting: n log n, with values and positions of the input held twice."""
    spec = bound["input"]
    return spec.numel * (8 + 4 * math.ceil(math.log2(spec.numel + 2))), 2 * (spec.nbytes + 8 * spec.numel)


def reduced(bound: Bound, dtype: str) -> TensorSpec:
    """The input without the dims of `dim` (all of them for None and ())."""
    spec = bound["input"]
    dim = bound.get("dim")
    if type(dim) is int:
        dim = (dim,)
    ndim = len(spec.shape)
    dims = dims_of(dim, ndim) if dim else range(ndim)
    return TensorSpec(without(spec.shape, dims, bound.get("keepdim", False)), dtype)


def _need_elements(bound: Bound, what: str) -> None:
    """Raises ShapeMismatch if a reduced dimension is empty, where that has no answer."""
    shape, dim = bound["input"].shape, bound.get("dim")
    dims = range(len(shape)) if dim is None or dim == () else (dim,) if type(dim) is int else dim
    if shape and any(shape[dim_of(one, len(shape))] == 0 for one in dims):
        raise ShapeMismatch(f"{what} of nothing: the shape is {list(shape)}")


def _sum(bound: Bound) -> TensorSpec:
    return reduced(bound, chosen(bound["dtype"], as_sum(bound["input"].dtype)))


def _mean(bound: Bound) -> TensorSpec:
    dtype = chosen(bound["dtype"], bound["input"].dtype)
    need_floating(dtype, "mean")
    return reduced(bound, dtype)


family.declare(
    """
    tm sum(input: tensor, dim: ints? = None, keepdim: bool = False, dtype: dtype? = None)
    tm nansum(input: tensor, dim: ints? = None, keepdim: bool = False, dtype: dtype? = None)
    tm prod(input: tensor, dim: int? = None, keepdim: bool = False, dtype: dtype? = None)
    """,
    _sum,
    hold_input,
)
family.declare(
    """
    tm mean(input: tensor, dim: ints? = None, keepdim: bool = False, dtype: dtype? = None)
    tm nanmean(input: tensor, dim: ints? = None, keepdim: bool = False, dtype: dtype? = None)
    """,
    _mean,
    hold_input,
)


def _std(bound: Bound) -> TensorSpec:
    need_floating(bound["input"].dtype, "std and var")
    return reduced(bound, as_real(bound["input"].dtype))


def _std_mean(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    need_floating(bound["input"].dtype, "std_mean and var_mean")
    return _std(bound), reduced(bound, bound["input"].dtype)


_SPREAD = (
    "input: tensor, dim: ints? = None, unbiased: bool = True, keepdim: bool = False, correction: number? = None"
)
family.declare(
    f"""
    tm std({_SPREAD})
    tm std(input: tensor, unbiased: bool)
    tm var({_SPREAD})
    tm var(input: tensor, unbiased: bool)
    """,
    _std,
    hold_input,
)
family.declare(f"t std_mean({_SPREAD}) -> *\nt var_mean({_SPREAD}) -> *", _std_mean, hold_input)


def _extreme(bound: Bound) -> TensorSpec:
    _need_elements(bound, "an extreme")
    return reduced(bound, bound["input"].dtype)


family.declare(
    """
    tm amax(input: tensor, dim: ints? = None, keepdim: bool = False)
    tm amin(input: tensor, dim: ints? = None, keepdim: bool = False)
    """,
    _extreme,
    read_input,
)


def _aminmax(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    spec = _extreme(bound)
    return spec, spec


family.declare(
    "tm aminmax(input: tensor, dim: int? = None, keepdim: bool = False) -> min, max", _aminmax, read_input
)


def _max(bound: Bound) -> TensorSpec | tuple[TensorSpec, TensorSpec]:
    """The largest of all, of each slice along a dim (with its position), or of two tensors."""
    spec = bound["input"]
    if "other" in bound:
        return TensorSpec(broadcast(spec.shape, bound["other"].shape), result_type(spec, bound["other"]))
    _need_elements(bound, "an extreme")
    found = reduced(bound, spec.dtype)
    return (found, TensorSpec(found.shape, "int64")) if "dim" in bound else found


family.declare(
    """
    tm max(input: tensor)
    tm max(input: tensor, dim: int, keepdim: bool = False) -> values, indices
    tm max(input: tensor, other: tensor)
    tm min(input: tensor)
    tm min(input: tensor, dim: int, keepdim: bool = False) -> values, indices
    tm min(input: tensor, other: tensor)
    """,
    _max,
    read_input,
)
family.declare(
    """
    tm median(input: tensor)
    tm median(input: tensor, dim: int, keepdim: bool = False) -> values, indices
    tm nanmedian(input: tensor)
    tm nanmedian(input: tensor, dim: int, keepdim: bool = False) -> values, indices
    """,
    _max,
    order_input,
)
family.declare("tm mode(input: tensor, dim: int = -1, keepdim: bool = False) -> values, indices", _max, order_input)


def _arg(bound: Bound) -> TensorSpec:
    _need_elements(bound, "the position of an extreme")
    return reduced(bound, "int64")


family.declare(
    """
    tm argmax(input: tensor, dim: int? = None, keepdim: bool = False)
    tm argmin(input: tensor, dim: int? = None, keepdim: bool = False)
    """,
    _arg,
    hold_input,
)
family.declare(
    """
    tm all(input: tensor, dim: ints? = None, keepdim: bool = False)
    tm any(input: tensor, dim: ints? = None, keepdim: bool = False)
    """,
    lambda bound: reduced(bound, "uint8" if bound["input"].dtype == "uint8" else "bool"),
    hold_input,
)
family.declare(
    "tm count_nonzero(input: tensor, dim: ints? = None)", lambda bound: reduced(bound, "int64"), hold_input
)
family.declare(
    "tm logsumexp(input: tensor, dim: ints, keepdim: bool = False)",
    lambda bound: reduced(bound, as_float(bound["input"].dtype)),
    hold_input,
)


def _norm(bound: Bound) -> TensorSpec:
    need_floating(bound["input"].dtype, "norm")
    return reduced(bound, chosen(bound["dtype"], as_real(bound["input"].dtype)))


family.declare(
    """
    tm norm(input: tensor, p: number|'fro'? = 'fro', dim: ints? = None, keepdim: bool = False, dtype: dtype? = None)
    l linalg_vector_norm(x: tensor, ord: number = 2, dim: ints? = None, keepdim: bool = False, dtype: dtype? = None)
    """,
    lambda bound: _norm(bound if "input" in bound else {**bound, "input": bound["x"]}),
    lambda bound, outputs: hold_input({"input": bound["input"] if "input" in bound else bound["x"]}, outputs),
)


def _kthvalue(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    spec = bound["input"]
    size = spec.shape[dim_of(bound["dim"], len(spec.shape))] if spec.shape else 1
    if not 1 <= bound["k"] <= size:
        raise IndexOutOfRange(f"kthvalue: k is {bound['k']}, of {size} values")
    found = reduced(bound, spec.dtype)
    return found, TensorSpec(found.shape, "int64")


family.declare(
    "tm kthvalue(input: tensor, k: int, dim: int = -1, keepdim: bool = False) -> values, indices",
    _kthvalue,
    order_input,
)


def _quantile(bound: Bound) -> TensorSpec:
    spec, q = bound["input"], bound["q"]
    need_floating(spec.dtype, "quantile")
    found = reduced(bound, spec.dtype)
    if isinstance(q, TensorSpec):
        if q.dtype != spec.dtype:
            raise BadArgument(f"quantile: q is {q.dtype}, the input {spec.dtype}; convert one")
        return TensorSpec((*q.shape, *found.shape), spec.dtype)
    if not 0 <= q <= 1:
        raise BadArgument(f"quantile: q is {q}, not between 0 and 1")
    return found


_QUANTILE = (
    "(input: tensor, q: tensor|float, dim: int? = None, keepdim: bool = False, "
    "interpolation: 'linear'|'lower'|'higher'|'midpoint'|'nearest' = 'linear')"
)
family.declare(f"tm quantile{_QUANTILE}\ntm nanquantile{_QUANTILE}", _quantile, order_input)


def _topk(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    spec, k = bound["input"], bound["k"]
    dim = dim_of(bound["dim"], len(spec.shape))
    size = spec.shape[dim] if spec.shape else 1
    if not 0 <= k <= size:
        raise IndexOutOfRange(f"topk: k is {k}, and dim {bound['dim']} holds {size} values")
    shape = with_size(spec.shape, dim, k) if spec.shape else ()
    return TensorSpec(shape, spec.dtype), TensorSpec(shape, "int64")


family.declare(
    "tm topk(input: tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> values, indices",
    _topk,
    order_input,
)


def _sort(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    spec = bound["input"]
    dim_of(bound["dim"], len(spec.shape))
    return spec, TensorSpec(spec.shape, "int64")


family.declare(
    """
    tm sort(input: tensor, dim: int = -1, descending: bool = False, stable: bool = False) -> values, indices
    """,
    _sort,
    order_input,
)
family.declare(
    "tm argsort(input: tensor, dim: int = -1, descending: bool = False, stable: bool = False)",
    lambda bound: _sort(bound)[1],
    order_input,
)
family.declare("tm msort(input: tensor)", lambda bound: _sort({**bound, "dim": 0})[0], order_input)


def along(dtype_of: str) -> Rule:
    """A rule: the input's shape, one dim checked; dtype "sum" or "float" as those do."""

    def rule(bound: Bound) -> TensorSpec:
        spec = bound["input"]
        dim_of(bound["dim"], len(spec.shape))
        dtype = as_sum(spec.dtype) if dtype_of == "sum" else spec.dtype
        dtype = chosen(bound.get("dtype"), dtype)
        if dtype_of == "float":
            need_floating(dtype, "this function")
        return TensorSpec(spec.shape, dtype)

    return rule


family.declare(
    """
    tm cumsum(input: tensor, dim: int, dtype: dtype? = None)
    tm cumprod(input: tensor, dim: int, dtype: dtype? = None)
    """,
    along("sum"),
    hold_input,
)
family.declare("tm logcumsumexp(input: tensor, dim: int)", along("float"), hold_input)
family.declare(
    """
    tm cummax(input: tensor, dim: int) -> values, indices
    tm cummin(input: tensor, dim: int) -> values, indices
    """,
    _sort,
    read_input,
)
family.declare(
    """
    tmf softmax(input: tensor, dim: int, dtype: dtype? = None)
    tmf log_softmax(input: tensor, dim: int, dtype: dtype? = None)
    f softmin(input: tensor, dim: int, dtype: dtype? = None)
    """,
    along("float"),
    hold_input,
)


def _diff(bound: Bound) -> TensorSpec:
    spec, n = bound["input"], bound["n"]
    if not spec.shape:
        raise ShapeMismatch("diff takes a tensor with a dimension")
    if n < 0:
        raise BadArgument(f"diff: n is {n}, and can't be negative")
    dim = dim_of(bound["dim"], len(spec.shape))
    return TensorSpec(with_size(spec.shape, dim, max(spec.shape[dim] - n, 0)), spec.dtype)


def _diff_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """At most as many passes as the dim is long: then nothing is left."""
    spec = bound["input"]
    passes = min(bound["n"], spec.shape[dim_of(bound["dim"], len(spec.shape))] + 1)
    return passes * spec.numel, 2 * spec.nbytes


family.declare("tm diff(input: tensor, n: int = 1, dim: int = -1)", _diff, _diff_work)


def _searchsorted(bound: Bound) -> TensorSpec:
    value = bound["input"]
    edges = bound["boundaries"] if "boundaries" in bound else bound["sorted_sequence"]
    shape = value.shape if isinstance(value, TensorSpec) else ()
    if len(edges.shape) != 1 and ("boundaries" in bound or edges.shape[:-1] != shape[:-1]):
        raise ShapeMismatch(f"edges of shape {list(edges.shape)} don't fit values of shape {list(shape)}")
    return TensorSpec(shape, "int32" if bound["out_int32"] else "int64")


def _searchsorted_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    edges = bound["boundaries"] if "boundaries" in bound else bound["sorted_sequence"]
    numel = outputs[0].numel
    return numel * (2 + math.ceil(math.log2(edges.numel + 2))), edges.nbytes + numel * max(DTYPES.values())


family.declare(
    """
    t bucketize(input: tensor|number, boundaries: tensor, out_int32: bool = False, right: bool = False)
    t searchsorted(sorted_sequence: tensor, input: tensor|number, out_int32: bool = False, right: bool = False)
    """,
    _searchsorted,
    _searchsorted_work,
)


def _histc(bound: Bound) -> TensorSpec:
    need_floating(bound["input"].dtype, "histc")
    if bound["bins"] <= 0:
        raise BadArgument("histc: bins must be positive")
    return TensorSpec((bound["bins"],), bound["input"].dtype)


family.declare("tm histc(input: tensor, bins: int = 100, min: number = 0, max: number = 0)", _histc, hold_input)
