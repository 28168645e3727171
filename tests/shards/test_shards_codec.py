"""Nests of tensors as bytes: the same values, strides, objects and wishes for gradients beyond the wire."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
import torch
from interpose.errors import BadArgument, InvalidPayload
from interpose.runtime.split.route import ArgumentRef, BlockCall, CacheRef, Mail, Visit
from interpose_server.shards.codec import Opening, pack

BASE = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))

KEPT = {
    "plain": BASE,
    "transposed": BASE.transpose(0, 2),
    "expanded": BASE[:, :1].expand(3, 7, 5),
    "mask": torch.ones(1, 1, 4, 4, dtype=torch.bool).expand(2, 3, 4, 4),
    "with gaps": BASE[:, ::2],
    "inner slice": BASE[..., 1:4],
    "no dimensions": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "bfloat16": BASE.bfloat16(),
    "bfloat16, transposed": BASE.bfloat16().mT,
    "float8": BASE.to(torch.float8_e4m3fn),
    "ids": torch.arange(7),
}
COMPACTED = {"one in five": BASE[..., 0], "overlapping": BASE.unfold(1, 2, 1), "flipped": BASE.flip(0)}


def sent(nest: Any) -> Any:
    packed = pack(nest)
    opening = Opening(packed.head, 1 << 30)
    for buffer, view in zip(opening.buffers(), [view for view in packed.tensors if view.nbytes], strict=True):
        buffer[:] = view
    return opening.nest()


@pytest.mark.parametrize("name", [*KEPT, *COMPACTED])
def test_a_tensor_arrives_as_it_was(name: str) -> None:
    tensor = (KEPT | COMPACTED)[name]
    found = sent(tensor)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found.float(), tensor.float())
    assert name in COMPACTED or found.stride() == tensor.stride()
    assert found.data_ptr() % 64 == 0 or not found.numel()


def test_repetitions_do_not_travel() -> None:
    assert pack(torch.ones(1, 1, 9).expand(50, 7, 9)).tensors[0].nbytes == 36


def test_the_same_tensor_travels_once_and_is_one_again() -> None:
    mask = torch.ones(4)
    nest = {"a": mask, "b": (mask, [mask]), "c": Mail(2, ("x", 1), {"v": mask})}
    assert len(pack(nest).tensors) == 1
    found = sent(nest)
    assert found["a"] is found["b"][0] is found["b"][1][0] is found["c"].value["v"]


def test_wishes_for_gradients_arrive_and_graphs_do_not() -> None:
    wanted = (BASE.clone().requires_grad_() * 2)[:, :2]
    found, other = sent((wanted, BASE))
    assert found.requires_grad
    assert found.is_leaf
    assert not other.requires_grad


def test_plain_values_keep_their_types() -> None:
    nest = [
        None,
        True,
        1,
        -(2**63),
        1.5,
        float("inf"),
        "text",
        b"bytes",
        (),
        [()],
        {"k": [1, (2,)]},
        1 << 70,
        -(1 << 200),
        1 << 70,
        -(1 << 200),
        CacheRef(4),
        ArgumentRef(5),
    ]
    found = sent(nest)
    assert found == nest
    assert [type(one) for one in found] == [type(one) for one in nest]


def test_visits_arrive_whole() -> None:
    calls = (BlockCall("h.0", (None, 3), {"cache": CacheRef(1)}), BlockCall("h.1", (), {}))
    visit = Visit(2, calls, {"w": 1}, attention=True, grad=False, adapter="french")
    assert sent(visit) == visit


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, 2**300, torch.float32, slice(1), torch.zeros(2, device="meta")]
)
def test_nothing_else_is_sent(value: Any) -> None:
    with pytest.raises(BadArgument):
        pack([value])


def form(**changed: Any) -> bytes:
    plain = {"dtype": "float32", "shape": [2, 3], "strides": None, "flags": 0} | changed
    body = msgpack.packb(msgpack.ExtType(1, msgpack.packb(changed.pop("number", 0))))
    return msgpack.packb([body, [[plain[name] for name in ("dtype", "shape", "strides", "flags")]]])


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "object"},
        {"shape": [1 << 30, 1 << 30]},
        {"shape": [-1]},
        {"shape": "23"},
        {"strides": [1]},
        {"strides": [1, 1]},
        {"strides": [1 << 39, 1]},
        {"flags": None},
        {"number": 1},
    ],
)
def test_malformed_tensors_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(InvalidPayload):
        Opening(form(**changed), 1 << 20).nest()


@pytest.mark.parametrize("head", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb([b"", 3]), form()[:-3]])
def test_malformed_heads_are_refused(head: bytes) -> None:
    with pytest.raises(InvalidPayload):
        Opening(head, 1 << 20).nest()


def test_tensors_beyond_the_bound_are_refused_before_memory_is_taken() -> None:
    with pytest.raises(InvalidPayload, match="more than"):
        Opening(form(shape=[1 << 36]), 1 << 20)
