"""What torch calls the operations, and which in-place methods stand for which."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .table import OPS

_ALIASES = {
    "torch.": "absolute:abs negative:neg subtract:sub multiply:mul divide:div true_divide:div greater:gt "
    "greater_equal:ge less:lt less_equal:le not_equal:ne clip:clamp concat:cat concatenate:cat arccos:acos "
    "arcsin:asin arctan:atan arctan2:atan2 arccosh:acosh arcsinh:asinh arctanh:atanh fix:trunc "
    "inverse:linalg_inv pinverse:linalg_pinv det:linalg_det slogdet:linalg_slogdet qr:linalg_qr cross:linalg_cross "
    "cholesky:linalg_cholesky rms_norm:rms_norm layer_norm:layer_norm group_norm:group_norm "
    "scatter_reduce:scatter_reduce broadcast_to:broadcast_to",
    "torch.Tensor.": "absolute:abs negative:neg subtract:sub multiply:mul divide:div true_divide:div greater:gt "
    "greater_equal:ge less:lt less_equal:le not_equal:ne clip:clamp arccos:acos arcsin:asin arctan:atan "
    "arctan2:atan2 arccosh:acosh arcsinh:asinh arctanh:atanh fix:trunc inverse:linalg_inv pinverse:linalg_pinv "
    "det:linalg_det slogdet:linalg_slogdet qr:linalg_qr cross:linalg_cross cholesky:linalg_cholesky "
    "argwhere:argwhere",
    "torch.nn.functional.": "tanh:tanh sigmoid:sigmoid",
    "torch.special.": "expit:sigmoid exp2:exp2 expm1:expm1 erf:erf erfc:erfc erfinv:erfinv log1p:log1p "
    "softmax:softmax log_softmax:log_softmax logsumexp:logsumexp logit:logit round:round sinc:sinc xlogy:xlogy "
    "digamma:digamma psi:digamma gammaln:lgamma i0:i0",
    "torch.linalg.": "vecdot:vecdot matmul:matmul diagonal:diagonal",
}

_NOT_ALIASES = {"torch.linalg.vecdot", "torch.linalg.diagonal", "torch.qr", "torch.Tensor.qr"}
"""Spellings whose arguments or defaults differ from the operation's."""


def _spellings() -> dict[str, str]:
    table = {spelling: op.name for op in OPS.values() for spelling in op.spellings}
    for place, pairs in _ALIASES.items():
        for pair in pairs.split():
            alias, _, name = pair.partition(":")
            if place + alias not in _NOT_ALIASES:
                table.setdefault(place + alias, name)
    return table


SPELLINGS: Mapping[str, str] = MappingProxyType(_spellings())
"""torch's dotted name -> operation: "torch.nn.functional.softmax" -> "softmax"."""

_SPECIAL = {
    "zero_": "zeros_like",
    "fill_": "full_like",
    "copy_": "copy",
    "multiply_": "mul",
    "divide_": "div",
    "true_divide_": "div",
    "subtract_": "sub",
    "negative_": "neg",
    "absolute_": "abs",
    "clip_": "clamp",
    "greater_": "gt",
    "greater_equal_": "ge",
    "less_": "lt",
    "less_equal_": "le",
    "not_equal_": "ne",
}

_WITH_INPLACE = (
    "abs acos acosh add addbmm addcdiv addcmul addmm addmv addr asin asinh atan atan2 atanh baddbmm bernoulli "
    "bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil clamp copysign "
    "cos cosh cumprod cumsum deg2rad digamma div eq erf erfc erfinv exp exp2 expm1 floor floor_divide fmod frac "
    "ge gt heaviside hypot i0 index_add index_copy index_fill le lerp lgamma log log10 log1p log2 "
    "logical_and logical_not logical_or logical_xor logit lt masked_fill mul nan_to_num ne neg pow rad2deg "
    "reciprocal relu remainder round rsqrt scatter scatter_add scatter_reduce sgn sigmoid sign sin "
    "sinc sinh sqrt square sub tan tanh tril triu trunc xlogy"
)

INPLACE: Mapping[str, str] = MappingProxyType(
    {f"{name}_": name for name in _WITH_INPLACE.split()} | _SPECIAL,
)
"""In-place method -> the operation whose result is written over the tensor.

The result has the operation's dtype; writing it keeps the tensor's own, as `x[...] = result` does.
"""

OPERATORS: Mapping[str, str] = MappingProxyType(
    {
        "add": "add",
        "sub": "sub",
        "mul": "mul",
        "truediv": "div",
        "floordiv": "floor_divide",
        "mod": "remainder",
        "pow": "pow",
        "matmul": "matmul",
        "and": "bitwise_and",
        "or": "bitwise_or",
        "xor": "bitwise_xor",
        "lshift": "bitwise_left_shift",
        "rshift": "bitwise_right_shift",
    }
)
"""Python's operators of two operands, by the middle of their methods' names -> operation."""
