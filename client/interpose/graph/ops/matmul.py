"""Products: matrices, batches of them, vectors, distances."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...errors import BadArgument, ShapeMismatch
from ..values import TensorSpec
from . import einsum as equations
from .declare import Bound, Family, Outputs, Rule
from .dtypes import need_floating, promote
from .shapes import Shape, broadcast, dim_of, dims_of, expandable, need_ndim, same, without

family = Family()


def one_dtype(what: str, *specs: TensorSpec) -> str:
    """The dtype they all have. Raises BadArgument otherwise: products don't convert."""
    dtypes = {spec.dtype for spec in specs}
    if len(dtypes) > 1:
        raise BadArgument(f"{what} takes tensors of one dtype, not {' and '.join(sorted(dtypes))}: x.to(y.dtype)")
    return specs[0].dtype


def product(what: str, one: Shape, other: Shape) -> Shape:
    """The shape of `one @ other`."""
    if not one or not other:
        raise ShapeMismatch(f"{what} takes tensors with dimensions; `*` multiplies by a number")
    inner = other[-2] if len(other) > 1 else other[0]
    if one[-1] != inner:
        raise ShapeMismatch(f"{what}: {list(one)} and {list(other)}: {one[-1]} against {inner}")
    batch = broadcast(one[:-2], other[:-2])
    return (*batch, *(one[-2:-1] if len(one) > 1 else ()), *(other[-1:] if len(other) > 1 else ()))


def _matmul_rule(what: str, ndims: tuple[int, int] | None, names: tuple[str, str]) -> Rule:
    def rule(bound: Bound) -> TensorSpec:
        one, other = bound[names[0]], bound[names[1]]
        if ndims:
            need_ndim(one.shape, ndims[0], what)
            need_ndim(other.shape, ndims[1], what)
            if ndims == (3, 3):
                same(one.shape[0], other.shape[0], "bmm: batch sizes")
        return TensorSpec(product(what, one.shape, other.shape), one_dtype(what, one, other))

    return rule


def _product_work(names: tuple[str, str]) -> Callable[[Bound, Outputs], tuple[int, int]]:
    """Two operations for each product; broadcast operands may be copied."""

    def work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
        one, other = bound[names[0]], bound[names[1]]
        inner = one.shape[-1] if one.shape else 1
        batch = math.prod(broadcast(one.shape[:-2], other.shape[:-2]))
        copies = sum(max(batch // max(math.prod(spec.shape[:-2]), 1), 1) * spec.nbytes for spec in (one, other))
        return 2 * inner * outputs[0].numel, copies

    return work


for _line, _ndims, _names in (
    ("tm matmul(input: tensor, other: tensor)", None, ("input", "other")),
    ("tm mm(input: tensor, mat2: tensor)", (2, 2), ("input", "mat2")),
    ("tm bmm(input: tensor, mat2: tensor)", (3, 3), ("input", "mat2")),
    ("tm mv(input: tensor, vec: tensor)", (2, 1), ("input", "vec")),
    ("tm dot(input: tensor, tensor: tensor)", (1, 1), ("input", "tensor")),
    ("tm vdot(input: tensor, other: tensor)", (1, 1), ("input", "other")),
):
    _what = _line.split()[1].partition("(")[0]
    family.declare(_line, _matmul_rule(_what, _ndims, _names), _product_work(_names))


def _inner(bound: Bound) -> TensorSpec:
    one, other = bound["input"], bound["other"]
    dtype = one_dtype("inner", one, other)
    if not one.shape or not other.shape:
        return TensorSpec(broadcast(one.shape, other.shape), dtype)
    same(one.shape[-1], other.shape[-1], "inner: last dims")
    return TensorSpec((*one.shape[:-1], *other.shape[:-1]), dtype)


def _inner_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    one, other = bound["input"], bound["other"]
    return 2 * outputs[0].numel * max(one.shape[-1:], default=1), one.nbytes + other.nbytes


family.declare("tm inner(input: tensor, other: tensor)", _inner, _inner_work)


def _outer(bound: Bound) -> TensorSpec:
    one, other = bound["input"], bound["vec2"]
    need_ndim(one.shape, 1, "outer")
    need_ndim(other.shape, 1, "outer")
    return TensorSpec((one.numel, other.numel), promote(one.dtype, other.dtype))


family.declare("tm outer(input: tensor, vec2: tensor)\ntm ger(input: tensor, vec2: tensor)", _outer)


def _linear(bound: Bound) -> TensorSpec:
    one, weight, bias = bound["input"], bound["weight"], bound["bias"]
    if len(weight.shape) not in (1, 2) or not one.shape:
        raise ShapeMismatch(f"linear: a weight of shape {list(weight.shape)} on {list(one.shape)}")
    dtype = one_dtype("linear", *(spec for spec in (one, weight, bias) if spec is not None))
    result = product("linear", one.shape, weight.shape[::-1])
    if bias is not None:
        expandable(bias.shape, result, "a bias")
    return TensorSpec(result, dtype)


def _linear_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    return (2 * bound["weight"].shape[-1] + 1) * outputs[0].numel, outputs[0].nbytes


family.declare("f linear(input: tensor, weight: tensor, bias: tensor? = None)", _linear, _linear_work)


def _bilinear(bound: Bound) -> TensorSpec:
    one, other, weight, bias = (bound[name] for name in ("input1", "input2", "weight", "bias"))
    need_ndim(weight.shape, 3, "bilinear's weight")
    if not one.shape or one.shape[:-1] != other.shape[:-1]:
        raise ShapeMismatch(f"bilinear: inputs of shapes {list(one.shape)} and {list(other.shape)}")
    same(one.shape[-1], weight.shape[1], "bilinear: first input against weight")
    same(other.shape[-1], weight.shape[2], "bilinear: second input against weight")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeMismatch(f"bilinear: a bias of shape {list(bias.shape)}")
    return TensorSpec((*one.shape[:-1], weight.shape[0]), one_dtype("bilinear", one, other, weight))


def _bilinear_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    out, weight, rows = outputs[0], bound["weight"], bound["input1"].numel // max(bound["weight"].shape[1], 1)
    products = rows * weight.numel
    return 4 * products, products * max(out.nbytes // max(out.numel, 1), 8)


family.declare(
    "f bilinear(input1: tensor, input2: tensor, weight: tensor, bias: tensor? = None)", _bilinear, _bilinear_work
)


def _add_product(names: tuple[str, str], ndims: tuple[int, int], summed: bool = False) -> Rule:
    """A rule for `beta * input + alpha * (a @ b)`; `summed` adds the batch up."""

    def rule(bound: Bound) -> TensorSpec:
        one, other, start = bound[names[0]], bound[names[1]], bound["input"]
        need_ndim(one.shape, ndims[0], "this product")
        need_ndim(other.shape, ndims[1], "this product")
        if ndims == (3, 3):
            same(one.shape[0], other.shape[0], "batch sizes")
        if ndims == (1, 1):
            shape: Shape = (one.numel, other.numel)
        else:
            shape = product("this product", one.shape, other.shape)
        shape = shape[1:] if summed else shape
        expandable(start.shape, shape, "what is added to")
        return TensorSpec(shape, one_dtype("this product", start, one, other))

    return rule


for _line, _names, _dims, _summed in (
    ("tm addmm(input: tensor, mat1: tensor, mat2: tensor", ("mat1", "mat2"), (2, 2), False),
    ("tm addmv(input: tensor, mat: tensor, vec: tensor", ("mat", "vec"), (2, 1), False),
    ("tm addr(input: tensor, vec1: tensor, vec2: tensor", ("vec1", "vec2"), (1, 1), False),
    ("tm baddbmm(input: tensor, batch1: tensor, batch2: tensor", ("batch1", "batch2"), (3, 3), False),
    ("tm addbmm(input: tensor, batch1: tensor, batch2: tensor", ("batch1", "batch2"), (3, 3), True),
):

    def _add_work(bound: Bound, outputs: Outputs, names: tuple[str, str] = _names) -> tuple[int, int]:
        one, other = bound[names[0]], bound[names[1]]
        columns = other.shape[-1] if len(other.shape) > 1 or len(one.shape) == 1 else 1
        return 2 * one.numel * columns + 2 * outputs[0].numel, outputs[0].nbytes

    _rule = _add_product(_names, _dims, _summed)
    family.declare(f"{_line}, beta: number = 1, alpha: number = 1)", _rule, _add_work)


def _einsum(bound: Bound) -> TensorSpec:
    specs = bound["operands"]
    plan = equations.plan(bound["equation"], [spec.shape for spec in specs])
    return TensorSpec(plan.shape, one_dtype("einsum", *specs))


def _einsum_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    specs = bound["operands"]
    plan = equations.plan(bound["equation"], [spec.shape for spec in specs])
    size = outputs[0].nbytes // max(outputs[0].numel, 1) or 8
    return plan.flops, (plan.held + sum(spec.numel for spec in specs)) * size


family.declare("t einsum(equation: str, *operands: tensors)", _einsum, _einsum_work)


def _contracted(bound: Bound) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dims of both tensors that tensordot sums over."""
    one, other, dims = bound["a"].shape, bound["b"].shape, bound["dims"]
    if isinstance(dims, int):
        if not 0 <= dims <= min(len(one), len(other)):
            raise BadArgument(f"tensordot: {dims} dims of {list(one)} and {list(other)}")
        return tuple(range(len(one) - dims, len(one))), tuple(range(dims))
    return dims_of(dims[0], len(one)), dims_of(dims[1], len(other))


def _tensordot(bound: Bound) -> TensorSpec:
    one, other = bound["a"], bound["b"]
    first, second = _contracted(bound)
    same(len(first), len(second), "tensordot: number of dims")
    for left, right in zip(first, second, strict=True):
        same(one.shape[left], other.shape[right], "tensordot: sizes of summed dims")
    shape = (*without(one.shape, first), *without(other.shape, second))
    return TensorSpec(shape, one_dtype("tensordot", one, other))


def _tensordot_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    inner = math.prod(bound["a"].shape[dim] for dim in _contracted(bound)[0])
    return 2 * inner * outputs[0].numel, bound["a"].nbytes + bound["b"].nbytes + outputs[0].nbytes


family.declare("t tensordot(a: tensor, b: tensor, dims: int|pair = 2)", _tensordot, _tensordot_work)


def _kron(bound: Bound) -> TensorSpec:
    one, other = bound["input"], bound["other"]
    ndim = max(len(one.shape), len(other.shape))
    padded = [(1,) * (ndim - len(spec.shape)) + spec.shape for spec in (one, other)]
    shape = tuple(a * b for a, b in zip(*padded, strict=True))
    return TensorSpec(shape, promote(one.dtype, other.dtype))


family.declare("tm kron(input: tensor, other: tensor)", _kron)


def _cdist(bound: Bound) -> TensorSpec:
    one, other = bound["x1"], bound["x2"]
    need_floating(one.dtype, "cdist")
    if min(len(one.shape), len(other.shape)) < 2:
        raise ShapeMismatch("cdist takes tensors of at least 2 dimensions")
    same(one.shape[-1], other.shape[-1], "cdist: last dims")
    if bound["p"] < 0:
        raise BadArgument("cdist: p can't be negative")
    batch = broadcast(one.shape[:-2], other.shape[:-2])
    return TensorSpec((*batch, one.shape[-2], other.shape[-2]), one_dtype("cdist", one, other))


def _cdist_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    out, one, other = outputs[0], bound["x1"], bound["x2"]
    batch = math.prod(out.shape[:-2])
    rows = batch * (one.shape[-2] + other.shape[-2]) * (one.shape[-1] + 2)
    return 32 * out.numel * max(one.shape[-1], 1), 2 * out.nbytes + 8 * rows


family.declare("t cdist(x1: tensor, x2: tensor, p: float = 2.0)", _cdist, _cdist_work)


def _cross(bound: Bound) -> TensorSpec:
    one, other = bound["input"], bound["other"]
    same(len(one.shape), len(other.shape), "cross: number of dimensions")
    shape = broadcast(one.shape, other.shape)
    if shape[dim_of(bound["dim"], len(shape))] != 3:
        raise ShapeMismatch(f"cross: dim {bound['dim']} must have size 3")
    return TensorSpec(shape, one_dtype("cross", one, other))


family.declare(
    "l linalg_cross(input: tensor, other: tensor, dim: int = -1)",
    _cross,
    lambda _, outputs: (4 * outputs[0].numel, 0),
)
