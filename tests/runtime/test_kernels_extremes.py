"""Every operation with arguments pushed to extremes: refused, or done as inferred. Nothing stops the process."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interpose.errors import GraphError
from interpose.graph import ops
from interpose.runtime import kernels

sys.path.append(str(Path(__file__).parent.parent / "graph"))
from op_samples import SAMPLES, specs

NUMBERS = (-(2**63), 2**63 - 1, 2**31, -7, 0, 1e308, float("nan"), float("inf"), -1.0)
DTYPES = (torch.complex64, torch.bfloat16, torch.bool, torch.uint8, torch.float8_e4m3fn)


def pushed(value: Any) -> Iterator[Any]:
    """Variants of an argument that nobody sane would pass."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from NUMBERS
    elif isinstance(value, torch.Tensor):
        yield value.reshape(-1)[:0]
        yield value.unsqueeze(0)
        yield from (value.to(dtype) for dtype in DTYPES)
        if value.is_floating_point():
            yield from (torch.full_like(value, number) for number in (float("nan"), float("inf"), 0.0))
        if value.dtype == torch.int64:
            yield from (torch.full_like(value, number) for number in (-(2**63), 2**63 - 1, -1))
    elif isinstance(value, (list, tuple)):
        yield type(value)()
        for at, item in enumerate(value):
            yield from (type(value)([*value[:at], other, *value[at + 1 :]]) for other in pushed(item))
    elif value is None:
        yield 2**63 - 1


def calls(name: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    for args, kwargs in SAMPLES[name]:
        for at, arg in enumerate(args):
            yield from (((*args[:at], other, *args[at + 1 :]), kwargs) for other in pushed(arg))
        for key, arg in kwargs.items():
            yield from ((args, {**kwargs, key: other}) for other in pushed(arg))
        for signature in ops.OPS[name].signatures:
            for param in signature.params[len(args) :]:
                if not param.required and param.name not in kwargs:
                    yield from ((args, {**kwargs, param.name: other}) for other in pushed(param.default))


@pytest.mark.parametrize("name", list(SAMPLES))
def test_extremes_are_refused_or_done_as_inferred(name: str) -> None:
    every = list(calls(name))
    for args, kwargs in random.Random(name).sample(every, min(len(every), 40)):
        try:
            inferred = ops.infer(name, specs(args), specs(kwargs))
            cost = ops.cost(name, specs(args), specs(kwargs))
            assert cost is not None
            if cost.peak_bytes > 1 << 26 or cost.flops > 1 << 30:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = kernels.execute(name, args, kwargs)
        except GraphError:
            continue
        assert inferred is ops.UNKNOWN or inferred == specs(result), (args, kwargs)
