"""Tensors in a safetensors file: read strictly, since the file may come from anybody."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadArgument, InvalidPayload
from ..graph.values import TensorSpec
from ..wire.tensors import SAFETENSORS, Encoded, check_bytes

MAX_HEADER = 1 << 22
"""Bytes of the file's own description."""


def write_tensors(path: Path, tensors: Mapping[str, Encoded]) -> None:
    """Raises BadArgument for a dtype the format doesn't have."""
    header: dict[str, Any] = {}
    start = 0
    for name, tensor in tensors.items():
        spec = tensor.spec
        if spec.dtype not in SAFETENSORS:
            raise BadArgument(f"a {spec.dtype} tensor can't be kept in a safetensors file; convert it in the block")
        end = start + spec.nbytes
        header[name] = {"dtype": SAFETENSORS[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.data)


def read_tensors(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, Encoded]:
    """The tensors of a file that holds exactly these. Nothing is read before the sizes agree.

    Raises:
        InvalidPayload: it holds others, or isn't a safetensors file.
    """
    with path.open("rb") as file:
        whole = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if whole < 8 or not 0 < length <= min(MAX_HEADER, whole - 8):
            raise InvalidPayload(f"{path.name} isn't a safetensors file")
        offsets = _offsets(file.read(length), specs, path.name)
        expected = 0
        for name, (start, end) in sorted(offsets.items(), key=lambda item: item[1]):
            if start != expected or end - start != specs[name].nbytes:
                raise InvalidPayload(f"{path.name}: tensors overlap, leave gaps, or aren't of their shapes")
            expected = end
        if whole != 8 + length + expected:
            raise InvalidPayload(f"{path.name} holds {whole - 8 - length:,} bytes of tensors, not {expected:,}")
        found = {}
        for name, (start, end) in offsets.items():
            file.seek(8 + length + start)
            data = file.read(end - start)
            check_bytes(specs[name], data)
            found[name] = Encoded(specs[name], memoryview(data))
    return found


def _offsets(text: bytes, specs: Mapping[str, TensorSpec], file: str) -> dict[str, tuple[int, int]]:
    """Where each tensor lies, its dtype and shape being the expected ones."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidPayload(f"{file} has no safetensors header") from error
    if not isinstance(header, dict) or header.keys() - {"__metadata__"} != specs.keys():
        raise InvalidPayload(f"{file} doesn't hold the program's tensors")
    found = {}
    for name, spec in specs.items():
        entry = header[name]
        meaning = {"dtype": SAFETENSORS.get(spec.dtype), "shape": list(spec.shape)}
        if not isinstance(entry, dict) or {key: entry.get(key) for key in meaning} != meaning:
            raise InvalidPayload(f"{file}: a tensor isn't {spec.dtype}{list(spec.shape)}, as the program says")
        match entry.get("data_offsets"):
            case [int(start), int(end)] if type(start) is type(end) is int and 0 <= start <= end:
                found[name] = start, end
            case _:
                raise InvalidPayload(f"{file}: a tensor's place isn't a pair of whole numbers")
    return found
