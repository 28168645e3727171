"""Kernels that are more than one call of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..graph.ops import einsum as equations
from ..graph.ops import patterns


def binary(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of two operands, either of which may be a number."""

    def kernel(input: Any, other: Any) -> Any:
        if not isinstance(input, Tensor):
            input = as_operand(input, other)
        return function(input, other)

    return kernel


def as_operand(number: Any, like: Tensor) -> Tensor:
    """A number as a tensor that, like the number, doesn't widen its neighbour."""
    return torch.scalar_tensor(number, dtype=torch.result_type(number, like), device=like.device)


def both(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes two tensors only: numbers become tensors."""

    def kernel(input: Any, other: Any) -> Any:
        if not isinstance(input, Tensor):
            input = as_operand(input, other)
        if not isinstance(other, Tensor):
            other = as_operand(other, input)
        return function(input, other)

    return kernel


def add(input: Any, other: Any, alpha: Any) -> Any:
    return input + (other if alpha == 1 else other * alpha)


def sub(input: Any, other: Any, alpha: Any) -> Any:
    return input - (other if alpha == 1 else other * alpha)


def div(input: Any, other: Any, rounding_mode: str | None) -> Any:
    if rounding_mode is None:
        return input / other
    if not isinstance(input, Tensor):
        input = as_operand(input, other)
    dtype = torch.result_type(input, other)
    if rounding_mode == "trunc" and dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        return _whole_div(input, other)
    return torch.div(input, other, rounding_mode=rounding_mode)


def _whole_div(input: Tensor, other: Any) -> Tensor:
    """The smallest integer by -1 stops the process on x86: -1 goes another way."""
    other = other if isinstance(other, Tensor) else as_operand(other, input)
    negated = other == -1
    quotient = torch.div(input, torch.where(negated, 1, other), rounding_mode="trunc")
    return torch.where(negated, -quotient, quotient)


def clamp(input: Tensor, min: Any, max: Any) -> Tensor:
    if min is None and max is None:
        return input.clone()
    if isinstance(min, Tensor) != isinstance(max, Tensor) and min is not None and max is not None:
        low = min if isinstance(min, Tensor) else torch.scalar_tensor(min, device=input.device)
        high = max if isinstance(max, Tensor) else torch.scalar_tensor(max, device=input.device)
        kind = torch.result_type(input, min), torch.result_type(input, max)
        low, high = low.to(torch.promote_types(*kind)), high.to(torch.promote_types(*kind))
        return torch.clamp(input, low, high)
    return torch.clamp(input, min, max)


def reduced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction whose `dim` None means all of them, `keepdim` included."""

    def kernel(input: Tensor, dim: Any, keepdim: bool = False, **more: Any) -> Any:
        if not dim and dim != 0:
            if not keepdim:
                return function(input, dim=None, **more)
            dim = tuple(range(input.ndim))
        return function(input, dim=dim, keepdim=keepdim, **more)

    return kernel


def spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """A variance or what is made of one; `unbiased` is a correction of 1."""

    def kernel(
        input: Tensor, unbiased: bool, dim: Any = None, keepdim: bool = False, correction: Any = None
    ) -> Any:
        correction = int(unbiased) if correction is None else correction
        dims = dim if dim or dim == 0 else None
        return function(input, dim=dims, correction=correction, keepdim=keepdim)

    return kernel


def prod(input: Tensor, dim: int | None, keepdim: bool, dtype: Any) -> Tensor:
    if dim is not None:
        return torch.prod(input, dim, keepdim, dtype=dtype)
    result = torch.prod(input, dtype=dtype)
    return result.reshape((1,) * input.ndim) if keepdim else result


def count_nonzero(input: Tensor, dim: Any) -> Tensor:
    return torch.count_nonzero(input) if dim is None or dim == () else torch.count_nonzero(input, dim)


def einsum(equation: str, operands: tuple[Tensor, ...]) -> Tensor:
    """Two operands at a time in the order that was costed."""
    plan = equations.plan(equation, [tuple(operand.shape) for operand in operands])
    if len(operands) == 1:
        # One operand may be only permuted; results never share memory unless declared.
        return torch.einsum(plan.steps[0], operands[0]).clone()
    result = operands[0]
    for step, operand in zip(plan.steps, operands[1:], strict=True):
        result = torch.einsum(step, result, operand)
    return result


def rearrange(input: Tensor, pattern: str, sizes: dict[str, int]) -> Tensor:
    plan = patterns.steps(pattern, tuple(input.shape), sizes)
    return input.reshape(plan.split).permute(plan.order).clone().reshape(plan.shape)


def einops_reduce(input: Tensor, pattern: str, reduction: str, sizes: dict[str, int]) -> Tensor:
    plan = patterns.steps(pattern, tuple(input.shape), sizes)
    split = input.reshape(plan.split)
    if plan.reduced:
        split = _REDUCTIONS[reduction](split, plan.reduced)
    return split.permute(plan.order).clone().reshape(plan.shape)


def _product(input: Tensor, dims: tuple[int, ...]) -> Tensor:
    for dim in sorted(dims, reverse=True):
        input = input.prod(dim)
    return input


_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "mean": lambda input, dims: input.mean(dims),
    "sum": lambda input, dims: input.sum(dims),
    "max": lambda input, dims: input.amax(dims),
    "min": lambda input, dims: input.amin(dims),
    "prod": _product,
}


def einops_repeat(input: Tensor, pattern: str, sizes: dict[str, int]) -> Tensor:
    plan = patterns.steps(pattern, tuple(input.shape), sizes)
    result = input.reshape(plan.split).permute(plan.order)
    for at in plan.inserted:
        result = result.unsqueeze(at)
    return result.expand(plan.grown).clone().reshape(plan.shape)


def fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Results that share no memory with the arguments."""

    def kernel(**bound: Any) -> Any:
        result = function(**bound)
        return result.clone() if isinstance(result, Tensor) else tuple(one.clone() for one in result)

    return kernel


def lstsq(A: Tensor, B: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.lstsq(A, B).solution
    return solution


def arange(end: Any, dtype: Any, device: Any, start: Any = 0, step: Any = 1) -> Tensor:
    return torch.arange(start, end, step, dtype=dtype, device=device)


def full_like(input: Tensor, fill_value: Any, dtype: Any) -> Tensor:
    if isinstance(fill_value, Tensor):
        return torch.zeros_like(input, dtype=dtype).copy_(fill_value)
    return torch.full_like(input, fill_value, dtype=dtype)


def pair_loss(function: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of two tensors, broadcast first: torch warns where it does so itself."""

    def kernel(input: Tensor, target: Tensor, **more: Any) -> Any:
        shape = torch.broadcast_shapes(input.shape, target.shape)  # type: ignore[no-untyped-call]
        return function(input.expand(shape), target.expand(shape), **more)

    return kernel


def still_contiguous(input: Tensor) -> Tensor:
    """Raises where `contiguous` made a copy, which what is written later doesn't reach."""
    if not input.is_contiguous():
        raise ValueError(
            "contiguous() made a copy here, and what it was taken of was written since: use it before the write, "
            "or take a copy for certain, with .clone()"
        )
    return input
