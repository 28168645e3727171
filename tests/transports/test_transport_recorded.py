from dataclasses import replace

import pytest
import torch
from interpose.client import run_remote, submit_remote
from interpose.config import endpoint
from interpose.errors import InvalidPayload, NotFound, OpFailed, Source, UnknownJob
from interpose.transports.loop import background
from interpose.transports.recorded import Recorded, Recorder
from interpose.transports.remote import remote
from interpose.wire.stream import Received
from scripted_lab import GRAPH, Lab


def test_a_recording_answers_as_the_server_did(lab: Lab, tmp_path):
    lab.values = {1: (torch.arange(3.0), "text")}
    recorder = Recorder(remote(endpoint()))
    live: list = []
    values = run_remote(GRAPH, "m", {}, transport=recorder, on_event=live.append)
    recorder.save(tmp_path / "talk")

    lines = tuple(replace(node, source=Source("elsewhere.py", 3)) for node in GRAPH.nodes)
    played: list = []
    recorded = Recorded(tmp_path / "talk")
    again = run_remote(replace(GRAPH, nodes=lines), "m", {}, transport=recorded, on_event=played.append)
    assert torch.equal(again[1][0], values[1][0])
    assert again[1][1] == "text"
    told = [[type(event) for event in events if not isinstance(event, Received)] for events in (live, played)]
    assert told[0] == told[1]
    with pytest.raises(NotFound, match="anew"):
        run_remote(GRAPH, "m", {}, transport=recorded)


def test_failures_are_recorded_too(lab: Lab, tmp_path):
    lab.ending = ("failed", {"code": "op_failed", "message": "no"})
    recorder = Recorder(remote(endpoint()))
    with pytest.raises(OpFailed):
        run_remote(GRAPH, "m", {}, transport=recorder)
    recorder.save(tmp_path / "talk")
    job = submit_remote(GRAPH, "m", {}, transport=Recorded(tmp_path / "talk"))
    with pytest.raises(OpFailed):
        job.result(timeout=5)


def test_other_jobs_have_no_answer(lab: Lab, tmp_path):
    recorder = Recorder(remote(endpoint()))
    run_remote(GRAPH, "m", {}, transport=recorder)
    recorder.save(tmp_path / "talk")
    recorded = Recorded(tmp_path / "talk")
    with pytest.raises(NotFound):
        run_remote(GRAPH, "other", {}, transport=recorded)
    with pytest.raises(NotFound):
        run_remote(GRAPH, "m", {}, batching="exclusive", transport=recorded)
    with pytest.raises(UnknownJob):
        background().run(anext(recorded.follow("ab" * 16)))


def test_what_is_no_recording_is_refused(tmp_path):
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(InvalidPayload):
        Recorded(tmp_path / "junk")
