"""The table itself: closed, complete, refusing what it should, and quick to import."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from interpose import errors
from interpose.graph import ops
from interpose.graph.ops import UNKNOWN
from interpose.graph.values import DType, Ref, TensorSpec

X = TensorSpec((2, 3, 4), "float32")
M = TensorSpec((3, 4), "float32")
IDS = TensorSpec((3,), "int64")


def test_importing_the_table_needs_no_torch() -> None:
    code = "import sys, interpose.graph.ops; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_spellings_and_in_place_names_lead_to_operations() -> None:
    assert set(ops.SPELLINGS.values()) <= ops.OPS.keys()
    assert set(ops.INPLACE.values()) <= ops.OPS.keys()
    assert all(name.endswith("_") for name in ops.INPLACE)


HOSTILE = (
    "as_strided set_ resize_ storage untyped_storage data empty empty_like new_empty empty_strided item "
    "tolist numpy apply_ map_ from_file load save eval exec __getattr__ __class__ __reduce_ex__ getattr _base "
    "is_set_to register_hook requires_grad_ backward to_sparse share_memory_ pin_memory cuda vmap manual_seed "
    "set_default_dtype frombuffer from_dlpack data_ptr narrow_copy_ add_ fill_ copy_ zero_ rsub "
    "sparse_coo_tensor compile"
)


@pytest.mark.parametrize("name", [*HOSTILE.split(), "", "torch.add", "add ", "Add", "аdd", "x" * 10_000])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(errors.UnknownOp) as caught:
        ops.lookup(name)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", [None, 3, ["add"], ("add",), {"add": 1}, b"add"])
def test_names_that_are_no_text_are_refused(name: Any) -> None:
    with pytest.raises(errors.UnknownOp):
        ops.lookup(name)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(errors.UnknownOp, match="softmax"):
        ops.lookup("sofmax")
    with pytest.raises(errors.UnknownOp, match="save"):
        ops.lookup("item")


@pytest.mark.parametrize("name", list(ops.OPS))
def test_no_operation_takes_a_device_an_output_or_a_callable(name: str) -> None:
    for signature in ops.OPS[name].signatures:
        assert not {param.name for param in signature.params} & {"device", "out", "generator", "layout"}
    strange = (
        print,
        object(),
        {"a": 1},
        b"x",
        type,
        float("nan"),
        [[[]]],
        "\x00",
        2**70,
        Ref(0),
        UNKNOWN,
        DType("int8"),
    )
    for value in strange:
        for args in ((value,), (X, value), (X, M, value)):
            with_errors(name, args)


def with_errors(name: str, args: tuple[Any, ...]) -> None:
    """Whatever is asked ends in a result or a coded error."""
    for ask in (ops.infer, ops.cost):
        try:
            ask(name, args, {})
        except errors.GraphError as error:
            assert len(str(error)) < 2000


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "says"),
    [
        ("softmax", (X,), {}, "dim is missing"),
        ("softmax", (X, "last"), {}, "dim takes an integer"),
        ("softmax", (X, True), {}, "dim takes an integer"),
        ("mean", (3,), {}, "input takes a tensor"),
        ("add", (X, M), {"out": X}, "results always are new values"),
        ("zeros", (3,), {"device": "cuda"}, "where the model is"),
        ("randn", (3,), {}, "seed"),
        ("one_hot", (IDS,), {}, "num_classes"),
        ("relu", (X,), {"inplace": True}, "write it"),
        ("gelu", (X, "fast"), {}, "'none' or 'tanh'"),
        ("cat", (X,), {}, "a list of tensors"),
        ("getitem", (X, "key"), {}, "an index"),
        ("getitem", (X, (..., ...)), {}, "an index"),
        ("mul", (2, 3), {}, "a tensor"),
        ("mean", (IDS,), {}, "x.float"),
        ("where", (M, M, M), {}, "not bool"),
        ("einsum", ("ij,jk", M), {}, "2 tensors"),
        ("einsum", ("i!->i", M), {}, "isn't an equation"),
        ("rearrange", (X, "a b c d -> a"), {}, "dims"),
        ("rearrange", (X, "(a -> a"), {}, "parentheses"),
        ("matmul", (M, TensorSpec((4, 2), "float16")), {}, "one dtype"),
    ],
)
def test_wrong_arguments_are_named(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises((errors.BadArgument, errors.ShapeMismatch)) as caught:
        ops.infer(name, args, kwargs)
    assert says in str(caught.value)


def test_what_torchs_own_wrappers_pass_along_is_dropped() -> None:
    args = ops.bind(ops.lookup("softmax"), (X,), {"dim": -1, "_stacklevel": 3, "dtype": None})
    assert args == {"input": X, "dim": -1, "dtype": None}
    assert ops.bind(ops.lookup("sum"), (X,), {"axis": 1, "keepdims": True})["dim"] == (1,)


def test_arguments_bind_the_same_however_they_are_written() -> None:
    view = ops.lookup("view")
    assert ops.bind(view, (X, 6, 4), {}) == ops.bind(view, (X, (6, 4)), {}) == ops.bind(view, (X, [6, 4]), {})


def test_outputs_depend_on_the_signature() -> None:
    largest = ops.lookup("max")
    assert ops.outputs_of(largest, (X,), {}) is None
    assert ops.outputs_of(largest, (X, 0), {}) == ("values", "indices")
    assert ops.outputs_of(largest, (X, X), {}) is None
    assert ops.lookup("topk").outputs == ("values", "indices")
    assert ops.lookup("chunk").outputs == ops.MANY


def test_a_tuple_is_indexed_by_an_integer() -> None:
    assert ops.infer("getitem", ((X, M), 1), {}) == M
    assert ops.infer("getitem", ((X, UNKNOWN), 1), {}) is UNKNOWN
    with pytest.raises(errors.IndexOutOfRange):
        ops.infer("getitem", ((X, M), 2), {})


@pytest.mark.parametrize(
    ("name", "args", "low", "high"),
    [
        ("matmul", (X, TensorSpec((2, 4, 5), "float32")), 2 * 2 * 3 * 4 * 5, 300),
        ("linalg_svdvals", (TensorSpec((500, 500), "float32"),), 4 * 500**3 // 3, 10**10),
        ("matrix_power", (TensorSpec((100, 100), "float32"), 2**30), 2 * 30 * 100**3, 10**9),
        ("conv1d", (TensorSpec((1, 1, 10**6), "float32"), TensorSpec((1, 1, 10**5), "float32")), 10**11, 10**12),
        ("kron", (TensorSpec((10**4,), "float32"),) * 2, 10**8, 10**9),
        ("isin", (TensorSpec((10**5,), "int64"),) * 2, 10**6, 10**11),
    ],
)
def test_small_results_show_the_work_they_hide(name: str, args: tuple[Any, ...], low: int, high: int) -> None:
    cost = ops.cost(name, args, {})
    assert cost is not None and low <= cost.flops <= high


def test_copies_that_a_view_hides_are_counted() -> None:
    wide = ops.infer("expand", (TensorSpec((1,), "float32"), 10**12), {})
    assert isinstance(wide, TensorSpec)
    view = ops.cost("expand", (TensorSpec((1,), "float32"), 10**12), {})
    copy = ops.cost("reshape", (wide, 10**6, 10**6), {})
    assert view is not None and (view.peak_bytes, view.kept_bytes) == (0, 0)
    assert copy is not None and copy.peak_bytes >= 4 * 10**12
    look = ops.cost("getitem", (X, (slice(None), -1)), {})
    pick = ops.cost("getitem", (X, (slice(None), [0, 1])), {})
    assert look is not None and look.kept_bytes == 0
    assert pick is not None and pick.kept_bytes == pick.out_bytes > 0


def test_a_slice_with_computed_ends_counts_as_the_whole_dimension() -> None:
    index = (slice(None, UNKNOWN), slice(TensorSpec((), "int64"), None))
    result, cost = ops.measure("getitem", (M, index), {})
    assert result is UNKNOWN and cost is not None and cost.out_bytes == M.nbytes


def test_sizes_known_only_by_value_have_a_bound() -> None:
    mask = TensorSpec((3, 4), "bool")
    assert ops.infer("getitem", (M, mask), {}) is UNKNOWN
    for name, args in (("getitem", (M, mask)), ("masked_select", (M, mask)), ("nonzero", (M,))):
        cost = ops.cost(name, args, {})
        assert cost is not None and cost.out_bytes >= M.nbytes
