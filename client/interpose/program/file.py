"""A program's file: JSON that people read, with its tensors in a safetensors file beside it.

The name of the second follows from that of the first, never from what is written in it. Reading imports nothing and
runs nothing; whatever isn't understood is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadArgument, InvalidGraph, InvalidPayload, VersionMismatch
from ..graph.codec import decode_graph, encode_graph
from ..graph.limits import Limits
from ..graph.model import Graph
from ..graph.values import text
from ..wire.fields import Fields, check_sha
from ..wire.tensors import Encoded
from .tensors import read_tensors, write_tensors

FORMAT = 1
MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class Origin:
    """Where a program was recorded.

    Attributes:
        model, revision, dtype, tokenizer: as its manifest says.
        blocks: paths of the model's blocks: what a layer's number means.
        library: version of this library.
    """

    model: str
    revision: str
    dtype: str
    tokenizer: str | None
    blocks: tuple[str, ...]
    library: str


@dataclass(frozen=True)
class Parts:
    """All that a file holds.

    Attributes:
        tensors: key of an attachment -> its content.
        names: save node -> name.
        parameters: name -> key of the attachment that is its default.
    """

    origin: Origin
    graph: Graph
    tensors: Mapping[str, Encoded]
    names: Mapping[int, str]
    parameters: Mapping[str, str]


def plain_form(parts: Parts) -> dict[str, Any]:
    """The JSON form without its hash. Each tensor stands in it by its own."""
    origin = parts.origin
    return {
        "format": FORMAT,
        "library": origin.library,
        "model": origin.model,
        "revision": origin.revision,
        "dtype": origin.dtype,
        "tokenizer": origin.tokenizer,
        "blocks": list(origin.blocks),
        "parameters": dict(parts.parameters),
        "names": {str(node): name for node, name in parts.names.items()},
        "tensors": {key: tensor.sha for key, tensor in parts.tensors.items()},
        "graph": encode_graph(parts.graph),
    }


def content_hash(plain: Mapping[str, Any]) -> str:
    """SHA-256 of the plain form, whatever the order and spacing it was written in."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write(parts: Parts, path: Path) -> None:
    """Raises BadArgument for a name that isn't of a .json file, or whose tensors would go over another's."""
    if path.suffix != ".json":
        raise BadArgument(f"a program is saved as a .json file, not {path.name!r}")
    beside = path.with_suffix(".safetensors")
    if parts.tensors and beside.exists() and not path.exists():
        raise BadArgument(f"{beside.name} is there already, and is no program's; choose another name")
    plain = plain_form(parts)
    document = "".join(_document({"hash": content_hash(plain), **plain}))
    if parts.tensors:
        write_tensors(beside, parts.tensors)
    path.write_text(document, "utf-8")


def _document(plain: Mapping[str, Any]) -> Iterator[str]:
    """JSON with a line for each field, and for each item of the graph's lists."""
    graph = plain["graph"]
    for name, value in plain.items():
        if name != "graph":
            yield f"{'{' if name == 'hash' else ' '}{json.dumps(name)}: {json.dumps(value)},\n"
    yield ' "graph": {\n'
    fields = []
    for name, value in graph.items():
        lines = [json.dumps(item) for item in value] if isinstance(value, list) and value else None
        shown = json.dumps(value) if lines is None else "[\n   " + ",\n   ".join(lines) + "\n  ]"
        fields.append(f"  {json.dumps(name)}: {shown}")
    yield ",\n".join(fields) + "\n }\n}\n"


def read(path: Path, limits: Limits) -> Parts:
    """What a file holds.

    Raises:
        InvalidPayload, InvalidGraph: it isn't a program, or isn't what its hash says.
        VersionMismatch: it has a later format.
        LimitExceeded: it is larger than `limits` allow.
    """
    with path.open("rb") as file:
        body = file.read(MAX_JSON_BYTES + 1)
    if len(body) > MAX_JSON_BYTES:
        raise InvalidPayload(f"{path.name}: a program has at most {MAX_JSON_BYTES:,} bytes beside its tensors")
    try:
        plain = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidPayload(f"{path.name} isn't JSON: {error}") from error
    fields = Fields(plain, f"the program {path.name}")
    told = check_sha(fields.take("hash"), "the program's hash")
    if fields.whole("format") != FORMAT:
        raise VersionMismatch(f"{path.name} is of format {plain['format']}; this version reads {FORMAT}")
    if content_hash({name: value for name, value in plain.items() if name != "hash"}) != told:
        raise InvalidPayload(f"{path.name} isn't what its hash says: it was changed, or is damaged")
    origin = Origin(
        library=fields.text("library", 64),
        model=_told(fields, "model"),
        revision=_told(fields, "revision"),
        dtype=fields.text("dtype", 32),
        tokenizer=None if (sha := fields.maybe("tokenizer")) is None else check_sha(sha, "the tokenizer"),
        blocks=tuple(text(item, "a block's path", 1024) for item in fields.list("blocks", 10_000)),
    )
    parameters, names = fields.mapping("parameters"), fields.mapping("names")
    hashes, graph = fields.mapping("tensors"), decode_graph(fields.take("graph"), limits)
    fields.done()
    for spec in graph.attachments.values():
        limits.check("attachment_bytes", spec.nbytes)
    if hashes.keys() != graph.attachments.keys():
        raise InvalidGraph("the program's tensors aren't those its graph attaches")
    _check_labels(graph, names, parameters)
    tensors = read_tensors(path.with_suffix(".safetensors"), graph.attachments) if hashes else {}
    for key, tensor in tensors.items():
        if tensor.sha != hashes[key]:
            raise InvalidPayload(f"a tensor beside {path.name} isn't what the program says: it was changed")
    return Parts(origin, graph, tensors, {int(node): name for node, name in names.items()}, parameters)


def _told(fields: Fields, name: str) -> str:
    return text(fields.take(name), f"the program's {name}", 256)


def _check_labels(graph: Graph, names: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    if names.keys() != {str(node.id) for node in graph.saves}:
        raise InvalidGraph("the program's names aren't those of its saves")
    if len({text(name, "a save's name") for name in names.values()}) != len(names):
        raise InvalidGraph("two saves of the program have one name")
    for name, key in parameters.items():
        known = isinstance(key, str) and key in graph.attachments
        if not known or not text(name, "a parameter's name", 64).isidentifier():
            raise InvalidGraph("a parameter's name isn't one, or it has no default")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} isn't JSON")
