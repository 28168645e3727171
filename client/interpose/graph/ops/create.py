"""New tensors: constants, ranges, and random ones from an explicit seed."""

from __future__ import annotations

import math
from typing import Any

from ...errors import BadArgument, ShapeMismatch
from ..values import TensorSpec
from .declare import Bound, Family, Outputs
from .dtypes import category, chosen, need_floating, need_real, number_dtype
from .shapes import broadcast, sizes

family = Family()

_MOST = 1 << 53
"""Beyond it torch's own count of a range is off."""


def _filled(bound: Bound) -> TensorSpec:
    if "fill_value" in bound:
        dtype = number_dtype(bound["fill_value"])
        return TensorSpec(sizes(bound["size"]), chosen(bound["dtype"], dtype))
    return TensorSpec(sizes(bound["size"]), chosen(bound["dtype"], "float32"))


family.declare(
    """
    t zeros(*size: ints, dtype: dtype? = None)
    t ones(*size: ints, dtype: dtype? = None)
    t full(size: ints, fill_value: number, dtype: dtype? = None)
    """,
    _filled,
)


def _like(bound: Bound) -> TensorSpec:
    return TensorSpec(bound["input"].shape, chosen(bound["dtype"], bound["input"].dtype))


family.declare(
    """
    t zeros_like(input: tensor, dtype: dtype? = None)
    t ones_like(input: tensor, dtype: dtype? = None)
    t full_like(input: tensor, fill_value: tensor|number, dtype: dtype? = None)
    """,
    _like,
)


def _new(bound: Bound) -> TensorSpec:
    return TensorSpec(sizes(bound["size"]), chosen(bound["dtype"], bound["input"].dtype))


family.declare(
    """
    m new_zeros(input: tensor, *size: ints, dtype: dtype? = None)
    m new_ones(input: tensor, *size: ints, dtype: dtype? = None)
    m new_full(input: tensor, size: ints, fill_value: number, dtype: dtype? = None)
    """,
    _new,
)


def _numbers(what: str, *values: Any) -> None:
    if not all(math.isfinite(value) and abs(value) <= _MOST for value in values):
        raise BadArgument(f"{what} takes finite numbers up to 2**53")


def _arange(bound: Bound) -> TensorSpec:
    start, end, step = bound.get("start", 0), bound["end"], bound.get("step", 1)
    _numbers("arange", start, end, step)
    if step == 0 or (end - start) * step < 0:
        raise BadArgument(f"arange: from {start} to {end} in steps of {step} leads nowhere")
    whole = all(isinstance(value, int) for value in (start, end, step))
    length = -((start - end) // step) if whole else math.ceil((end - start) / step)
    return TensorSpec((length,), chosen(bound["dtype"], "int64" if whole else "float32"))


family.declare(
    """
    t arange(end: float, dtype: dtype? = None)
    t arange(start: float, end: float, step: float = 1, dtype: dtype? = None)
    """,
    _arange,
)


def _linspace(bound: Bound) -> TensorSpec:
    _numbers("linspace", bound["start"], bound["end"])
    return TensorSpec(sizes((bound["steps"],)), chosen(bound["dtype"], "float32"))


family.declare(
    """
    t linspace(start: float, end: float, steps: int, dtype: dtype? = None)
    t logspace(start: float, end: float, steps: int, base: float = 10.0, dtype: dtype? = None)
    """,
    _linspace,
)


def _eye(bound: Bound) -> TensorSpec:
    columns = bound["n"] if bound["m"] is None else bound["m"]
    return TensorSpec(sizes((bound["n"], columns)), chosen(bound["dtype"], "float32"))


family.declare("t eye(n: int, m: int? = None, dtype: dtype? = None)", _eye)


def _triangle_indices(bound: Bound) -> TensorSpec:
    """Counts the elements on and below (above) a diagonal without walking all rows."""
    rows, columns = sizes((bound["row"], bound["col"]))
    lower = _below(rows, columns, bound["offset"])
    count = lower if bound["_lower"] else rows * columns - _below(rows, columns, bound["offset"] - 1)
    return TensorSpec((2, count), "int64")


def _below(rows: int, columns: int, offset: int) -> int:
    """Elements (r, c) with c <= r + offset."""
    first = max(0, -offset)
    last = min(rows, max(columns - offset - 1, 0))
    ramp = max(last - first, 0)
    full = max(rows - max(first, last), 0) * columns
    return ramp * (first + offset + 1) + ramp * (ramp - 1) // 2 + full


for _name, _lower in (("tril_indices", True), ("triu_indices", False)):

    def _indices(bound: Bound, lower: bool = _lower) -> TensorSpec:
        return _triangle_indices({**bound, "_lower": lower})

    family.declare(f"t {_name}(row: int, col: int, offset: int = 0)", _indices)


def _random_size(bound: Bound) -> TensorSpec:
    dtype = chosen(bound["dtype"], "int64" if "high" in bound else "float32")
    if "high" in bound:
        _range(bound)
    else:
        need_floating(dtype, "a random real number")
    return TensorSpec(sizes(bound["size"]), dtype)


def _range(bound: Bound) -> None:
    if bound.get("low", 0) >= bound["high"]:
        raise BadArgument(f"random integers from {bound.get('low', 0)} to below {bound['high']}: there are none")


def _random_like(bound: Bound) -> TensorSpec:
    spec = _like(bound)
    if "high" in bound:
        _range(bound)
    else:
        need_floating(spec.dtype, "a random real number")
    return spec


def draw(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """Drawn numbers, and a wide copy for those that are scaled or masked."""
    return 32 * outputs[0].numel, outputs[0].nbytes + 8 * outputs[0].numel


family.declare(
    """
    t randn(*size: ints, seed: int, dtype: dtype? = None)
    t rand(*size: ints, seed: int, dtype: dtype? = None)
    t randint(high: int, size: ints, seed: int, dtype: dtype? = None)
    t randint(low: int, high: int, size: ints, seed: int, dtype: dtype? = None)
    """,
    _random_size,
    draw,
    random=True,
)
family.declare(
    """
    t randn_like(input: tensor, seed: int, dtype: dtype? = None)
    t rand_like(input: tensor, seed: int, dtype: dtype? = None)
    t randint_like(input: tensor, high: int, seed: int, dtype: dtype? = None)
    t randint_like(input: tensor, low: int, high: int, seed: int, dtype: dtype? = None)
    """,
    _random_like,
    draw,
    random=True,
)
family.declare(
    "t randperm(n: int, seed: int, dtype: dtype? = None)",
    lambda bound: TensorSpec(sizes((bound["n"],)), chosen(bound["dtype"], "int64")),
    draw,
    random=True,
)


def _normal(bound: Bound) -> TensorSpec:
    shapes = [value.shape for value in (bound["mean"], bound["std"]) if isinstance(value, TensorSpec)]
    if not shapes:
        raise BadArgument("normal takes a tensor of means or of deviations; randn(size, seed=0) takes sizes")
    specs = [value.dtype for value in (bound["mean"], bound["std"]) if isinstance(value, TensorSpec)]
    if len(set(specs)) > 1:
        raise BadArgument(f"normal takes tensors of one dtype, not {' and '.join(specs)}")
    need_real(specs[0], "normal")
    return TensorSpec(broadcast(*shapes), specs[0])


family.declare("t normal(mean: tensor|number, std: tensor|number, seed: int)", _normal, draw, random=True)


def _bernoulli(bound: Bound) -> TensorSpec:
    spec = bound["input"]
    need_floating(spec.dtype, "bernoulli")
    assert isinstance(spec, TensorSpec)
    return spec


family.declare("tm bernoulli(input: tensor, seed: int)", _bernoulli, draw, random=True)


def _dropout(bound: Bound) -> TensorSpec:
    if not 0 <= bound["p"] < 1:
        raise BadArgument(f"dropout: p is {bound['p']}, not from 0 to below 1")
    return _bernoulli(bound)


family.declare("f dropout(input: tensor, p: float = 0.5, seed: int)", _dropout, draw, random=True)


def _multinomial(bound: Bound) -> TensorSpec:
    spec, count = bound["input"], bound["num_samples"]
    need_floating(spec.dtype, "multinomial")
    if len(spec.shape) not in (1, 2):
        raise ShapeMismatch(f"multinomial takes 1 or 2 dimensions, not {list(spec.shape)}")
    if count <= 0 or (not bound["replacement"] and count > spec.shape[-1]):
        raise BadArgument(f"multinomial: {count} of {spec.shape[-1]} can't be drawn without replacement")
    if category(spec.dtype) != 2:
        raise BadArgument("multinomial takes real weights")
    return TensorSpec((*spec.shape[:-1], count), "int64")


family.declare(
    "tm multinomial(input: tensor, num_samples: int, replacement: bool = False, seed: int)",
    _multinomial,
    lambda bound, outputs: (64 * (bound["input"].numel + outputs[0].numel), 24 * bound["input"].numel),
    random=True,
)
