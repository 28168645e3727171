"""Shape rules against torch, on arguments nobody chose: both agree, or both refuse."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from interpose.errors import GraphError, IndexOutOfRange
from interpose.graph import ops
from interpose.graph.values import DTYPES, TensorSpec
from interpose.runtime import kernels

sys.path.append(str(Path(__file__).parent))
from op_samples import specs, tensors

FAST = settings(max_examples=300, deadline=None)
SIZES = st.integers(0, 4)
SHAPES = st.lists(SIZES, max_size=4).map(tuple)
DIM = st.integers(-5, 4)
FLOATS = ("float16", "bfloat16", "float32", "float64")
ARITHMETIC = (*FLOATS, "bool", "uint8", "int8", "int16", "int32", "int64", "complex64", "complex128")


def tensor(shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
    return torch.ones(shape, dtype=kernels.TORCH_DTYPES[dtype])


def agree(name: str, *args: Any, **kwargs: Any) -> None:
    """The rule gives what the kernel gives, and refuses what it refuses."""
    try:
        inferred: Any = ops.infer(name, specs(args), specs(kwargs))
    except GraphError as error:
        inferred = error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = kernels.execute(name, args, kwargs)
    except GraphError as error:
        # Only the kernel sees the positions in an index tensor.
        by_value = isinstance(error, IndexOutOfRange) and "index" in error.details
        # Nor does a rule know how many places a mask selects, which must fit the lists beside it.
        by_value |= name == "setitem" and any(one.dtype == torch.bool for one in tensors(args[1]))
        assert isinstance(inferred, GraphError) or inferred is ops.UNKNOWN or by_value, (
            f"only torch refuses: {error}"
        )
        return
    if isinstance(inferred, GraphError):
        # torch lets nonsense through where nothing is computed, down to tensors of size [0, -1].
        if not any(one.numel() == 0 for one in (*tensors(args), *tensors(result))):
            raise AssertionError("only the rule refuses") from inferred
        return
    if inferred is ops.UNKNOWN:
        cost = ops.cost(name, specs(args), specs(kwargs))
        assert cost is not None and cost.out_bytes >= specs(result).nbytes
    else:
        assert inferred == specs(result)


@FAST
@given(st.sampled_from(ARITHMETIC), st.sampled_from(ARITHMETIC), SHAPES, SHAPES)
def test_tensors_promote_and_broadcast(
    one: str, other: str, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    # torch has a dtype for this that has no wire meaning.
    assume({one, other}.isdisjoint({"float16"}) or {one, other}.isdisjoint({"complex64", "complex128"}))
    agree("mul", tensor(first, one), tensor(second, other))


@FAST
@given(st.sampled_from(ARITHMETIC), st.sampled_from([(), (2,)]), st.sampled_from([True, 3, 2.5]), st.booleans())
def test_numbers_promote(dtype: str, shape: tuple[int, ...], number: float, swapped: bool) -> None:
    pair = (number, tensor(shape, dtype)) if swapped else (tensor(shape, dtype), number)
    agree("mul", *pair)
    agree("where", torch.ones(2, dtype=torch.bool), *pair)
    if dtype not in ("complex64", "complex128"):
        agree("eq", *pair)
        agree("div", *pair)
    if dtype not in ("bool", "complex64", "complex128"):
        agree("pow", *pair)


def test_every_dtype_converts() -> None:
    for dtype in DTYPES:
        agree("zeros", 2, dtype=ops_dtype(dtype))


def ops_dtype(name: str) -> Any:
    from interpose.graph.values import DType

    return DType(name)


ITEMS = st.one_of(
    st.integers(-4, 3),
    st.none(),
    st.just(...),
    st.slices(4).filter(lambda one: one.step is None or one.step > 0),
    st.lists(st.integers(-2, 2), max_size=3),
    st.tuples(st.lists(st.integers(1, 3), max_size=2), st.integers(-2, 2)).map(
        lambda one: torch.full(one[0], one[1])
    ),
    st.lists(st.integers(0, 3), max_size=2).map(lambda shape: torch.ones(shape, dtype=torch.bool)),
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=4).map(tuple), st.lists(ITEMS, max_size=5).map(tuple))
def test_getitem_follows_torch(shape: tuple[int, ...], items: tuple[Any, ...]) -> None:
    agree("getitem", tensor(shape), items)


@settings(max_examples=600, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=3).map(tuple), st.lists(ITEMS, max_size=4).map(tuple), SHAPES)
def test_setitem_follows_torch(shape: tuple[int, ...], items: tuple[Any, ...], value: tuple[int, ...]) -> None:
    masked = any(isinstance(item, torch.Tensor) and item.dtype == torch.bool for item in items)
    agree("setitem", tensor(shape), items, 1.0 if masked else tensor(value))


@FAST
@given(SHAPES, st.one_of(st.none(), DIM, st.lists(DIM, max_size=3).map(tuple)), st.booleans())
def test_reductions_follow_torch(shape: tuple[int, ...], dim: Any, keepdim: bool) -> None:
    for name in ("sum", "mean", "amax", "std", "norm"):
        agree(name, tensor(shape), dim=dim, keepdim=keepdim)
    if type(dim) is int:
        for name in ("max", "argmin", "prod", "median", "cumsum", "softmax", "sort", "unbind"):
            agree(name, tensor(shape), dim)


@FAST
@given(SHAPES, st.lists(st.integers(-1, 6), max_size=4).map(tuple))
def test_sizes_follow_torch(shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    for name in ("view", "reshape", "expand", "repeat", "permute"):
        agree(name, tensor(shape), wanted)


@FAST
@given(SHAPES, DIM, DIM, st.integers(-4, 4))
def test_dims_follow_torch(shape: tuple[int, ...], one: int, other: int, number: int) -> None:
    agree("transpose", tensor(shape), one, other)
    agree("flatten", tensor(shape), one, other)
    agree("diagonal", tensor(shape), number, one, other)
    agree("select", tensor(shape), one, number)
    agree("narrow", tensor(shape), one, number, abs(other))
    agree("movedim", tensor(shape), one, other)
    for name in ("squeeze", "unsqueeze"):
        agree(name, tensor(shape), one)
    for name in ("chunk", "split", "tensor_split"):
        agree(name, tensor(shape), number, one)
    agree("topk", tensor(shape), number, one)
    agree("roll", tensor(shape), number, one)


@FAST
@given(SHAPES, SHAPES)
def test_products_follow_torch(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    for name in ("matmul", "mm", "bmm", "mv", "dot", "inner", "kron"):
        agree(name, tensor(one), tensor(other))
    agree("cdist", tensor(one), tensor(other))


@FAST
@given(st.lists(SHAPES, min_size=1, max_size=3), DIM)
def test_joining_follows_torch(shapes: list[tuple[int, ...]], dim: int) -> None:
    made = [tensor(shape) for shape in shapes]
    for name in ("cat", "stack"):
        agree(name, made, dim)
    for name in ("hstack", "vstack", "dstack", "column_stack", "block_diag"):
        agree(name, made)


TERMS = st.lists(st.sampled_from(["i", "j", "k", "..."]), max_size=3).map("".join)


@settings(max_examples=800, deadline=None)
@given(st.lists(st.tuples(TERMS, SHAPES), min_size=1, max_size=3), st.one_of(st.none(), TERMS))
def test_einsum_follows_torch(operands: list[tuple[str, tuple[int, ...]]], output: str | None) -> None:
    equation = ",".join(term for term, _ in operands) + ("" if output is None else f"->{output}")
    made = [tensor(shape) for _, shape in operands]
    agree("einsum", equation, *made)
    try:
        theirs = torch.einsum(equation, *made)
    except (RuntimeError, ValueError):
        return
    assert specs(theirs) == ops.infer("einsum", (equation, *map(specs, made)), {})


@FAST
@given(SHAPES, st.lists(st.integers(0, 3), max_size=4).map(tuple), DIM)
def test_gather_follows_torch(shape: tuple[int, ...], index: tuple[int, ...], dim: int) -> None:
    positions = torch.zeros(index, dtype=torch.int64)
    agree("gather", tensor(shape), dim, positions)
    agree("index_select", tensor(shape), dim, positions)
    agree("scatter", tensor(shape), dim, positions, 2.0)
    agree("take_along_dim", tensor(shape), positions, dim)


@FAST
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=3).map(tuple),
    *(st.integers(1, 4) for _ in range(4)),
    st.integers(0, 2),
    st.booleans(),
)
def test_windows_follow_torch(
    shape: tuple[int, ...], kernel: int, stride: int, out: int, dilation: int, padding: int, ceil: bool
) -> None:
    weight = tensor((out, shape[-2], kernel))
    agree("conv1d", tensor(shape), weight, None, stride, padding, dilation)
    agree("avg_pool1d", tensor(shape), kernel, stride, padding, ceil)
    agree("max_pool1d", tensor(shape), kernel, stride, padding, dilation, ceil)


@FAST
@given(SHAPES, st.lists(st.integers(-1, 2), max_size=6), st.sampled_from(["constant", "reflect", "replicate"]))
def test_padding_follows_torch(shape: tuple[int, ...], pad: list[int], mode: str) -> None:
    agree("pad", tensor(shape), pad, mode)


def test_unknown_inputs_give_unknown_results() -> None:
    assert ops.infer("mul", (ops.UNKNOWN, 2), {}) is ops.UNKNOWN
    assert ops.infer("cat", ([ops.UNKNOWN, TensorSpec((2,), "float32")],), {}) is ops.UNKNOWN
    assert ops.cost("mul", (ops.UNKNOWN, 2), {}) is None
    known = TensorSpec((2, 3), "float32")
    assert ops.infer("setitem", (known, (ops.UNKNOWN,), ops.UNKNOWN), {}) == known
