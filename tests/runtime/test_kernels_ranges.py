"""Values that a kernel must never see, dtypes, seeds, devices, and errors in plain words."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from interpose import errors
from interpose.graph.values import DTYPES, DType
from interpose.runtime import kernels

M = torch.arange(12.0).reshape(3, 4)
BAD = torch.tensor([0, 9])


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("gather", (M, 1, torch.tensor([[4]]))),
        ("gather", (M, 1, torch.tensor([[-1]]))),
        ("scatter", (M, 0, torch.tensor([[3]]), 1.0)),
        ("scatter_add", (M, 0, torch.tensor([[3]]), M)),
        ("scatter_reduce", (M, 0, torch.tensor([[-2]]), M, "sum")),
        ("index_select", (M, 0, BAD)),
        ("index_add", (M, 0, BAD, M[:2])),
        ("index_copy", (M, 0, BAD, M[:2])),
        ("index_fill", (M, 0, BAD, 1.0)),
        ("take", (M, torch.tensor([12]))),
        ("take_along_dim", (M, torch.tensor([[9]]), 1)),
        ("embedding", (BAD, M)),
        ("one_hot", (BAD, 3)),
        ("nll_loss", (M, torch.tensor([0, 1, 4]))),
        ("cross_entropy", (M, torch.tensor([0, -1, 2]))),
        ("getitem", (M, BAD)),
        ("getitem", (M, (..., BAD))),
        ("getitem", (M, (None, slice(None), [0, -5]))),
        ("getitem", (M, (torch.ones(3, dtype=torch.bool), torch.tensor([7])))),
        ("getitem", (M, 5)),
        ("setitem", (M, BAD, 0.0)),
        ("setitem", (M, (slice(None), torch.tensor(4)), 0.0)),
        ("topk", (M, 9)),
    ],
)
def test_an_index_out_of_range_is_named(name: str, args: tuple[Any, ...]) -> None:
    with pytest.raises((errors.IndexOutOfRange, errors.OpFailed)) as caught:
        kernels.execute(name, args, {})
    if name != "topk":
        assert isinstance(caught.value, errors.IndexOutOfRange)
    assert "/" not in str(caught.value)


def test_ignored_targets_pass() -> None:
    result = kernels.execute("cross_entropy", (M, torch.tensor([0, -100, 2])), {})
    assert isinstance(result, torch.Tensor) and result.isfinite()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("multinomial", (torch.tensor([0.5, -0.1]), 1)),
        ("multinomial", (torch.tensor([0.5, float("nan")]), 1)),
        ("multinomial", (torch.zeros(3), 1)),
        ("multinomial", (torch.tensor([1.0, 0.0]), 2)),
        ("bernoulli", (torch.tensor([1.5]),)),
        ("bernoulli", (torch.tensor([float("nan")]),)),
    ],
)
def test_weights_that_stop_a_gpu_are_refused(name: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(errors.BadArgument):
        kernels.execute(name, args, {"seed": 0})


def test_other_values_that_stop_a_gpu_are_refused() -> None:
    with pytest.raises(errors.BadArgument):
        kernels.execute("quantile", (M, torch.tensor([1.5])), {})
    with pytest.raises(errors.BadArgument):
        kernels.execute("binary_cross_entropy", (M, M), {})


def test_the_smallest_integer_over_minus_one_stops_nothing() -> None:
    code = (
        "import torch; from interpose.runtime import kernels\n"
        "for bits in (8, 16, 32, 64):\n"
        "    dtype = getattr(torch, f'int{bits}')\n"
        "    low = torch.full((9,), torch.iinfo(dtype).min, dtype=dtype)\n"
        "    for other in (-1, torch.full((9,), -1, dtype=dtype)):\n"
        "        for mode in ('trunc', 'floor'):\n"
        "            kernels.execute('div', (low, other), {'rounding_mode': mode})\n"
        "        for name in ('floor_divide', 'remainder', 'fmod'):\n"
        "            kernels.execute(name, (low, other), {})\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dtypes_go_both_ways() -> None:
    assert kernels.TORCH_DTYPES.keys() == DTYPES.keys()
    for name, dtype in kernels.TORCH_DTYPES.items():
        assert kernels.dtype_name(dtype) == name
        assert torch.empty(0, dtype=dtype).element_size() == DTYPES[name]
    with pytest.raises(errors.BadArgument):
        kernels.dtype_name(torch.quint8)


def test_a_seed_decides_and_the_global_state_stays() -> None:
    before = torch.get_rng_state()
    one, same, other = (kernels.execute("randn", (3, 2), {"seed": seed}) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_new_tensors_go_to_the_device_asked_for() -> None:
    for name, args in (("zeros", (2,)), ("arange", (3,)), ("eye", (2,)), ("full", ((2,), 1.0))):
        assert kernels.execute(name, args, {}, device="meta").device.type == "meta"
    assert kernels.execute("zeros", (2,), {"dtype": DType("int8")}).dtype == torch.int8


def test_setitem_leaves_its_argument_alone_and_assign_does_not() -> None:
    target = M.to(torch.float16)
    result = kernels.execute("setitem", (target, (0, slice(1, 3)), torch.tensor([5.0, 6.0])), {})
    assert result[0, 1] == 5 and target[0, 1] == 1
    kernels.assign(target, (torch.tensor([0, 2]), 1), torch.tensor([7.0, 8.0]))
    assert target[:, 1].tolist() == [7, 5, 8]
    with pytest.raises(errors.IndexOutOfRange):
        kernels.assign(target, BAD, 0.0)


def test_what_torch_refuses_is_said_in_its_words() -> None:
    with pytest.raises(errors.OpFailed, match="mm"):
        kernels.execute("mm", (M, M), {})
    with pytest.raises(errors.UnknownOp):
        kernels.execute("as_strided", (M, (1,), (1,)), {})
    with pytest.raises(errors.BadArgument):
        kernels.execute("mul", (M, M.numpy()), {})
