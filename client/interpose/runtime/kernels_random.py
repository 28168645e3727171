"""Kernels that draw, each from a generator of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _generator(seed: int, device: torch.device | str | None) -> torch.Generator:
    return torch.Generator(device or "cpu").manual_seed(seed)


def randn(size: Any, seed: int, dtype: Any = None, device: Any = None) -> Tensor:
    return torch.randn(size, generator=_generator(seed, device), dtype=dtype, device=device)


def rand(size: Any, seed: int, dtype: Any = None, device: Any = None) -> Tensor:
    return torch.rand(size, generator=_generator(seed, device), dtype=dtype, device=device)


def randint(high: int, size: Any, seed: int, low: int = 0, dtype: Any = None, device: Any = None) -> Tensor:
    generator = _generator(seed, device)
    return torch.randint(low, high, size, generator=generator, dtype=dtype or torch.int64, device=device)


def randperm(n: int, seed: int, dtype: Any = None, device: Any = None) -> Tensor:
    return torch.randperm(n, generator=_generator(seed, device), dtype=dtype or torch.int64, device=device)


def randn_like(input: Tensor, seed: int, dtype: Any = None) -> Tensor:
    return randn(input.shape, seed, dtype or input.dtype, input.device)


def rand_like(input: Tensor, seed: int, dtype: Any = None) -> Tensor:
    return rand(input.shape, seed, dtype or input.dtype, input.device)


def randint_like(input: Tensor, high: int, seed: int, low: int = 0, dtype: Any = None) -> Tensor:
    return randint(high, input.shape, seed, low, dtype or input.dtype, input.device)


def normal(mean: Any, std: Any, seed: int) -> Tensor:
    one = mean if isinstance(mean, Tensor) else std
    return torch.normal(mean, std, generator=_generator(seed, one.device))


def bernoulli(input: Tensor, seed: int) -> Tensor:
    return torch.bernoulli(input, generator=_generator(seed, input.device))


def dropout(input: Tensor, p: float, seed: int) -> Tensor:
    kept = rand(input.shape, seed, torch.float32, input.device) >= p
    return input * kept / (1 - p)


def multinomial(input: Tensor, num_samples: int, replacement: bool, seed: int) -> Tensor:
    return torch.multinomial(input, num_samples, replacement, generator=_generator(seed, input.device))
