import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpose.errors import InvalidPayload, JobCancelled, LimitExceeded, OpFailed, UnknownJob
from interpose.graph.values import TensorSpec
from interpose.wire.messages import Hello, Log, Position, Refused, Save, Status, Subscribe, chunks, decode_server
from interpose.wire.result import Saved
from interpose.wire.status import JobStatus
from interpose.wire.stream import Changed, JobStream, Logged, Moved, OutOfStep, Received

JOB = "ab" * 16
SPECS = (TensorSpec((5,), "uint8"), TensorSpec((0,), "float32"), TensorSpec((3,), "int16"))
RAW = [bytes([1, 2, 3, 4, 5]), b"", bytes([6, 0, 7, 0, 8, 0])]
TREE = [{"tensor": 0}, {"tensor": 1}, {"tensor": 2}]


def status(seq, name, attempt=1, error=None):
    return Status(JOB, seq, attempt, JobStatus(name), error)


def save(seq, node=7, attempt=1):
    return Save(JOB, seq, attempt, node, TREE, SPECS)


def pieces(seq, offset=0, size=4):
    return [decode_server(raw) for raw in chunks(JOB, seq, RAW, offset, size)]


def conversation():
    return [status(1, "queued", 0), status(2, "running"), save(3), *pieces(3), status(4, "completed")]


def feed(stream, messages):
    return [event for message in messages for event in stream.feed(message)]


def values(stream, node=7):
    return [part.tolist() for part in stream.saves[node].value("numpy")]


def test_a_job_from_beginning_to_end():
    stream = JobStream(JOB)
    events = feed(stream, [Hello(), Position(JOB, 2), *conversation()])
    assert [type(event) for event in events] == [Moved, Changed, Changed, *[Received] * 4, Saved, Changed]
    assert [event.received for event in events if isinstance(event, Received)] == [4, 5, 9, 11]
    assert stream.done
    assert stream.error is None
    assert values(stream) == [[1, 2, 3, 4, 5], [], [6, 7, 8]]


@settings(deadline=None)
@given(st.integers(0, 8), st.integers(0, 11), st.integers(1, 12))
def test_it_resumes_wherever_it_was_cut(cut, extra, size):
    stream = JobStream(JOB)
    feed(stream, conversation()[:cut])
    asked = stream.resume()
    again = [status(1, "queued", 0), status(2, "running"), save(3)]
    for message in again[asked.after :]:
        stream.feed(message)
    if asked.after < 3:
        feed(stream, pieces(3, asked.offset, size))
    stream.feed(status(4, "completed"))
    assert stream.done
    assert values(stream) == [[1, 2, 3, 4, 5], [], [6, 7, 8]]


def test_resume_names_event_and_offset():
    stream = JobStream(JOB)
    assert stream.resume() == Subscribe(JOB, 0, 0)
    feed(stream, conversation()[:5])
    assert stream.resume() == Subscribe(JOB, 2, 5)


def test_repeats_change_nothing():
    stream = JobStream(JOB)
    twice = [message for message in conversation() for _ in range(2)]
    assert feed(stream, twice) == feed(JobStream(JOB), conversation())
    assert feed(stream, conversation()) == []


def test_overlapping_bytes_are_taken_once():
    stream = JobStream(JOB)
    feed(stream, conversation()[:4])
    feed(stream, pieces(3, 0, 5))
    assert values(stream) == [[1, 2, 3, 4, 5], [], [6, 7, 8]]


def test_gaps_are_noticed_and_healed():
    stream = JobStream(JOB)
    feed(stream, conversation()[:2])
    for wrong in (save(4), status(9, "completed"), pieces(3)[0], pieces(4)[0]):
        with pytest.raises(OutOfStep):
            stream.feed(wrong)
    stream.feed(save(3))
    for wrong in (pieces(3)[1], status(4, "completed"), save(4)):
        with pytest.raises(OutOfStep):
            stream.feed(wrong)
    assert stream.resume() == Subscribe(JOB, 2, 0)
    feed(stream, conversation())
    assert values(stream)[0] == [1, 2, 3, 4, 5]


def test_a_save_that_changes_in_between_starts_over():
    stream = JobStream(JOB)
    feed(stream, conversation()[:4])
    with pytest.raises(OutOfStep):
        stream.feed(save(3, node=8))
    assert stream.resume() == Subscribe(JOB, 2, 0)
    feed(stream, [save(3, node=8), *pieces(3)])
    assert list(stream.saves) == [8]


def test_too_many_bytes_are_refused():
    stream = JobStream(JOB)
    feed(stream, conversation()[:3])
    (whole,) = (decode_server(raw) for raw in chunks(JOB, 3, [b"x" * 12], 0, 99))
    with pytest.raises(InvalidPayload):
        stream.feed(whole)


def test_an_earlier_attempt_leaves_nothing():
    stream = JobStream(JOB)
    feed(stream, conversation()[:-1])
    events = feed(stream, [status(4, "queued", 1), status(5, "running", 2)])
    assert stream.saves == {}
    assert events[-1] == Changed(JobStatus.RUNNING, 2)
    late = [save(6, attempt=1), *pieces(6), Log(JOB, 7, 1, 3, "late"), status(8, "completed", 1)]
    assert feed(stream, late) == []
    assert (stream.last, stream.saves, stream.done) == (8, {}, False)
    assert feed(stream, [Log(JOB, 9, 2, 3, "now")]) == [Logged(3, "now")]
    feed(stream, [save(10, attempt=2), *pieces(10), status(11, "completed", 2)])
    assert values(stream)[2] == [6, 7, 8]


def test_ends_that_are_errors():
    failed = JobStream(JOB)
    failed.feed(status(1, "failed", 1, {"code": "op_failed", "message": "no", "node": 3}))
    assert isinstance(failed.error, OpFailed)
    assert failed.error.node == 3
    cancelled = JobStream(JOB)
    cancelled.feed(status(1, "cancelled"))
    assert isinstance(cancelled.error, JobCancelled)
    refused = JobStream(JOB)
    refused.feed(Refused.of(UnknownJob("gone"), JOB))
    assert isinstance(refused.error, UnknownJob)
    assert all(stream.done for stream in (failed, cancelled, refused))


def test_a_requeue_may_say_why():
    stream = JobStream(JOB)
    feed(
        stream, [status(1, "running"), status(2, "queued", 1, {"code": "internal_error", "message": "worker died"})]
    )
    assert not stream.done


def test_what_no_machine_holds_is_not_believed():
    stream = JobStream(JOB, most_bytes=1000)
    with pytest.raises(LimitExceeded):
        stream.feed(Save(JOB, 1, 1, 0, {"tensor": 0}, (TensorSpec((1001,), "uint8"),)))


def test_a_tree_that_names_no_tensor_is_refused_before_its_bytes():
    with pytest.raises(InvalidPayload):
        JobStream(JOB).feed(Save(JOB, 1, 1, 0, {"tensor": 1}, (TensorSpec((1,), "uint8"),)))


def test_other_jobs_are_none_of_its_business():
    assert JobStream("cd" * 16).feed(conversation()[0]) == []


# Saves whose bytes come apart


def head(seq, node=7, attempt=1):
    return Save(JOB, seq, attempt, node, TREE, SPECS, apart=True)


def arrive(stream, seq):
    """Fill a save as whoever fetches it does, three bytes at a time."""
    incoming, whole = stream.apart[seq], b"".join(RAW)
    while incoming.received < incoming.save.nbytes:
        room = incoming.room()[:3]
        room[:] = whole[incoming.received : incoming.received + room.nbytes]
        incoming.fill(room.nbytes)
    return stream.arrived(seq)


def test_saves_apart_come_when_they_come_and_the_end_after_them():
    stream = JobStream(JOB, apart=5)
    assert stream.resume() == Subscribe(JOB, 0, 0, 5)
    early = feed(stream, [status(1, "queued", 0), status(2, "running"), head(3), head(4, 8), save(5, 9)])
    assert [type(event) for event in early] == [Changed, Changed]
    feed(stream, pieces(5))
    assert list(stream.saves) == [9]
    assert feed(stream, [status(6, "completed")]) == []
    assert (stream.heard, stream.done, stream.resume().after) == (True, False, 6)
    assert feed(stream, [Refused.of(UnknownJob("expired meanwhile"), JOB)]) == []
    (saved,) = arrive(stream, 4)
    assert (saved.node, stream.done) == (8, False)
    assert [type(event) for event in arrive(stream, 3)] == [Saved, Changed]
    assert stream.done
    assert stream.error is None
    assert values(stream) == values(stream, 8) == values(stream, 9) == [[1, 2, 3, 4, 5], [], [6, 7, 8]]


@pytest.mark.parametrize(
    "after",
    [
        status(4, "queued", 1),
        status(4, "running", 2),
        status(4, "failed", 1, {"code": "op_failed", "message": "no"}),
        status(4, "cancelled"),
        Refused.of(UnknownJob("gone"), JOB),
    ],
    ids=lambda message: getattr(message, "status", "refused"),
)
def test_what_comes_apart_is_void_once_its_attempt_is(after):
    stream = JobStream(JOB, apart=1)
    feed(stream, [status(1, "queued", 0), status(2, "running"), head(3)])
    incoming = stream.apart[3]
    feed(stream, [after])
    gone = after != status(4, "queued", 1)  # until the next attempt begins, these bytes may still be the ones
    assert incoming.void is gone
    assert bool(stream.apart) is not gone


def test_a_stale_head_is_not_fetched_and_an_empty_one_is_whole():
    stream = JobStream(JOB, apart=1)
    feed(stream, [status(1, "running", 2), head(2, attempt=1)])
    assert (stream.apart, stream.last) == ({}, 2)
    empty = Save(JOB, 3, 2, 5, {"tensor": 0}, (TensorSpec((0,), "float32"),), apart=True)
    assert [type(event) for event in feed(stream, [empty])] == [Saved]


def test_bools_that_come_apart_are_checked():
    stream = JobStream(JOB, apart=1)
    stream.feed(Save(JOB, 1, 1, 0, {"tensor": 0}, (TensorSpec((2,), "bool"),), apart=True))
    stream.apart[1].write(memoryview(b"\1\7"))
    with pytest.raises(InvalidPayload):
        stream.arrived(1)


def test_what_comes_apart_counts_against_what_is_believed():
    stream = JobStream(JOB, apart=1, most_bytes=15)
    stream.feed(head(1))
    with pytest.raises(LimitExceeded):
        stream.feed(head(2, 8))
