"""Every operation on real tensors: what was inferred comes out, and what torch computes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpose.graph import ops
from interpose.graph.values import DType
from interpose.runtime import kernels

sys.path.append(str(Path(__file__).parent.parent / "graph"))
from op_samples import SAMPLES, specs, tensors

CALLS = [(name, at) for name, calls in SAMPLES.items() for at in range(len(calls))]


def test_every_operation_has_a_sample_and_a_kernel() -> None:
    assert SAMPLES.keys() == ops.OPS.keys() == kernels.KERNELS.keys()


@pytest.mark.parametrize(("name", "at"), CALLS)
def test_what_was_inferred_comes_out(name: str, at: int) -> None:
    args, kwargs = SAMPLES[name][at]
    inferred = ops.infer(name, specs(args), specs(kwargs))
    cost = ops.cost(name, specs(args), specs(kwargs))
    result = kernels.execute(name, args, kwargs)
    found = specs(result)
    assert cost is not None
    total = sum(spec.nbytes for spec in (found if isinstance(found, tuple) else (found,)))
    if inferred is ops.UNKNOWN:
        assert cost.out_bytes >= total
    else:
        assert inferred == found
        assert cost.out_bytes == total
    names = ops.outputs_of(ops.OPS[name], specs(args), specs(kwargs))
    assert isinstance(result, tuple) == (names is not None) or name == "getitem"
    assert names in (None, ops.MANY) or len(names) == len(result)
    assert cost.flops >= 0
    assert cost.peak_bytes >= total or (ops.OPS[name].view and cost.peak_bytes == 0)


@pytest.mark.parametrize(("name", "at"), CALLS)
def test_only_views_share_memory(name: str, at: int) -> None:
    args, kwargs = SAMPLES[name][at]
    before = {one.untyped_storage().data_ptr() for one in tensors(args) if one.numel()}
    result = kernels.execute(name, args, kwargs)
    shared = any(one.untyped_storage().data_ptr() in before for one in tensors(result) if one.numel())
    assert not shared or ops.OPS[name].view


HOMES = {
    "torch": torch,
    "torch.Tensor": torch.Tensor,
    "torch.nn.functional": torch.nn.functional,
    "torch.linalg": torch.linalg,
}


def torchly(value: Any) -> Any:
    return kernels.TORCH_DTYPES[value.name] if isinstance(value, DType) else value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "at"), CALLS)
def test_torch_computes_the_same(name: str, at: int) -> None:
    """Under every spelling whose own call takes these arguments."""
    args, kwargs = SAMPLES[name][at]
    op = ops.OPS[name]
    if op.random or not op.spellings:
        return
    ours = kernels.execute(name, args, kwargs)
    compared = 0
    for spelling in op.spellings:
        home, _, short = spelling.rpartition(".")
        function = getattr(HOMES[home], {"getitem": "__getitem__", "setitem": "__setitem__"}.get(short, short))
        if not callable(function):
            function = function.__get__
        try:
            theirs = function(*map(torchly, args), **{key: torchly(value) for key, value in kwargs.items()})
        except (TypeError, RuntimeError, AttributeError):
            continue
        if name == "setitem":
            continue
        compared += 1
        for one, other in zip(tensors(ours), tensors(theirs), strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
    if not compared:
        pytest.skip("torch takes these arguments under no spelling")
