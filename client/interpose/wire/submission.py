"""The body of POST /v1/jobs: one job, with the attachments small enough to travel inside it."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import msgpack

from ..errors import InvalidPayload, VersionMismatch
from ..graph.codec import decode_graph, encode_graph
from ..graph.limits import Limits
from ..graph.model import Graph
from .fields import Fields, check_sha, unpack
from .protocol import JSON, MSGPACK, PROTOCOL
from .tensors import Buffer, check_bytes, digest

Batching: TypeAlias = Literal["auto", "exclusive"]

MAX_JSON_BYTES = 8 << 20
"""JSON is for people and curl; parsed, it takes many times its length."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as it crosses the network.

    Attributes:
        id: 32 lower-case hex digits, chosen by the client, so that a retried POST is the same job.
        revision: the model's revision the graph was recorded against; None takes whatever is served.
        attachments: SHA-256 -> raw bytes. The graph may name more: those were uploaded before.
        batching: "exclusive" runs alone, bitwise as a plain local forward would.
        timeout_s: wall time allowed once it runs; the server's own limit holds besides.
    """

    id: str
    model: str
    graph: Graph
    revision: str | None = None
    attachments: Mapping[str, Buffer] = field(default_factory=dict)
    batching: Batching = "auto"
    timeout_s: float | None = None


def encode_submission(job: Submission) -> bytes:
    """The msgpack body."""
    body: bytes = msgpack.packb(_plain(job))
    return body


def encode_submission_json(job: Submission) -> bytes:
    """The JSON body: attachments as base64."""
    plain = _plain(job)
    plain["attachments"] = {sha: base64.b64encode(data).decode() for sha, data in job.attachments.items()}
    return json.dumps(plain, allow_nan=False).encode()


def _plain(job: Submission) -> dict[str, Any]:
    return {
        "protocol": PROTOCOL,
        "id": job.id,
        "model": job.model,
        "revision": job.revision,
        "graph": encode_graph(job.graph),
        "attachments": dict(job.attachments),
        "options": {"batching": job.batching, "timeout_s": job.timeout_s},
    }


def decode_submission(body: bytes, limits: Limits | None = None, content_type: str = MSGPACK) -> Submission:
    """The job a body stands for, with every attachment inside it checked against its name, dtype and shape.

    Attachments the graph names and the body lacks are for the server to look up.

    Raises:
        InvalidPayload: not a submission.
        InvalidGraph: its graph is malformed.
        VersionMismatch: it speaks another protocol.
        LimitExceeded: larger than `limits` allow.
    """
    limits = limits or Limits()
    limits.check("payload_bytes", len(body))
    fields = Fields(_parse(body, limits, content_type), "a submission")
    protocol = fields.whole("protocol", 0, 2**31)
    if protocol != PROTOCOL:
        raise VersionMismatch(
            f"the client speaks protocol {protocol}, the server {PROTOCOL}; upgrade the older of the two",
            details={"client": protocol, "server": PROTOCOL},
        )
    job = fields.job("id")
    model = fields.text("model")
    revision = fields.maybe("revision")
    if revision is not None and (not isinstance(revision, str) or len(revision) > 256):
        raise fields.wrong("revision", "a text or null")
    options = Fields(fields.maybe("options") or {}, "the options")
    named = options.maybe("batching") or "auto"
    if named not in ("auto", "exclusive"):
        raise options.wrong("batching", "'auto' or 'exclusive'")
    batching: Batching = "exclusive" if named == "exclusive" else "auto"
    timeout_s = options.seconds("timeout_s")
    options.done()
    raw = fields.maybe("attachments") or {}
    graph = decode_graph(fields.take("graph"), limits)
    fields.done()
    attachments = _attachments(raw, graph, limits, from_base64=content_type == JSON)
    return Submission(job, model, graph, revision, attachments, batching, timeout_s)


def _parse(body: bytes, limits: Limits, content_type: str) -> Any:
    if content_type == MSGPACK:
        # Room beyond the limit, so that a graph several times too large is told by how much.
        longest = max(limits.tokens, 16 * limits.nodes, limits.attachments)
        return unpack(body, longest=min(longest, len(body)), containers=min(64 * limits.nodes, len(body)))
    if content_type != JSON:
        raise InvalidPayload(f"a submission is {MSGPACK} or {JSON}, not {content_type[:80]!r}")
    if len(body) > MAX_JSON_BYTES:
        raise InvalidPayload(f"a submission of more than {MAX_JSON_BYTES:,} bytes must be {MSGPACK}")
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidPayload(f"not the JSON expected here: {error}") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} isn't JSON; write {{'float': 'nan'}}, 'inf' or '-inf'")


def _attachments(raw: Any, graph: Graph, limits: Limits, *, from_base64: bool) -> dict[str, bytes]:
    if not isinstance(raw, dict):
        raise InvalidPayload("attachments aren't a map")
    limits.check("attachments", len(raw))
    for spec in graph.attachments.values():
        limits.check("attachment_bytes", spec.nbytes)
    found: dict[str, bytes] = {}
    for name, value in raw.items():
        sha = check_sha(name, "an attachment's name")
        data = _from_base64(value) if from_base64 else value
        if not isinstance(data, bytes):
            raise InvalidPayload("an attachment isn't bytes")
        if sha not in graph.attachments:
            raise InvalidPayload(f"the graph names no attachment {sha}")
        spec = graph.attachments[sha]
        check_bytes(spec, data)
        if digest(spec, data) != sha:
            raise InvalidPayload(f"attachment {sha} doesn't have that SHA-256 with its dtype and shape")
        found[sha] = data
    return found


def _from_base64(value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise InvalidPayload("an attachment isn't base64") from error
