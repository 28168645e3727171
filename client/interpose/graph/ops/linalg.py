"""torch.linalg: decompositions, inverses, norms, with bounds on their real work."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...errors import BadArgument, ShapeMismatch
from ..values import TensorSpec
from .declare import Bound, Family, Outputs
from .dtypes import as_real, chosen, need_floating, promote
from .matmul import one_dtype
from .reduce import hold_input
from .shapes import broadcast, dims_of, same, without

family = Family()

_MOST_POWER = 1 << 31
_HALVES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def _matrix(spec: TensorSpec, what: str, square: bool = False) -> tuple[int, int]:
    """Rows and columns of a stack of matrices."""
    if len(spec.shape) < 2:
        raise ShapeMismatch(f"{what} takes matrices, not the shape {list(spec.shape)}")
    if spec.dtype in _HALVES:
        raise BadArgument(f"{what} isn't computed in {spec.dtype}; convert first: x.float()")
    need_floating(spec.dtype, what)
    rows, columns = spec.shape[-2:]
    if square and rows != columns:
        raise ShapeMismatch(f"{what} takes square matrices, not {rows} by {columns}")
    return rows, columns


def cubic(factor: int, name: str = "A", copies: int = 4) -> Callable[[Bound, Outputs], tuple[int, int]]:
    """`factor` operations for rows * columns * the larger of them, over the stack; some copies held."""

    def work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
        spec = bound[name]
        rows, columns = spec.shape[-2:]
        stack = math.prod(spec.shape[:-2])
        larger = max(rows, columns)
        item = spec.nbytes // max(spec.numel, 1)
        return stack * factor * rows * columns * larger, copies * stack * larger * larger * max(item, 8)

    return work


def _square(what: str) -> Callable[[Bound], TensorSpec]:
    def rule(bound: Bound) -> TensorSpec:
        spec = bound["A"] if "A" in bound else bound["input"]
        _matrix(spec, what, square=True)
        assert isinstance(spec, TensorSpec)
        return spec

    return rule


family.declare("l linalg_inv(A: tensor)", _square("inv"), cubic(4))
family.declare("l linalg_cholesky(input: tensor, upper: bool = False)", _square("cholesky"), cubic(2, "input"))


def _det(bound: Bound) -> TensorSpec:
    spec = bound["A"]
    _matrix(spec, "det", square=True)
    return TensorSpec(spec.shape[:-2], spec.dtype)


family.declare("l linalg_det(A: tensor)", _det, cubic(2))


def _slogdet(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    spec = _det(bound)
    return spec, TensorSpec(spec.shape, as_real(spec.dtype))


family.declare("l linalg_slogdet(A: tensor) -> sign, logabsdet", _slogdet, cubic(2))
family.declare("tm logdet(input: tensor)", lambda bound: _det({"A": bound["input"]}), cubic(2, "input"))


def _solve(bound: Bound) -> TensorSpec:
    one, other = bound["A"], bound["B"]
    size, _ = _matrix(one, "solve", square=True)
    dtype = one_dtype("solve", one, other)
    # A right side with one dimension less than A, or of its stack's shape and size, is a stack of vectors.
    vector = len(other.shape) == 1 or (len(other.shape) == len(one.shape) - 1 and other.shape == one.shape[:-1])
    if vector and bound.get("left", True):
        shape = broadcast(one.shape[:-2], other.shape[:-1])
        same(other.shape[-1], size, "solve: sizes of A and B")
        return TensorSpec((*shape, size), dtype)
    if len(other.shape) < 2:
        raise ShapeMismatch("solve: B is a matrix here")
    side = -2 if bound.get("left", True) else -1
    same(other.shape[side], size, "solve: sizes of A and B")
    return TensorSpec((*broadcast(one.shape[:-2], other.shape[:-2]), *other.shape[-2:]), dtype)


def _solve_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    size, out = bound["A"].shape[-1], outputs[0]
    stack = max(out.numel // max(size, 1), 1)
    return 2 * size * size * (size * stack + stack), 3 * (out.nbytes + 8 * stack * size * size)


family.declare("l linalg_solve(A: tensor, B: tensor, left: bool = True)", _solve, _solve_work)


def _solve_triangular(bound: Bound) -> TensorSpec:
    if len(bound["B"].shape) < 2:
        raise ShapeMismatch("solve_triangular: B is a matrix")
    one, other = bound["A"], bound["B"]
    size, _ = _matrix(one, "solve_triangular", square=True)
    same(other.shape[-2 if bound["left"] else -1], size, "solve_triangular: sizes of A and B")
    shape = (*broadcast(one.shape[:-2], other.shape[:-2]), *other.shape[-2:])
    return TensorSpec(shape, one_dtype("solve_triangular", one, other))


family.declare(
    "l linalg_solve_triangular(A: tensor, B: tensor, upper: bool, left: bool = True, unitriangular: bool = False)",
    _solve_triangular,
    _solve_work,
)


def _qr(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    spec = bound["A"]
    rows, columns = _matrix(spec, "qr")
    inner = rows if bound["mode"] == "complete" else min(rows, columns)
    batch = spec.shape[:-2]
    return TensorSpec((*batch, rows, inner), spec.dtype), TensorSpec((*batch, inner, columns), spec.dtype)


family.declare("l linalg_qr(A: tensor, mode: 'reduced'|'complete' = 'reduced') -> Q, R", _qr, cubic(8))


def _svd(bound: Bound) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    spec = bound["A"]
    rows, columns = _matrix(spec, "svd")
    small, batch = min(rows, columns), spec.shape[:-2]
    full = bound["full_matrices"]
    return (
        TensorSpec((*batch, rows, rows if full else small), spec.dtype),
        TensorSpec((*batch, small), as_real(spec.dtype)),
        TensorSpec((*batch, columns if full else small, columns), spec.dtype),
    )


def _svdvals(bound: Bound) -> TensorSpec:
    spec = bound["A"]
    small = min(_matrix(spec, "svdvals"))
    return TensorSpec((*spec.shape[:-2], small), as_real(spec.dtype))


family.declare("l linalg_svd(A: tensor, full_matrices: bool = True) -> U, S, Vh", _svd, cubic(48, copies=8))
family.declare("l linalg_svdvals(A: tensor)", _svdvals, cubic(16, copies=4))


def _pinv(bound: Bound) -> TensorSpec:
    spec = bound["A"]
    rows, columns = _matrix(spec, "pinv")
    return TensorSpec((*spec.shape[:-2], columns, rows), spec.dtype)


_TOLERANCES = "atol: float? = None, rtol: float? = None, hermitian: bool = False"
family.declare(f"l linalg_pinv(A: tensor, {_TOLERANCES})", _pinv, cubic(56, copies=10))


def _rank(bound: Bound) -> TensorSpec:
    spec = bound["A"]
    _matrix(spec, "matrix_rank", square=bound["hermitian"])
    return TensorSpec(spec.shape[:-2], "int64")


family.declare(f"l linalg_matrix_rank(A: tensor, {_TOLERANCES})", _rank, cubic(32, copies=8))


def _eigh(bound: Bound) -> tuple[TensorSpec, TensorSpec]:
    spec = bound["A"]
    size, _ = _matrix(spec, "eigh", square=True)
    return TensorSpec((*spec.shape[:-2], size), as_real(spec.dtype)), TensorSpec(spec.shape, spec.dtype)


family.declare("l linalg_eigh(A: tensor, UPLO: 'L'|'U' = 'L') -> eigenvalues, eigenvectors", _eigh, cubic(24))
family.declare("l linalg_eigvalsh(A: tensor, UPLO: 'L'|'U' = 'L')", lambda bound: _eigh(bound)[0], cubic(8))


def _lstsq(bound: Bound) -> TensorSpec:
    one, other = bound["A"], bound["B"]
    rows, columns = _matrix(one, "lstsq")
    if len(other.shape) < 2:
        raise ShapeMismatch("lstsq: B is a matrix; unsqueeze(-1) makes one")
    same(other.shape[-2], rows, "lstsq: rows of A and B")
    if one.shape[:-2] != other.shape[:-2]:
        raise ShapeMismatch(f"lstsq: stacks of shapes {list(one.shape[:-2])} and {list(other.shape[:-2])}")
    return TensorSpec((*one.shape[:-2], columns, other.shape[-1]), one_dtype("lstsq", one, other))


def _lstsq_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    rows, columns = bound["A"].shape[-2:]
    right, larger = bound["B"].shape[-1], max(rows, columns)
    stack = math.prod(outputs[0].shape[:-2])
    return stack * larger * larger * (48 * larger + 4 * right), 8 * stack * larger * (8 * larger + right) * 8


family.declare("- lstsq(A: tensor, B: tensor)", _lstsq, _lstsq_work)


def _matrix_power(bound: Bound) -> TensorSpec:
    spec = bound["input"]
    if len(spec.shape) < 2 or spec.shape[-1] != spec.shape[-2]:
        raise ShapeMismatch(f"matrix_power takes square matrices, not {list(spec.shape)}")
    if abs(bound["n"]) > _MOST_POWER:
        raise BadArgument(f"matrix_power: n is {bound['n']}, beyond {_MOST_POWER}")
    if bound["n"] < 0:
        _matrix(spec, "matrix_power of a negative n", square=True)
    assert isinstance(spec, TensorSpec)
    return spec


def _power_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """Repeated squaring, after an inversion where n is negative."""
    spec, n = bound["input"], bound["n"]
    size = spec.shape[-1]
    products = 2 * abs(n).bit_length() + (4 if n < 0 else 0)
    return 2 * products * spec.numel * size, 4 * spec.nbytes


family.declare("tml matrix_power(input: tensor, n: int)", _matrix_power, _power_work)


def _trace(bound: Bound) -> TensorSpec:
    spec = bound["input"]
    if len(spec.shape) != 2:
        raise ShapeMismatch(f"trace takes one matrix, not the shape {list(spec.shape)}")
    return TensorSpec((), "int64" if spec.dtype in ("uint8", "int8", "int16", "int32") else spec.dtype)


family.declare("tm trace(input: tensor)", _trace)


def _norm(bound: Bound) -> TensorSpec:
    """A vector norm of one dim or of everything, a matrix norm of two dims."""
    spec, order, dim = bound["input"], bound["ord"], bound["dim"]
    need_floating(spec.dtype, "norm")
    ndim = len(spec.shape)
    dims = dims_of(dim, ndim) if dim else tuple(range(ndim))
    if order is not None and len(dims) not in (1, 2):
        raise ShapeMismatch(f"norm: ord {order!r} needs one or two dims, not {len(dims)}")
    if isinstance(order, str) and len(dims) != 2:
        raise ShapeMismatch(f"norm: ord {order!r} is of matrices")
    if len(dims) == 2 and order not in (None, "fro", "nuc", 1, -1, 2, -2, math.inf, -math.inf):
        raise BadArgument(f"norm: ord {order!r} isn't a matrix norm")
    if order in ("nuc", 2, -2) and len(dims) == 2 and spec.dtype in _HALVES:
        raise BadArgument(f"this norm isn't computed in {spec.dtype}; convert first: x.float()")
    dtype = chosen(bound["dtype"], as_real(spec.dtype))
    return TensorSpec(without(spec.shape, dims, bound["keepdim"]), dtype)


def _norm_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """The spectral and nuclear norms decompose."""
    spec, dim = bound["input"], bound["dim"]
    if bound["ord"] not in ("nuc", 2, -2) or len(dim or spec.shape) != 2:
        return hold_input(bound, outputs)
    rows, columns = (spec.shape[one] for one in dim or (0, 1))
    stack = spec.numel // max(rows * columns, 1)
    larger = max(rows, columns)
    return 48 * stack * rows * columns * larger, 8 * 8 * stack * larger * larger


_NORM = "dim: ints? = None, keepdim: bool = False, dtype: dtype? = None)"
family.declare(f"l linalg_norm(input: tensor, ord: number|'fro'|'nuc'? = None, {_NORM}", _norm, _norm_work)
family.declare(
    "l linalg_matrix_norm(input: tensor, ord: number|'fro'|'nuc' = 'fro', dim: ints = (-2,-1), "
    "keepdim: bool = False, dtype: dtype? = None)",
    _norm,
    _norm_work,
)


def _lu(bound: Bound) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    spec = bound["A"]
    rows, columns = _matrix(spec, "lu")
    small, batch = min(rows, columns), spec.shape[:-2]
    shapes = ((*batch, rows, rows), (*batch, rows, small), (*batch, small, columns))
    one, two, three = (TensorSpec(shape, spec.dtype) for shape in shapes)
    return one, two, three


family.declare("l linalg_lu(A: tensor) -> P, L, U", _lu, cubic(2))


def _cov(bound: Bound) -> TensorSpec:
    spec = bound["input"]
    if len(spec.shape) > 2:
        raise ShapeMismatch("cov and corrcoef take up to 2 dimensions")
    size = spec.shape[0] if len(spec.shape) == 2 and spec.shape[0] != 1 else None
    dtype = promote(spec.dtype, "float32") if spec.dtype not in _HALVES else spec.dtype
    return TensorSpec((size, size) if size is not None else (), dtype)


def _cov_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    return 2 * bound["input"].numel * (outputs[0].shape[-1] if outputs[0].shape else 1) + 64, 24 * (
        bound["input"].numel + outputs[0].numel
    )


family.declare("tm cov(input: tensor, correction: int = 1)\ntm corrcoef(input: tensor)", _cov, _cov_work)
