"""A program's file may come from anybody: whatever is wrong with it is refused with a coded error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interpose.errors import (
    BadArgument,
    InterposeError,
    InvalidGraph,
    InvalidPayload,
    LimitExceeded,
    VersionMismatch,
)
from interpose.graph.limits import Limits
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.program import Program
from interpose.program.file import Origin, content_hash
from interpose.wire.tensors import encode_tensor

KEYS = [f"{index:064x}" for index in range(2)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small sound program."""
    tensors = {KEYS[0]: encode_tensor(np.float32(1.5)), KEYS[1]: encode_tensor(np.ones((4, 3), np.float32))}
    nodes = (
        Node(0, "attachment", (KEYS[0],)),
        Node(1, "attachment", (KEYS[1],)),
        Node(2, "mul", (Ref(0), Ref(1))),
        Node(3, "read", point=Point("h.0", "output"), invoke=0),
        Node(4, "save", (Ref(2),)),
    )
    specs = {key: tensor.spec for key, tensor in tensors.items()}
    graph = Graph((Run("trace", (Invoke(((1, 2),)),)),), nodes, specs)
    origin = Origin("tiny", "r1", "float32", None, ("h.0",), "0.1.0")
    return Program(origin, graph, tensors, {4: "x"}, {"scale": KEYS[0]}).save(tmp_path / "x.json")


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any], *, rehash: bool = True) -> None:
    plain = json.loads(path.read_text())
    change(plain)
    if rehash:
        plain["hash"] = content_hash({name: value for name, value in plain.items() if name != "hash"})
    path.write_text(json.dumps(plain))


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(plain: Any) -> None:
        for key in keys[:-1]:
            plain = plain[key]
        plain[keys[-1]] = value

    return change


def test_it_is_sound(path: Path) -> None:
    program = Program.load(path)
    assert program.parameters == {"scale": KEYS[0]}
    rewrite(path, lambda plain: None)
    assert Program.load(path).hash == program.hash


CHANGES: list[tuple[Callable[[dict[str, Any]], Any], type[InterposeError]]] = [
    (put("format", value=2), VersionMismatch),
    (put("format", value="1"), InvalidPayload),
    (put("extra", value=1), InvalidPayload),
    (lambda plain: plain.pop("graph"), InvalidPayload),
    (put("graph", value=[]), InvalidGraph),
    (put("graph", "version", value=99), InvalidGraph),
    (put("graph", "nodes", 2, "op", value=["mul"]), InvalidGraph),
    (put("graph", "nodes", 2, "args", value=[{"ref": 9}]), InvalidGraph),
    (put("graph", "nodes", 2, "args", value=[{"call": "os.system"}]), InvalidGraph),
    (put("names", value={}), InvalidGraph),
    (put("names", value={"4": "x", "3": "y"}), InvalidGraph),
    (put("names", value={"4": ["x"]}), InvalidGraph),
    (put("names", value=None), InvalidPayload),
    (put("parameters", value={"a b": KEYS[0]}), InvalidGraph),
    (put("parameters", value={"a": "0" * 63 + "7"}), InvalidGraph),
    (put("parameters", value={"a": [KEYS[0]]}), InvalidGraph),
    (put("tensors", value={}), InvalidGraph),
    (put("tensors", KEYS[0], value="0" * 64), InvalidPayload),
    (put("tensors", KEYS[0], value="../../etc/passwd"), InvalidPayload),
    (put("tensors", "../secret", value="0" * 64), InvalidGraph),
    (put("graph", "attachments", "../secret", value={"shape": [], "dtype": "float32"}), InvalidGraph),
    (put("graph", "attachments", KEYS[0], "shape", value=[1 << 40]), LimitExceeded),
    (put("graph", "attachments", KEYS[0], "shape", value=[2]), InvalidPayload),
    (put("graph", "attachments", KEYS[0], "dtype", value="int32"), InvalidPayload),
    (put("graph", "attachments", KEYS[0], "dtype", value="object"), InvalidGraph),
    (put("blocks", value="h.0"), InvalidPayload),
    (put("blocks", value=[1]), InvalidGraph),
    (put("model", value="m" * 1000), InvalidGraph),
    (put("tokenizer", value="/etc/passwd"), InvalidPayload),
]


@pytest.mark.parametrize(("change", "error"), CHANGES)
def test_what_is_malformed_is_refused(
    path: Path, change: Callable[[dict[str, Any]], Any], error: type[InterposeError]
) -> None:
    rewrite(path, change)
    with pytest.raises(error):
        Program.load(path)


def test_printing_sends_nothing_to_the_terminal(path: Path) -> None:
    rewrite(path, put("model", value="\x1b]0;mine\x07"))
    rewrite(path, put("names", value={"4": "x\n\x1b[2J"}))
    lines = str(Program.load(path)).split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(lines) == 8


def test_a_changed_program_is_found_out(path: Path) -> None:
    rewrite(path, put("graph", "nodes", 2, "op", value="add"), rehash=False)
    with pytest.raises(InvalidPayload, match="isn't what its hash says"):
        Program.load(path)
    rewrite(path, put("hash", value=None), rehash=False)
    with pytest.raises(InvalidPayload, match="hash"):
        Program.load(path)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"hash": NaN}', b"[" * 100_000, b"\xff\xfe", b"9" * 9999, b"null", b"cos\nsystem\n."],
)
def test_other_files_are_refused(path: Path, body: bytes) -> None:
    path.write_bytes(body)
    with pytest.raises(InvalidPayload):
        Program.load(path)


def test_limits_hold(path: Path) -> None:
    with pytest.raises(LimitExceeded):
        Program.load(path, Limits(nodes=4))
    with pytest.raises(LimitExceeded):
        Program.load(path, Limits(attachment_bytes=40))
    with path.open("r+b") as file:
        file.truncate(65 << 20)
    with pytest.raises(InvalidPayload, match="at most"):
        Program.load(path)


def test_every_byte_counts(path: Path) -> None:
    """Any change of either file is refused, or changes nothing that is read."""
    sound = Program.load(path)
    chance = random.Random(0)
    for name in (path, path.with_suffix(".safetensors")):
        body = name.read_bytes()
        for _ in range(400):
            at = chance.randrange(len(body))
            name.write_bytes(body[:at] + bytes([chance.randrange(256)]) + body[at + 1 :])
            try:
                assert Program.load(path).hash == sound.hash
            except InterposeError:
                pass
        for cut in (0, 7, 8, len(body) // 2, len(body) - 3):
            name.write_bytes(body[:cut])
            with pytest.raises(InterposeError):
                Program.load(path)
        name.write_bytes(body)


def header(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    other = {"dtype": "F32", "shape": [4, 3], "data_offsets": [4, 52]}
    text = json.dumps({KEYS[0]: entry | changes, KEYS[1]: other}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "body",
    [
        header() + bytes(51),
        header() + bytes(53),
        header(data_offsets=[4, 8]) + bytes(52),
        header(data_offsets=[-4, 0]) + bytes(52),
        header(data_offsets=[0, 4.0]) + bytes(52),
        header(data_offsets=[0, 1 << 60]) + bytes(52),
        header(data_offsets=[False, 4]) + bytes(52),
        header(dtype="I32") + bytes(52),
        header(shape=[1]) + bytes(52),
        (1 << 63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
)
def test_tensors_that_do_not_fit_are_refused(path: Path, body: bytes) -> None:
    path.with_suffix(".safetensors").write_bytes(body)
    with pytest.raises(InvalidPayload):
        Program.load(path)


def test_other_tensors_of_the_same_shape_are_found_out(path: Path) -> None:
    path.with_suffix(".safetensors").write_bytes(header() + bytes(52))
    with pytest.raises(InvalidPayload, match="it was changed"):
        Program.load(path)


def test_saving_goes_over_no_other_tensors(path: Path, tmp_path: Path) -> None:
    program = Program.load(path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(BadArgument, match="is there already"):
        program.save(tmp_path / "model.json")
    with pytest.raises(BadArgument, match=r"a \.json file"):
        program.save(tmp_path / "model.pt")
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    assert program.save(path) == path
