"""Which function computes which operation. Functions of torch are found by the table's own spellings only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..graph.ops import OPS, Op
from ..graph.ops.convert import NAMED
from ..wire.torch_tensors import TORCH
from . import kernels_index as index
from . import kernels_random as random
from . import kernels_special as special

Kernel = Callable[..., Any]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PLACED = _words(
    "zeros ones full arange linspace logspace eye tril_indices triu_indices randn rand randint randperm"
)
"""Operations that make a tensor from nothing, and take the device."""

_BY_POSITION = _words(
    "view view_as reshape reshape_as expand expand_as unfold contiguous type_as repeat tile permute "
    "cpu masked_select flip unflatten take_along_dim broadcast_to atleast_1d atleast_2d atleast_3d"
)
"""Called with arguments by position, as methods and some functions want it."""

_FIRST = {
    **dict.fromkeys(("isin", "bucketize", "searchsorted", "new_zeros", "new_ones", "linalg_solve_triangular"), 2),
    **dict.fromkeys(("where", "tensor_split", "new_full"), 3),
    **dict.fromkeys(("linalg_eigh", "linalg_eigvalsh", "linalg_pinv", "linalg_matrix_rank"), 1),
    "scatter": 4,
    "one_hot": 2,
    "squeeze": 1,
    "eye": 1,
}
"""So many arguments go by position, since torch has several names for them; the others by name, unless None."""

_OPERANDS = _words(
    "mul remainder fmod floor_divide pow bitwise_and bitwise_or bitwise_xor bitwise_left_shift "
    "bitwise_right_shift eq ne lt le gt ge xlogy"
)
"""Two operands, the first a tensor for torch."""

_TENSORS_ONLY = _words(
    "maximum minimum fmax fmin atan2 copysign hypot logaddexp logaddexp2 heaviside "
    "logical_and logical_or logical_xor"
)
"""Two operands, both tensors for torch."""

_REDUCTIONS = _words("sum nansum mean nanmean all any")
_LOSSES = _words("mse_loss l1_loss smooth_l1_loss huber_loss kl_div")

_HOMES: Mapping[str, Any] = {
    "torch": torch,
    "torch.Tensor": Tensor,
    "torch.nn.functional": functional,
    "torch.linalg": torch.linalg,
}


def build() -> dict[str, Kernel]:
    """One kernel for each operation of the table."""
    table = {name: _plain(op) for name, op in OPS.items() if name not in _SPECIAL}
    return table | _SPECIAL


def _named(op: Op) -> Kernel:
    """torch's function of the operation's first spelling."""
    home, _, name = op.spellings[0].rpartition(".")
    found: Kernel = getattr(_HOMES[home], name)
    return found


def _plain(op: Op) -> Kernel:
    function = _named(op)
    if op.name in _BY_POSITION:
        return lambda **bound: function(*bound.values())
    if op.name in _FIRST:
        return _first(function, _FIRST[op.name])
    if op.name in _OPERANDS:
        return special.binary(function)
    if op.name in _TENSORS_ONLY:
        return special.both(function)
    if op.name in _REDUCTIONS:
        return special.reduced(function)
    if op.name in _LOSSES:
        return special.pair_loss(function)
    return function


def _first(function: Kernel, count: int) -> Kernel:
    def kernel(**bound: Any) -> Any:
        values = list(bound.values())[:count]
        named = {name: value for name, value in list(bound.items())[count:] if value is not None}
        return function(*values, **named)

    return kernel


def _converted(dtype: torch.dtype) -> Kernel:
    return lambda input: input.to(dtype)


def _to(
    input: Tensor, dtype: Any = None, other: Any = None, non_blocking: bool = False, copy: bool = False
) -> Tensor:
    return input.to(dtype if other is None else other.dtype, copy=copy)


def _starred(function: Kernel) -> Kernel:
    return lambda tensors: function(*tensors)


def _norm(input: Tensor, p: Any, dim: Any, keepdim: bool, dtype: Any) -> Tensor:
    order = 2 if p in ("fro", None) else p
    result: Tensor = torch.linalg.vector_norm(input, order, dim or None, keepdim, dtype=dtype)
    return result


_SPECIAL: dict[str, Kernel] = {
    **{name: _converted(TORCH[dtype]) for name, dtype in NAMED.items()},
    "add": special.add,
    "sub": special.sub,
    "div": special.div,
    "clamp": special.clamp,
    "positive": lambda input: input.clone(),
    "to": _to,
    "type": lambda input, dtype: input.to(dtype),
    "T": lambda input: input.permute(tuple(range(input.ndim - 1, -1, -1))),
    "mT": lambda input: input.mT,
    "still_contiguous": special.still_contiguous,
    "copy": index.copy,
    "getitem": index.getitem,
    "setitem": index.setitem,
    "rot90": index.rot90,
    "prod": special.prod,
    "count_nonzero": special.count_nonzero,
    **{name: special.spread(function) for name, function in (("std", torch.std), ("var", torch.var))},
    "std_mean": special.spread(torch.std_mean),
    "var_mean": special.spread(torch.var_mean),
    "norm": _norm,
    "linalg_vector_norm": lambda x, ord, dim, keepdim, dtype: _norm(x, ord, dim, keepdim, dtype),
    "einsum": special.einsum,
    "rearrange": special.rearrange,
    "einops_reduce": special.einops_reduce,
    "einops_repeat": special.einops_repeat,
    "meshgrid": lambda tensors, indexing: tuple(
        one.clone() for one in torch.meshgrid(*tensors, indexing=indexing or "ij")
    ),
    "broadcast_tensors": special.fresh(_starred(torch.broadcast_tensors)),
    "cartesian_prod": special.fresh(_starred(torch.cartesian_prod)),
    "block_diag": _starred(torch.block_diag),
    "lstsq": special.lstsq,
    "arange": special.arange,
    "full_like": special.full_like,
    "randn": random.randn,
    "rand": random.rand,
    "randint": random.randint,
    "randperm": random.randperm,
    "randn_like": random.randn_like,
    "rand_like": random.rand_like,
    "randint_like": random.randint_like,
    "normal": random.normal,
    "bernoulli": random.bernoulli,
    "dropout": random.dropout,
    "multinomial": random.multinomial,
}
