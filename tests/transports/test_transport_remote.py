import asyncio
import os
import threading
import time
import traceback
import uuid
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from interpose.client import Job, jobs, run_remote, submit_remote
from interpose.config import CONFIG
from interpose.errors import (
    BadArgument,
    ConfigError,
    ConnectionFailed,
    InternalError,
    InvalidPayload,
    JobCancelled,
    ModelUnavailable,
    OpFailed,
    QueueFull,
    Source,
    Unauthorized,
    UnknownJob,
    VersionMismatch,
)
from interpose.graph.model import Invoke, Node, Run
from interpose.wire.result import Saved
from interpose.wire.status import JobStatus
from interpose.wire.stream import Changed, Logged, Received
from interpose.wire.tensors import encode_tensor
from ports import free_port
from scripted_lab import GRAPH, KEY, Lab, serving


def test_a_job_there_and_back(lab: Lab):
    lab.values = {1: (torch.arange(4, dtype=torch.bfloat16), {"n": 3})}
    tensor, rest = run_remote(GRAPH, "org/name", {})[1]
    assert torch.equal(tensor, lab.values[1][0])
    assert rest == {"n": 3}
    (job,) = lab.jobs.values()
    assert (job.model, job.graph) == ("org/name", GRAPH)
    deadline = time.monotonic() + 60
    while lab.acked != [job.id] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lab.acked == [job.id]


def test_results_are_arrays_where_wanted(lab: Lab):
    lab.values = {1: torch.ones(2, dtype=torch.bfloat16)}
    CONFIG.BACKEND = "numpy"
    value = run_remote(GRAPH, "m", {})[1]
    assert isinstance(value, np.ndarray)
    assert value.dtype.name == "bfloat16"
    value[0] = 5  # Results can be written to.


def test_many_jobs_share_one_websocket(lab: Lab):
    lab.values = {1: torch.zeros(1000)}
    found = [submit_remote(GRAPH, "m", {}) for _ in range(20)]
    assert all(job.result(timeout=60)[1].shape == (1000,) for job in found)
    assert lab.calls.count("WS") == 1
    assert len(lab.jobs) == 20


@pytest.mark.parametrize("cut", [1, 2, 3, 20, 66, 67])
def test_a_cut_in_a_64_mb_save_resumes_at_the_offset(lab: Lab, cut):
    value = torch.arange(16 << 20, dtype=torch.float32)
    lab.values, lab.cuts = {1: value}, [cut]
    assert torch.equal(run_remote(GRAPH, "m", {})[1], value)
    assert len(lab.asked) == 2
    first, second = lab.asked
    assert (first.after, first.offset) == (0, 0)
    assert second.after == min(cut, 2) + (cut >= 67)
    assert second.offset == (min(max(cut - 3, 0), 64) << 20 if cut < 67 else 0)


def test_cut_after_cut_it_gets_there(lab: Lab):
    value = torch.arange(1 << 20, dtype=torch.float32)
    lab.values, lab.cuts, lab.chunk = {1: value, 2: value + 1}, [0, 1, 4, 7, 0, 3, 9], 300_000
    found = run_remote(GRAPH, "m", {})
    assert torch.equal(found[1], value)
    assert torch.equal(found[2], value + 1)


def short(frames):
    """The fourth frame loses its last byte."""
    return (frame[:-1] if count == 4 else frame for count, frame in enumerate(frames))


def twice(frames):
    return (frame for frame in frames for _ in range(2))


def missing(frames):
    return (frame for count, frame in enumerate(frames) if count != 4)


def test_truncated_missing_and_repeated_frames_are_healed(lab: Lab):
    value = torch.arange(1 << 20, dtype=torch.float32)
    lab.values, lab.chunk, lab.tamper = {1: value}, 500_000, [short, missing, twice]
    assert torch.equal(run_remote(GRAPH, "m", {})[1], value)
    assert len(lab.asked) == 3


@pytest.mark.parametrize("junk", [b"\2junk", b"\0\xc1", b"\1short", b""])
def test_junk_on_the_stream_is_an_error_and_the_next_job_runs(lab: Lab, junk):
    lab.tamper = [lambda frames: iter([junk])]
    with pytest.raises(InvalidPayload):
        run_remote(GRAPH, "m", {})
    lab.values = {1: 3}
    assert run_remote(GRAPH, "m", {}) == {1: 3}


def test_a_stream_that_never_makes_sense_ends(lab: Lab):
    lab.tamper = [lambda frames: list(frames)[1:]] * 20
    with pytest.raises(InvalidPayload, match="came after"):
        run_remote(GRAPH, "m", {})


def test_a_failed_job_names_the_line(lab: Lab):
    lab.ending = ("failed", {"code": "op_failed", "message": "no", "node": 1, "op": "save"})
    graph = replace(GRAPH, nodes=(GRAPH.nodes[0], Node(1, "save", source=Source("book.py", 12))))
    with pytest.raises(OpFailed, match=r"book\.py:12"):
        run_remote(graph, "m", {})


def test_what_the_server_refuses_is_its_own_error(lab: Lab):
    with pytest.raises(Unauthorized, match="no such key") as caught:
        run_remote(GRAPH, "m", {}, api_key="wrong")
    assert caught.value.details == {"retry_after_s": 7}
    with pytest.raises(UnknownJob):
        Job.attach("ab" * 16)
    with pytest.raises(InvalidPayload):
        Job.attach("../jobs")


def test_another_protocol_says_so(lab: Lab):
    lab.protocol = "2"
    with pytest.raises(VersionMismatch, match="speaks protocol 2"):
        run_remote(GRAPH, "m", {})


def test_nobody_there_says_what_to_check():
    CONFIG.CONNECT_TIMEOUT, CONFIG.HOST = 0.3, "127.0.0.1:9"
    try:
        with pytest.raises(ConnectionFailed, match="INTERPOSE_HOST") as raised:
            run_remote(GRAPH, "m", {})
        told = traceback.format_exception(raised.value)
        assert sum(text.count("\n") for text in told) < 40, "not the pages of the libraries below"
        with pytest.raises(ConnectionFailed) as raised:
            jobs()
        context = raised.value.__context__
        assert isinstance(context, httpx.HTTPError) and raised.value.__suppress_context__, "there for who looks"
    finally:
        CONFIG.reset()


def test_https_where_there_is_http_says_so_at_once(lab: Lab):
    began = time.monotonic()
    there = lab.url.replace("http:", "https:")
    for ask in (lambda: run_remote(GRAPH, "m", {}, host=there), lambda: jobs(host=there)):
        with pytest.raises(ConfigError, match=f"speaks plain HTTP; set INTERPOSE_HOST to {lab.url}"):
            ask()
    assert time.monotonic() - began < 30, "it isn't tried again"


@pytest.mark.parametrize("path", ["/v1", "/v1/models", "/v1/models/m"])
def test_an_address_within_the_server_is_refused(lab: Lab, path: str):
    with pytest.raises(ConfigError, match="without /v1"):
        run_remote(GRAPH, "m", {}, host=lab.url + path)


def test_another_kind_of_server_is_named_at_once(lab: Lab):
    began = time.monotonic()
    with pytest.raises(ConfigError, match="isn't an Interpose server"):
        run_remote(GRAPH, "m", {}, host=f"{lab.url}/elsewhere")
    assert time.monotonic() - began < 30, "it isn't tried again"


def test_no_host_says_what_to_set(monkeypatch):
    for name in ("INTERPOSE_HOST", "NDIF_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="INTERPOSE_HOST"):
        run_remote(GRAPH, "m", {})


def test_a_post_whose_answer_was_lost_is_the_same_job(lab: Lab):
    lab.values, lab.busy = {1: 1}, 2
    assert run_remote(GRAPH, "m", {}) == {1: 1}
    assert len(lab.jobs) == 1
    assert lab.calls.count("POST /v1/jobs") == 3


def test_once_the_websocket_is_open_jobs_go_in_over_it(lab: Lab):
    lab.values = {1: torch.arange(3)}
    for _ in range(3):
        assert run_remote(GRAPH, "m", {})[1].tolist() == [0, 1, 2]
    assert lab.calls == ["WS", "POST /v1/jobs", "SUBMIT", "SUBMIT"] or lab.calls[1:] == ["WS", "SUBMIT", "SUBMIT"]
    assert len(lab.jobs) == 3


@pytest.mark.parametrize("answer", [None, InternalError("the queue is away")])
def test_one_that_may_not_have_arrived_is_posted_as_the_same_job(lab: Lab, answer: InternalError | None):
    lab.values = {1: 1}
    run_remote(GRAPH, "m", {})
    lab.answers = [answer]
    assert run_remote(GRAPH, "m", {}) == {1: 1}
    assert lab.calls.count("SUBMIT") == 1
    assert lab.calls.count("POST /v1/jobs") == 2
    assert len(lab.jobs) == 2


def test_one_that_is_refused_over_the_websocket_raises_and_the_next_job_runs(lab: Lab):
    lab.values = {1: 1}
    run_remote(GRAPH, "m", {})
    lab.answers = [QueueFull("too many"), ModelUnavailable("not now")]
    with pytest.raises(QueueFull, match="too many"):
        run_remote(GRAPH, "m", {})
    with pytest.raises(ModelUnavailable):
        submit_remote(GRAPH, "m", {})
    assert run_remote(GRAPH, "m", {}) == {1: 1}
    assert lab.calls.count("WS") == 1
    assert lab.calls.count("POST /v1/jobs") == 1


def test_a_large_graph_is_posted(lab: Lab):
    lab.values = {1: 1}
    run_remote(GRAPH, "m", {})
    large = replace(GRAPH, runs=(Run("trace", (Invoke((tuple(range(40_000)),)),)),))
    assert run_remote(large, "m", {}) == {1: 1}
    assert lab.calls.count("POST /v1/jobs") == 2


def test_waiting_has_an_end_and_cancelling_works(lab: Lab):
    lab.hold.set()
    job = submit_remote(GRAPH, "m", {})
    with pytest.raises(TimeoutError, match="goes on"):
        job.result(timeout=0.1)
    assert not job.status.terminal
    job.cancel()
    with pytest.raises(JobCancelled):
        job.result(timeout=60)
    assert job.status is JobStatus.CANCELLED


def test_a_restarted_server_is_found_again(lab: Lab):
    other = Lab(values={1: 5})
    other.hold.set()
    with serving(other, free_port()):
        job = submit_remote(GRAPH, "m", {}, host=other.url)
        while not other.asked:
            time.sleep(0.01)
    other.hold.clear()
    time.sleep(0.2)
    with serving(other, other.port):
        assert job.result(timeout=60) == {1: 5}


def test_an_outage_beyond_patience_is_told():
    other = Lab()
    other.hold.set()
    CONFIG.TIMEOUT, CONFIG.PROGRESS = 0.5, False
    try:
        with serving(other):
            job = submit_remote(GRAPH, "m", {}, host=other.url, api_key="secret")
            while not other.asked:
                time.sleep(0.01)
        with pytest.raises(
            ConnectionFailed, match=rf"Job\.attach\('{job.id}'\)\.result\(\) waits for it"
        ) as raised:
            job.result(timeout=60)
        assert raised.value.details["job"] == job.id
    finally:
        CONFIG.reset()


def test_large_attachments_go_before_and_once(lab: Lab):
    small, large = np.ones(4, np.float32), np.ones((2, 300_000), np.float32)
    given = {encode_tensor(array).sha: array for array in (small, large)}
    graph = replace(GRAPH, attachments={sha: encode_tensor(array).spec for sha, array in given.items()})
    for _ in range(2):
        run_remote(graph, "m", given)
    sha = encode_tensor(large).sha
    assert lab.tensors == {sha: large.tobytes()}
    assert [call for call in lab.calls if sha in call] == [
        f"{verb} /v1/tensors/{sha}" for verb in ("HEAD", "PUT", "HEAD")
    ]
    assert all(list(job.attachments) == [encode_tensor(small).sha] for job in lab.jobs.values())
    with pytest.raises(BadArgument):
        run_remote(graph, "m", {})


async def test_events_and_awaiting_in_the_users_own_loop(lab: Lab):
    lab.values = {1: torch.zeros(600_000)}
    job = await asyncio.to_thread(submit_remote, GRAPH, "m", {})
    events = [event async for event in job]
    assert [type(event) for event in events if not isinstance(event, Received)] == [
        Changed,
        Changed,
        Saved,
        Logged,
        Changed,
    ]
    assert (await job)[1].shape == (600_000,)
    assert job.status is JobStatus.COMPLETED
    again = [event async for event in job]
    assert again == [event for event in events if not isinstance(event, Received)]


def test_attaching_gives_what_happened_before(lab: Lab):
    lab.values = {1: 7}
    run = str(uuid.uuid4().hex)
    lab.jobs[run] = type("Known", (), {"model": "m"})
    job = Job.attach(run)
    assert Job.attach(run) is job
    assert job.result(timeout=60) == {1: 7}
    assert job.model == "m"
    (listed,) = jobs()
    assert (listed.id, listed.status, listed.created_ms) == (run, "running", 5)
    assert listed.attach() is job and listed.result(timeout=60) == {1: 7}
    assert KEY not in repr(listed)


def test_attaching_to_ones_own_job_is_the_same_job(lab: Lab):
    lab.hold.set()
    job = submit_remote(GRAPH, "m", {})
    assert Job.attach(job.id) is job
    lab.hold.clear()
    assert job.result(timeout=60) == {}


def test_ctrl_c_cancels_the_job(lab: Lab):
    def press(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_remote(GRAPH, "m", {}, on_event=press)
    assert lab.cancelled == set(lab.jobs)


def test_threads_share_the_connection(lab: Lab):
    lab.values, found = {1: 2}, []
    threads = [threading.Thread(target=lambda: found.append(run_remote(GRAPH, "m", {}))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{1: 2}] * 8
    assert lab.calls.count("WS") == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_a_connection_of_its_own(lab: Lab):
    lab.values = {1: 2}
    lab.hold.set()
    before = submit_remote(GRAPH, "m", {})
    child = os.fork()
    if not child:
        lab.hold.clear()
        try:
            ok = run_remote(GRAPH, "m", {}) == {1: 2}
        finally:
            os._exit(0 if ok else 1)
    time.sleep(0.3)
    lab.hold.clear()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert before.result(timeout=60) == {1: 2}
    assert lab.calls.count("WS") == 2
