"""Element by element, operands broadcast: arithmetic, comparison, logic, functions, activations."""

from __future__ import annotations

from ...errors import BadArgument
from ..values import TensorSpec
from .declare import Bound, Family, Outputs, Rule, Work
from .dtypes import as_float, as_real, category, need_floating, result_type
from .shapes import broadcast, dim_of, same, with_size

family = Family()


def _dtype_of(mode: str, operands: list[object]) -> str:
    dtype = result_type(*operands)
    if mode == "bool":
        return "bool"
    if mode == "float":
        return as_float(dtype)
    if mode == "real":
        return as_real(dtype)
    if mode == "power":
        return "int64" if dtype == "bool" else dtype
    if mode == "floating":
        need_floating(dtype, "this function")
    return dtype


def pointwise(mode: str, *skip: str) -> Rule:
    """A rule: operands broadcast; `skip` names parameters that aren't operands.

    `mode` says the dtype: "arith" the operands' common one, "power" the same but bool
    counts, "float" that or float32, "floating" the same but
    integers are refused, "real" that of magnitudes, "bool".
    """

    def rule(bound: Bound) -> TensorSpec:
        operands = [value for name, value in bound.items() if name not in skip]
        shapes = [value.shape for value in operands if isinstance(value, TensorSpec)]
        if not shapes:
            raise BadArgument("at least one operand must be a tensor")
        return TensorSpec(broadcast(*shapes), _dtype_of(mode, operands))

    return rule


def times(flops: int, copies: int = 0) -> Work:
    """Work of so many operations an element, holding so many copies of the result meanwhile."""

    def work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
        return flops * sum(spec.numel for spec in outputs), copies * sum(spec.nbytes for spec in outputs)

    return work


def _unary(places: str, names: str, mode: str, work: Work) -> None:
    lines = "\n".join(f"{places} {name}(input: tensor)" for name in names.split())
    family.declare(lines, pointwise(mode), work)


def _tests(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """A few passes that hold magnitudes and masks of the operands, broadcast."""
    numel = outputs[0].numel
    return 6 * numel, 24 * numel


def _binary(names: str, mode: str, flops: int = 1) -> None:
    lines = "\n".join(f"tm {name}(input: tensor|number, other: tensor|number)" for name in names.split())
    family.declare(lines, pointwise(mode), times(flops))


_unary(
    "tm", "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan asin acos atan sinh cosh", "float", times(16)
)
_unary(
    "tm", "asinh acosh atanh erf erfc erfinv lgamma digamma sinc i0 reciprocal deg2rad rad2deg", "float", times(32)
)
_unary("tmf", "sigmoid tanh", "float", times(16))
_unary("tm", "neg sign sgn ceil floor trunc frac positive bitwise_not", "arith", times(1))
_unary("tm", "square", "power", times(1))
_unary("tm", "abs", "real", times(2))
_unary("tm", "isnan isinf isfinite isposinf isneginf logical_not signbit", "bool", _tests)
_unary("tmf", "relu", "arith", times(1))
_unary("f", "relu6", "arith", times(1))
_unary("f", "softsign tanhshrink", "float", times(24, 1))
_unary("f", "hardsigmoid hardswish silu mish logsigmoid", "floating", times(24, 1))
_unary("tf", "selu", "floating", times(24, 1))

_binary("mul remainder fmod floor_divide maximum minimum fmax fmin", "arith", 2)
_binary("pow", "arith", 32)
_binary("bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift", "arith")
_binary("eq ne lt le gt ge logical_and logical_or logical_xor", "bool")
_binary("atan2 xlogy copysign", "float", 32)
_binary("hypot logaddexp logaddexp2", "floating", 48)
_binary("heaviside", "arith")


def _sum(bound: Bound) -> TensorSpec:
    spec = pointwise("arith", "alpha")(bound)
    assert isinstance(spec, TensorSpec)
    if isinstance(bound["alpha"], float) and category(spec.dtype) < 2:
        raise BadArgument(f"alpha is {bound['alpha']}, and a sum of integers takes an integer")
    return spec


family.declare(
    """
    tm add(input: tensor|number, other: tensor|number, alpha: number = 1)
    tm sub(input: tensor|number, other: tensor|number, alpha: number = 1)
    """,
    _sum,
    times(2, 1),
)


def _div(bound: Bound) -> TensorSpec:
    mode = "float" if bound["rounding_mode"] is None else "arith"
    return pointwise(mode, "rounding_mode")(bound)  # type: ignore[return-value]


family.declare(
    "tm div(input: tensor|number, other: tensor|number, rounding_mode: 'trunc'|'floor'? = None)", _div, times(4, 3)
)
family.declare(
    "tm isclose(input: tensor, other: tensor, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False)",
    pointwise("bool", "rtol", "atol", "equal_nan"),
    _tests,
)


def _isin(bound: Bound) -> TensorSpec:
    elements = bound["elements"]
    return TensorSpec(elements.shape if isinstance(elements, TensorSpec) else (), "bool")


def _isin_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """A comparison of each with each, or both sorted together: the larger."""
    elements, tests = (
        value.numel if isinstance(value, TensorSpec) else 1 for value in (bound["elements"], bound["test_elements"])
    )
    return elements * tests + 64 * (elements + tests), elements * min(tests, 1024) + 64 * (elements + tests)


family.declare(
    "t isin(elements: tensor, test_elements: tensor|number, assume_unique: bool = False, invert: bool = False)",
    _isin,
    _isin_work,
)


def _where(bound: Bound) -> TensorSpec:
    condition, one, other = bound["condition"], bound["input"], bound["other"]
    if condition.dtype not in ("bool", "uint8"):
        raise BadArgument(f"where: the condition is {condition.dtype}, not bool; compare first: x != 0")
    shapes = [value.shape for value in (condition, one, other) if isinstance(value, TensorSpec)]
    return TensorSpec(broadcast(*shapes), result_type(one, other))


family.declare("t where(condition: tensor, input: tensor|number, other: tensor|number)", _where)


def _lerp(bound: Bound) -> TensorSpec:
    shapes = [value.shape for value in bound.values() if isinstance(value, TensorSpec)]
    need_floating(bound["input"].dtype, "lerp")
    return TensorSpec(broadcast(*shapes), bound["input"].dtype)


family.declare("tm lerp(input: tensor, end: tensor, weight: tensor|number)", _lerp, times(4))
family.declare(
    "tm clamp(input: tensor, min: tensor|number? = None, max: tensor|number? = None)",
    pointwise("arith"),
    times(2, 1),
)
family.declare(
    """
    tm addcmul(input: tensor, tensor1: tensor, tensor2: tensor, value: number = 1)
    tm addcdiv(input: tensor, tensor1: tensor, tensor2: tensor, value: number = 1)
    """,
    pointwise("arith", "value"),
    times(4),
)


def like_input(bound: Bound) -> TensorSpec:
    """A rule: shape and dtype of the first argument."""
    spec = bound["input"]
    assert isinstance(spec, TensorSpec)
    return spec


def floating_like_input(bound: Bound) -> TensorSpec:
    """A rule: as the first argument, which must be floating."""
    spec = like_input(bound)
    need_floating(spec.dtype, "this function")
    return spec


family.declare(
    """
    tm round(input: tensor, decimals: int = 0)
    tm nan_to_num(input: tensor, nan: float? = None, posinf: float? = None, neginf: float? = None)
    f threshold(input: tensor, threshold: number, value: number)
    f hardtanh(input: tensor, min_val: number = -1.0, max_val: number = 1.0)
    """,
    like_input,
    times(4),
)
family.declare(
    """
    f gelu(input: tensor, approximate: 'none'|'tanh' = 'none')
    f softplus(input: tensor, beta: number = 1, threshold: number = 20)
    f elu(input: tensor, alpha: number = 1.0)
    tf celu(input: tensor, alpha: number = 1.0)
    f leaky_relu(input: tensor, negative_slope: number = 0.01)
    tmf hardshrink(input: tensor, lambd: number = 0.5)
    f softshrink(input: tensor, lambd: number = 0.5)
    """,
    floating_like_input,
    times(32, 1),
)


def _logit(bound: Bound) -> TensorSpec:
    return TensorSpec(bound["input"].shape, as_float(bound["input"].dtype))


family.declare("tm logit(input: tensor, eps: float? = None)", _logit, times(24))


def _prelu(bound: Bound) -> TensorSpec:
    spec, weight = floating_like_input(bound), bound["weight"]
    if weight.numel != 1:
        same(weight.numel, spec.shape[1] if len(spec.shape) > 1 else 1, "prelu: weights against channels (dim 1)")
    return spec


family.declare("tmf prelu(input: tensor, weight: tensor)", _prelu, times(2))


def _glu(bound: Bound) -> TensorSpec:
    spec = floating_like_input(bound)
    dim = dim_of(bound["dim"], len(spec.shape))
    if not spec.shape or spec.shape[dim] % 2:
        raise BadArgument(f"glu halves dim {dim}, whose size must be even; the shape is {list(spec.shape)}")
    return TensorSpec(with_size(spec.shape, dim, spec.shape[dim] // 2), spec.dtype)


family.declare("f glu(input: tensor, dim: int = -1)", _glu, times(24, 1))


def _copy(bound: Bound) -> TensorSpec:
    target, source = bound["input"], bound["src"]
    if isinstance(source, TensorSpec) and broadcast(target.shape, source.shape) != target.shape:
        raise BadArgument(f"copy: {list(source.shape)} doesn't fit {list(target.shape)}")
    if isinstance(source, TensorSpec) and category(source.dtype) == 3 > category(target.dtype):
        raise BadArgument("copy: complex numbers don't fit real ones")
    return like_input(bound)


family.declare("- copy(input: tensor, src: tensor|number)", _copy)
