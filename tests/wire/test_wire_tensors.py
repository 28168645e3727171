import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpose.errors import BadArgument, InvalidPayload
from interpose.graph.values import DTYPES, TensorSpec
from interpose.wire.tensors import NUMPY, decode_spec, decode_tensor, digest, encode_tensor, spec_of
from interpose.wire.torch_tensors import TORCH

specs = st.builds(
    TensorSpec,
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.sampled_from(sorted(DTYPES)),
)


@settings(max_examples=200, deadline=None)
@given(specs, st.data())
def test_any_bytes_survive_both_libraries(spec, data):
    raw = data.draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes))
    if spec.dtype == "bool":
        raw = bytes(byte & 1 for byte in raw)
    for backend in ("torch", "numpy"):
        built = decode_tensor(spec, raw, backend)
        assert tuple(built.shape) == spec.shape
        assert built.dtype == (TORCH if backend == "torch" else NUMPY)[spec.dtype]
        again = encode_tensor(built)
        assert again.spec == spec
        assert bytes(again.data) == raw


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_both_libraries_agree_on_the_bytes(name):
    values = torch.tensor([[0, 1, 1], [1, 0, 2]]).to(TORCH[name])
    array = np.array([[0, 1, 1], [1, 0, 2]]).astype(NUMPY[name])
    assert encode_tensor(values).sha == encode_tensor(array).sha


def test_bytes_are_as_written_down():
    encoded = encode_tensor(torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16))
    assert bytes(encoded.data) == b"\x80\x3f\x00\xc0"
    assert encoded.sha == hashlib.sha256(b"bfloat16 1,2\n\x80\x3f\x00\xc0").hexdigest()
    assert encode_tensor(torch.tensor(7)).sha == hashlib.sha256(b"int64 \n\x07" + bytes(7)).hexdigest()
    assert bytes(encode_tensor(np.array([1, 2], ">i4")).data) == b"\1\0\0\0\2\0\0\0"


def test_dtype_and_shape_are_part_of_the_identity():
    same = [(shape, dtype) for shape, dtype in itertools.product([(4,), (2, 2)], ["int32", "float32"])]
    assert len({digest(TensorSpec(shape, dtype), bytes(16)) for shape, dtype in same}) == 4


def test_encoding_a_contiguous_tensor_copies_nothing():
    tensor, array = torch.zeros(8), np.zeros(8, np.float32)
    for owner in (tensor, array):
        view = encode_tensor(owner).data
        owner[0] = 1.0
        assert bytes(view[:4]) == b"\0\0\x80\x3f"


def test_decoding_a_writable_buffer_copies_nothing():
    for backend in ("torch", "numpy"):
        buffer = bytearray(8)
        built = decode_tensor(TensorSpec((2,), "float32"), buffer, backend)
        built[1] = 1.0
        assert buffer == b"\0\0\0\0\0\0\x80\x3f"


def test_awkward_tensors_arrive_as_their_values():
    base = torch.arange(6.0).reshape(2, 3)
    odd = torch.tensor([1 + 2j, 3 - 4j])
    awkward = [base.T, base[:, ::2], base.requires_grad_(), odd.conj(), odd.conj().imag, torch.nn.Parameter(odd)]
    for tensor in awkward:
        encoded = encode_tensor(tensor)
        built = decode_tensor(encoded.spec, bytes(encoded.data), "torch")
        assert torch.equal(built, tensor.detach().resolve_conj().resolve_neg())
        assert not built.requires_grad


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, device="meta"),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, dtype=torch.uint16),
        torch.zeros([1] * 17),
        np.array(["text"]),
        np.array([object()]),
        np.zeros(2, "datetime64[s]"),
        [1.0],
    ],
    ids=["meta", "sparse", "uint16", "17 dims", "text", "object", "datetime", "list"],
)
def test_what_has_no_wire_form_is_refused(value):
    with pytest.raises(BadArgument, match=r"can't be sent|isn't a tensor"):
        encode_tensor(value)


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize(
    ("spec", "raw"),
    [
        (TensorSpec((2,), "float32"), bytes(7)),
        (TensorSpec((2,), "float32"), bytes(9)),
        (TensorSpec((2**20, 2**20, 2**20), "float32"), b""),
        (TensorSpec((0, 2**40, 2**40), "float32"), b""),
        (TensorSpec((1,) * 17, "uint8"), b"\0"),
        (TensorSpec((1,), "object"), bytes(8)),
        (TensorSpec((2,), "bool"), b"\1\2"),
    ],
)
def test_bytes_that_are_not_the_tensor_are_refused(spec, raw, backend):
    with pytest.raises(InvalidPayload):
        decode_tensor(spec, raw, backend)


@pytest.mark.parametrize(
    "plain",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "shape": [-1]},
        {"dtype": "float32", "shape": [True]},
        {"dtype": "float32", "shape": [2.0]},
        {"dtype": "float32", "shape": [2**41]},
        {"dtype": "float32", "shape": [2**30, 2**30]},
        {"dtype": "float32", "shape": [1] * 17},
        {"dtype": "torch.float32", "shape": []},
        {"dtype": ["float32"], "shape": []},
        {"dtype": "float32", "shape": [], "device": "cuda"},
        ["float32", []],
        None,
    ],
)
def test_malformed_specs_are_refused(plain):
    with pytest.raises(InvalidPayload):
        decode_spec(plain)


def test_specs_in_headers():
    assert spec_of("float32", "2,3") == TensorSpec((2, 3), "float32")
    assert spec_of("int64", "") == TensorSpec((), "int64")
    for shape in ("2,", "-1", "1e3", "٣", "2;3", "9" * 16, ",".join(["1"] * 17)):
        with pytest.raises(InvalidPayload):
            spec_of("float32", shape)
