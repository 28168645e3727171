import json
import uuid

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpose.errors import InterposeError, InvalidGraph, InvalidPayload, LimitExceeded, VersionMismatch
from interpose.graph.limits import Limits
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.wire.protocol import JSON
from interpose.wire.submission import Submission, decode_submission, encode_submission, encode_submission_json
from interpose.wire.tensors import encode_tensor

TENSOR = encode_tensor(np.arange(4, dtype=np.float32))
GRAPH = Graph(
    runs=(Run(invokes=(Invoke(rows=((1, 2, 3),)),)),),
    nodes=(
        Node(0, "attachment", args=(TENSOR.sha,)),
        Node(1, "read", point=Point("h.0", "output"), invoke=0),
        Node(2, "save", args=(Ref(1),), invoke=0),
    ),
    attachments={TENSOR.sha: TENSOR.spec},
)
JOB = Submission(
    uuid.uuid4().hex,
    "org/name",
    GRAPH,
    "abc",
    {TENSOR.sha: bytes(TENSOR.data)},
    batching="exclusive",
    timeout_s=5.0,
)


def plain():
    return msgpack.unpackb(encode_submission(JOB))


def test_both_forms_survive():
    assert decode_submission(encode_submission(JOB)) == JOB
    assert decode_submission(encode_submission_json(JOB), content_type=JSON) == JOB


def test_views_of_tensors_are_packed_as_they_are():
    job = Submission(JOB.id, "m", GRAPH, attachments={TENSOR.sha: TENSOR.data})
    assert decode_submission(encode_submission(job)).attachments == {TENSOR.sha: bytes(TENSOR.data)}


def test_an_attachment_may_be_elsewhere():
    body = msgpack.packb({**plain(), "attachments": {}})
    assert decode_submission(body).attachments == {}


def test_another_protocol_says_so():
    with pytest.raises(VersionMismatch, match="upgrade"):
        decode_submission(msgpack.packb({**plain(), "protocol": 2, "news": 1}))


@pytest.mark.parametrize(
    "change",
    [
        {"id": "x"},
        {"id": None},
        {"model": 3},
        {"model": "m" * 300},
        {"revision": 1},
        {"extra": 1},
        {"options": {"batching": "both"}},
        {"options": {"timeout_s": -1}},
        {"options": {"timeout_s": True}},
        {"options": {"priority": 9}},
        {"options": 3},
        {"attachments": [1]},
        {"attachments": {TENSOR.sha: "text"}},
        {"attachments": {TENSOR.sha: b"1234"}},
        {"attachments": {TENSOR.sha: bytes(16)}},
        {"attachments": {"0" * 64: bytes(16)}},
        {"attachments": {"../x": bytes(16)}},
    ],
    ids=repr,
)
def test_malformed_submissions_are_refused(change):
    with pytest.raises(InvalidPayload):
        decode_submission(msgpack.packb({**plain(), **change}))


@pytest.mark.parametrize("change", [{"model": "\ud800"}, {"options": {"timeout_s": 10**400}}], ids=ascii)
def test_what_only_json_can_say_is_refused(change):
    with pytest.raises(InvalidPayload):
        decode_submission(json.dumps({**plain(), "attachments": {}, **change}).encode(), None, JSON)


def test_a_malformed_graph_is_refused():
    with pytest.raises(InvalidGraph):
        decode_submission(msgpack.packb({**plain(), "graph": {"version": 1, "nodes": [{"id": 1}]}}))
    with pytest.raises(InvalidGraph):
        graph = {"version": 1, "attachments": {TENSOR.sha: {"shape": [1], "dtype": ["float32"]}}}
        decode_submission(msgpack.packb({**plain(), "graph": graph}))


def test_limits_come_first():
    with pytest.raises(LimitExceeded, match="payload_bytes"):
        decode_submission(encode_submission(JOB), Limits(payload_bytes=10))
    with pytest.raises(LimitExceeded, match="attachment_bytes"):
        decode_submission(encode_submission(JOB), Limits(attachment_bytes=10))
    with pytest.raises(LimitExceeded, match="nodes"):
        decode_submission(encode_submission(JOB), Limits(nodes=2))


@pytest.mark.parametrize("bomb", [b"\xdc\xff\xff" + b"\x80" * 65535, b"\x91" * 5000, b"\xdd\xff\xff\xff\xff" * 500])
def test_bombs_are_refused(bomb):
    with pytest.raises(InvalidPayload):
        decode_submission(bomb, Limits(nodes=100))


@pytest.mark.parametrize("body", [b"[" * 100_000, b"{}", b"NaN", b'{"a": NaN}', b"\xff", b"9" * 9999, b""])
def test_malformed_json_is_refused(body):
    with pytest.raises(InvalidPayload):
        decode_submission(body, content_type=JSON)


def test_json_is_base64():
    body = {**json.loads(encode_submission_json(JOB)), "attachments": {TENSOR.sha: "not base64!"}}
    with pytest.raises(InvalidPayload):
        decode_submission(json.dumps(body).encode(), content_type=JSON)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(encode_submission(JOB)) - 1), st.integers(0, 255), st.booleans())
def test_every_mutation_is_a_job_or_a_coded_error(where, byte, cut):
    body = encode_submission(JOB)
    body = body[:where] if cut else body[:where] + bytes([byte]) + body[where + 1 :]
    try:
        decode_submission(body)
    except InterposeError as error:
        assert error.code in ("invalid_payload", "invalid_graph", "version_mismatch", "limit_exceeded")
