"""The body of GET /v1/jobs/{id}/result in msgpack: all saves of a completed job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from ..errors import InvalidPayload
from ..graph.values import TensorSpec
from .fields import Fields, unpack
from .protocol import PROTOCOL
from .tensors import Backend, Buffer, check_bytes, decode_spec, decode_tensor, encode_spec
from .trees import Tree, unflatten


@dataclass(frozen=True, slots=True)
class Saved:
    """One saved value: its tree, and each tensor's meaning and bytes."""

    node: int
    tree: Tree
    specs: tuple[TensorSpec, ...]
    parts: tuple[Buffer, ...]

    def value(self, backend: Backend) -> Any:
        """The nest of tensors or arrays. Raises InvalidPayload if tree or bytes are malformed."""
        tensors = [decode_tensor(spec, part, backend) for spec, part in zip(self.specs, self.parts, strict=True)]
        return unflatten(self.tree, tensors)


def encode_result(saves: Sequence[Saved]) -> bytes:
    body: bytes = msgpack.packb({"protocol": PROTOCOL, "saves": [_encode_saved(saved) for saved in saves]})
    return body


def _encode_saved(saved: Saved) -> dict[str, Any]:
    tensors = [{**encode_spec(spec), "data": part} for spec, part in zip(saved.specs, saved.parts, strict=True)]
    return {"node": saved.node, "tree": saved.tree, "tensors": tensors}


def decode_result(body: Buffer) -> Mapping[int, Saved]:
    """Saves by node. Raises InvalidPayload."""
    fields = Fields(unpack(body, longest=1 << 20, containers=1 << 22), "a result")
    protocol, saves = fields.whole("protocol"), fields.list("saves", 1 << 20)
    if protocol != PROTOCOL:
        raise InvalidPayload(f"a result of protocol {protocol}")
    fields.done()
    return {saved.node: saved for saved in map(_decode_saved, saves)}


def _decode_saved(plain: Any) -> Saved:
    fields = Fields(plain, "a save")
    node, tree, tensors = fields.whole("node"), fields.take("tree"), fields.list("tensors", 1 << 17)
    fields.done()
    specs, parts = [], []
    for tensor in tensors:
        if not isinstance(tensor, dict) or not isinstance(data := tensor.pop("data", None), bytes):
            raise InvalidPayload("a tensor of a save has no data")
        specs.append(decode_spec(tensor))
        check_bytes(specs[-1], data)
        parts.append(data)
    return Saved(node, tree, tuple(specs), tuple(parts))
