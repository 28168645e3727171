"""Large saves, fetched beside the websocket: the same values whatever breaks, and no way to be misled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from interpose.client import run_remote, submit_remote
from interpose.config import CONFIG, Endpoint
from interpose.errors import (
    ConnectionFailed,
    InternalError,
    InvalidPayload,
    JobCancelled,
    OpFailed,
    UnknownJob,
    VersionMismatch,
)
from interpose.transports.fetch import APART, direct
from interpose.wire.messages import Save, Status, encode
from interpose.wire.protocol import PROBLEM
from interpose.wire.status import JobStatus
from interpose.wire.stream import Incoming, Received
from interpose.wire.tensors import encode_tensor
from interpose.wire.trees import flatten
from ports import free_port
from scripted_lab import GRAPH, HEADER, Lab, part_of, serving
from starlette.responses import JSONResponse, Response

LARGE = torch.arange(1 << 20, dtype=torch.float32)
"""4 MB."""


@pytest.fixture
def apart(lab: Lab) -> Lab:
    lab.apart, lab.values = True, {1: LARGE}
    return lab


def fetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "interpose-fetch"]


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_large_ones_are_fetched_and_small_ones_come_along(apart: Lab) -> None:
    pair = (LARGE.to(torch.bfloat16), {"empty": torch.zeros(0), "flags": LARGE > 5})
    apart.values = {1: LARGE, 2: torch.ones(3), 3: pair, 4: torch.zeros(APART, dtype=torch.uint8)}
    told: list[Any] = []
    found = run_remote(GRAPH, "m", {}, on_event=told.append)
    assert torch.equal(found[1], LARGE)
    assert torch.equal(found[2], torch.ones(3))
    assert torch.equal(found[3][0], pair[0])
    assert torch.equal(found[3][1]["flags"], LARGE > 5)
    assert found[3][1]["empty"].shape == (0,)
    assert sorted(apart.fetched) == [(3, 0), (5, 0), (6, 0)]
    assert max(event.received for event in told if isinstance(event, Received) and event.node == 1) == LARGE.nbytes
    found[1][0] = 5  # memory of its own, that can be written to
    assert apart.calls.count("WS") == 1


@pytest.mark.parametrize("drops", [[0], [1], [LARGE.nbytes - 1], [0, 0, 70_000, 1 << 20, 0]])
def test_a_fetch_that_breaks_goes_on_where_it_was(apart: Lab, drops: list[int]) -> None:
    apart.faults = list(drops)
    assert torch.equal(run_remote(GRAPH, "m", {})[1], LARGE)
    starts = [start for _, start in apart.fetched]
    assert len(starts) == len(drops) + 1
    assert starts == sorted(starts)
    assert starts[-1] <= sum(drops)


def test_the_websocket_may_break_meanwhile(apart: Lab) -> None:
    apart.values = {node: LARGE + node for node in range(1, 9)}
    apart.cuts, apart.faults = [4, 0, 2, 3], [None, 1 << 20, None, 5]
    found = run_remote(GRAPH, "m", {})
    assert all(torch.equal(found[node], LARGE + node) for node in apart.values)
    whole = [seq for seq, start in apart.fetched if not start]
    assert sorted(set(whole)) == list(range(3, 11))
    assert len(apart.fetched) <= 8 + 2  # no save is fetched again because the stream was


def answer(status: int, body: Any, kind: str = PROBLEM, **headers: str) -> Any:
    return lambda data, start: Response(
        body, status, {HEADER: "1", **{name.replace("_", "-"): value for name, value in headers.items()}}, kind
    )


PASSING = [
    answer(500, b'{"code": "internal_error", "message": "for a moment"}'),
    answer(429, b'{"code": "queue_full", "message": "many downloads"}'),
    answer(502, b"<html>", "text/html"),
    lambda data, start: Response(b"", 503),
    answer(429, b"[" * 60_000),
    answer(429, b'{"code": "queue_full", "message": "many downloads"}', Retry_After="9" * 5000),
]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_waited_for(apart: Lab, fault: Any) -> None:
    apart.faults = [1 << 20, fault, fault]
    assert torch.equal(run_remote(GRAPH, "m", {})[1], LARGE)
    assert len(apart.fetched) == 4


OCTETS = "application/octet-stream"
WRONG = [
    (answer(404, b'{"code": "unknown_job", "message": "expired"}'), UnknownJob),
    (answer(200, LARGE.numpy().tobytes()[:-4], OCTETS), InvalidPayload),
    (answer(200, LARGE.numpy().tobytes() + b"more", OCTETS), InvalidPayload),
    (answer(206, LARGE.numpy().tobytes(), OCTETS), InvalidPayload),
    (answer(200, LARGE.numpy().tobytes(), OCTETS, Content_Encoding="gzip"), InvalidPayload),
    (answer(204, b"", OCTETS), InvalidPayload),
    (lambda data, start: JSONResponse({}, 200, {HEADER: "7"}), VersionMismatch),
    (answer(307, b"", OCTETS, Location="http://elsewhere/"), InvalidPayload),
]


@pytest.mark.parametrize(("fault", "error"), WRONG)
def test_what_makes_no_sense_is_an_error_and_the_next_job_runs(apart: Lab, fault: Any, error: Any) -> None:
    apart.faults = [fault]
    with pytest.raises(error):
        run_remote(GRAPH, "m", {})
    assert torch.equal(run_remote(GRAPH, "m", {})[1], LARGE)


def test_a_fetch_that_cannot_begin_is_told(apart: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name == "interpose-fetch":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(InternalError, match="start new thread"):
            run_remote(GRAPH, "m", {})
    assert torch.equal(run_remote(GRAPH, "m", {})[1], LARGE)


@pytest.mark.parametrize(
    "told", [{}, {"Content-Range": f"bytes 0-{LARGE.nbytes - 1}/{LARGE.nbytes}"}, {"Content-Range": "junk"}]
)
def test_another_part_than_asked_for_is_refused(apart: Lab, told: dict[str, str]) -> None:
    """After a break, a server that begins anew, or says nothing of where it begins."""
    apart.faults = [
        1 << 20,
        lambda data, start: Response(data[start:], 206 if told else 200, {HEADER: "1", **told}, OCTETS),
    ]
    with pytest.raises(InvalidPayload, match=r"another (part|size)"):
        run_remote(GRAPH, "m", {})


def test_an_outage_beyond_patience_is_told(apart: Lab) -> None:
    CONFIG.TIMEOUT = 0.3
    apart.faults = [0] * 50
    with pytest.raises(ConnectionFailed):
        run_remote(GRAPH, "m", {})


@pytest.mark.parametrize("ending", ["failed", "cancelled"])
def test_a_job_that_ends_within_a_fetch_ends_at_once(apart: Lab, ending: str) -> None:
    error = {"code": "op_failed", "message": "no"} if ending == "failed" else None
    apart.ending, apart.faults = (ending, error), [partial(part_of, drop=1 << 20, stall=True)]
    apart.tamper = [lambda frames: [*(frames := list(frames))[:3], lambda: apart.fetched, *frames[3:]]]
    began = time.monotonic()
    with pytest.raises(OpFailed if error else JobCancelled):
        run_remote(GRAPH, "m", {})
    until(lambda: not fetching())
    assert time.monotonic() - began < 30, "the fetch would take a minute"


def test_an_interrupted_wait_leaves_no_fetch_behind(apart: Lab) -> None:
    apart.faults = [partial(part_of, drop=1 << 20, stall=True)]
    job = submit_remote(GRAPH, "m", {})
    until(lambda: apart.fetched)
    assert fetching()
    job.interrupt()
    until(lambda: not fetching())
    assert apart.cancelled == {job.id}
    assert torch.equal(run_remote(GRAPH, "m", {})[1], LARGE)


def test_an_attempt_that_was_given_up_leaves_nothing(apart: Lab) -> None:
    """The worker dies while its save is fetched; the next attempt's value is the job's."""
    tree, (tensor,) = flatten(LARGE)
    spec = encode_tensor(tensor).spec

    def again(frames: Any) -> Any:
        (job,) = apart.jobs
        yield from list(frames)[:2]
        yield encode(Save(job, 3, 1, 1, tree, (spec,), True))
        yield lambda: apart.fetched
        yield encode(Status(job, 4, 1, JobStatus.QUEUED))
        yield encode(Status(job, 5, 2, JobStatus.RUNNING))
        yield encode(Save(job, 6, 2, 1, tree, (spec,), True))
        yield encode(Status(job, 7, 2, JobStatus.COMPLETED))

    apart.values = {node: LARGE * node for node in (2, 3, 4, 5)}  # event 6 is the fourth of them
    apart.faults = [partial(part_of, drop=1 << 20, stall=True)]
    apart.tamper = [again]
    assert torch.equal(run_remote(GRAPH, "m", {})[1], LARGE * 5)
    assert apart.fetched == [(3, 0), (6, 0)]


def test_a_restarted_server_goes_on_with_the_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    CONFIG.PROGRESS = False
    came, gone = list[int](), threading.Event()
    fill = Incoming.fill

    def noted(incoming: Incoming, size: int) -> None:
        fill(incoming, size)
        came.append(incoming.received)

    monkeypatch.setattr(Incoming, "fill", noted)
    lab = Lab(apart=True, values={1: LARGE}, faults=[partial(part_of, drop=1 << 20, stall=True, gone=gone)])
    try:
        with serving(lab, free_port()):
            job = submit_remote(GRAPH, "m", {}, host=lab.url, api_key="secret")
            assert gone.wait(60)
        with serving(lab, lab.port):
            assert torch.equal(job.result(timeout=60)[1], LARGE)
        assert [start for _, start in lab.fetched] == [0, came[0]] and 0 < came[0] <= 1 << 20
    finally:
        CONFIG.reset()


def test_without_torch(apart: Lab) -> None:
    CONFIG.BACKEND = "numpy"
    assert np.array_equal(run_remote(GRAPH, "m", {})[1], LARGE.numpy())


def test_behind_a_proxy_everything_comes_over_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    away, here = Endpoint("https://lab.example.org"), Endpoint("http://127.0.0.1:8000")
    assert direct(away)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert not direct(away)
    assert direct(here)
    assert direct(Endpoint("http://lab.example.org"))
    monkeypatch.setenv("no_proxy", "example.org")
    assert direct(away)
