from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpose.errors import InvalidPayload, UnknownJob
from interpose.graph.values import TensorSpec
from interpose.wire.messages import (
    Ack,
    Chunk,
    Hello,
    Loading,
    Log,
    Position,
    Refused,
    Save,
    Status,
    Subscribe,
    Unsubscribe,
    chunks,
    decode_client,
    decode_server,
    encode,
    encode_chunk,
)
from interpose.wire.status import TRANSITIONS, JobStatus

JOB = "0123456789abcdef" * 2
SAVE = Save(
    JOB, 2, 1, 7, {"tuple": [{"tensor": 0}, {"tensor": 1}]}, (TensorSpec((2,), "int16"), TensorSpec((), "bool"))
)
CLIENT = [Subscribe(JOB), Subscribe(JOB, 3, 2**40), Subscribe(JOB, apart=1 << 20), Unsubscribe(JOB), Ack(JOB)]
SERVER = [
    Hello(),
    Status(JOB, 1, 0, JobStatus.QUEUED),
    Status(JOB, 9, 2, JobStatus.FAILED, {"code": "op_failed", "message": "no", "node": 3}),
    SAVE,
    replace(SAVE, apart=True),
    Log(JOB, 3, 1, 4, "hello"),
    Position(JOB, 12),
    Loading(JOB, "cold"),
    Refused.of(UnknownJob("gone"), JOB),
    Refused.of(UnknownJob("gone")),
]


def frame(plain):
    return b"\0" + msgpack.packb(plain)


@pytest.mark.parametrize("message", CLIENT, ids=repr)
def test_client_messages_survive(message):
    assert decode_client(encode(message)) == message


@pytest.mark.parametrize("message", SERVER, ids=repr)
def test_server_messages_survive(message):
    assert decode_server(encode(message)) == message


def test_frames_are_as_written_down():
    assert msgpack.unpackb(encode(Subscribe(JOB, 3, 4))[1:]) == {
        "type": "subscribe",
        "job": JOB,
        "after": 3,
        "offset": 4,
        "apart": 0,
    }
    assert encode(SAVE)[0] == 0
    assert msgpack.unpackb(encode(SAVE)[1:])["nbytes"] == 5
    head = b"\1" + bytes.fromhex(JOB) + b"\0\0\0\2" + b"\0\0\0\0\0\0\1\0"
    assert encode_chunk(JOB, 2, 256, b"xyz") == head + b"xyz"
    assert decode_server(head + b"xyz") == Chunk(JOB, 2, 256, memoryview(b"xyz"))


def test_errors_keep_their_class():
    found = decode_server(encode(Refused.of(UnknownJob("gone", node=3, details={"a": 1}), JOB)))
    assert isinstance(found, Refused)
    error = found.exception()
    assert (type(error), error.message, error.node, error.details) == (UnknownJob, "gone", 3, {"a": 1})


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=4), st.integers(0, 60), st.integers(1, 9))
def test_chunks_cover_what_is_left_exactly(parts, offset, size):
    whole, at = b"".join(parts), offset
    for raw in chunks(JOB, 2, parts, offset, size):
        chunk = decode_server(raw)
        assert isinstance(chunk, Chunk)
        assert chunk.offset == at
        assert 0 < chunk.data.nbytes <= size
        assert chunk.data == whole[at : at + chunk.data.nbytes]
        at += chunk.data.nbytes
    assert at == max(offset, len(whole))


def test_chunks_of_any_view():
    import numpy as np

    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert b"".join(raw[29:] for raw in chunks(JOB, 1, [memoryview(array), memoryview(np.zeros((0, 3)))])) == (
        array.tobytes()
    )


STATUS = {"type": "status", "job": JOB, "seq": 1, "attempt": 0, "status": "queued"}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0",
        b"\2abc",
        b"\1" + bytes(27),
        b"\0\xc1",
        b"\0" + b"\x91" * 3000,
        b"\0\xdd\xff\xff\xff\xff",
        b"\0\xdf\xff\xff\xff\xff",
        b"\0\xc7\x05\x01hello",
        frame([]),
        frame({}),
        frame({"type": "nonsense"}),
        frame({"type": ["status"]}),
        frame({**STATUS, "extra": 1}),
        frame({**STATUS, "seq": 0}),
        frame({**STATUS, "seq": True}),
        frame({**STATUS, "seq": 1.0}),
        frame({**STATUS, "seq": 2**32}),
        frame({**STATUS, "job": JOB.upper()}),
        frame({**STATUS, "job": JOB + "\n"}),
        frame({**STATUS, "job": "../../etc/passwd"}),
        frame({**STATUS, "status": "QUEUED"}),
        frame({**STATUS, "status": None}),
        frame({**STATUS, "error": "text"}),
        frame({"type": "hello", "protocol": 1, "chunk_bytes": 0}),
        frame({"type": "hello", "protocol": 1, "chunk_bytes": 2**40}),
        frame({**SAVE.to_plain(), "type": "save", "nbytes": 6}),
        frame({**SAVE.to_plain(), "type": "save", "tensors": "ab"}),
        encode(SAVE)[:-1],
        encode(SAVE) + b"\0",
    ],
)
def test_malformed_server_frames_are_refused(raw):
    with pytest.raises(InvalidPayload):
        decode_server(raw)


@pytest.mark.parametrize(
    "raw",
    [
        "text",
        encode_chunk(JOB, 1, 0, b"x"),
        encode(Hello()),
        frame({"type": "subscribe", "job": JOB}),
        frame({"type": "subscribe", "job": JOB, "after": -1, "offset": 0}),
        frame({"type": "ack", "job": None}),
        frame({"type": "ack", "job": JOB, "deep": [[[]]] * 40}),
    ],
)
def test_malformed_client_frames_are_refused(raw):
    with pytest.raises(InvalidPayload):
        decode_client(raw)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
def test_random_bytes_are_messages_or_refused(raw):
    for decode in (decode_client, decode_server):
        for prefix in (b"", b"\0", b"\1"):
            try:
                decode(prefix + raw)
            except InvalidPayload:
                pass


def test_a_short_body_cannot_blow_up():
    bomb = {"type": "log", "x": [[[]] * 1000] * 1000}
    with pytest.raises(InvalidPayload, match="lists and maps"):
        decode_server(frame(bomb))


def test_states():
    assert JobStatus.QUEUED in TRANSITIONS[JobStatus.RUNNING]
    assert JobStatus.COMPLETED not in TRANSITIONS[JobStatus.QUEUED]
    assert [status for status in JobStatus if status.terminal] == ["completed", "failed", "cancelled"]
