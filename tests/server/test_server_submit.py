"""Jobs handed in over the websocket: what POST would say, in one message up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from interpose.graph.model import Node
from interpose.wire.messages import Refused, Status, Submit, Unsubscribe, encode
from interpose.wire.protocol import SUBMIT_BYTES
from interpose.wire.status import JobStatus
from interpose.wire.submission import Submission, encode_submission
from interpose_server.broker import keys
from interpose_server.broker.jobs import Outcome, Report
from interpose_server.settings import Settings
from rig import Gateway, run_gateway, submission, tiny_graph
from test_server_stream import opened, receive, record, to_the_end


def frame(job: Submission, under: str = "") -> bytes:
    return encode(Submit(under or job.id, 0, encode_submission(job)))


async def finish(gateway: Gateway, job: str) -> None:
    _, (claim,) = await gateway.broker.queue.take("tiny", "w1")
    assert claim.id == job
    reports = [Report(claim.ref, "w1", 1, 0, [record(1, b"abc")], Outcome(None, 0.1))]
    assert await gateway.broker.queue.report(reports) == [True]


async def test_a_job_goes_in_and_its_events_come_without_asking(settings: Settings) -> None:
    async with run_gateway(settings) as gateway, opened(gateway) as socket:
        job = submission()
        await socket.send(frame(job))
        assert await receive(socket) == Status(job.id, 1, 0, JobStatus.QUEUED)
        await finish(gateway, job.id)
        messages = await to_the_end(socket)
    assert [getattr(message, "seq", 0) for message in messages] == [2, 3, 3, 4]
    assert [messages[0].status, messages[-1].status] == [JobStatus.RUNNING, JobStatus.COMPLETED]
    assert bytes(messages[2].data) == b"abc"


async def test_sent_again_by_either_way_it_is_the_same_job(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        job = submission()
        async with opened(gateway) as socket:
            await socket.send(frame(job))
            assert (await receive(socket)).status is JobStatus.QUEUED
        assert (await gateway.post(job)).status_code == 202
        await finish(gateway, job.id)
        async with opened(gateway) as socket:
            await socket.send(frame(job))
            assert (await to_the_end(socket))[-1].status is JobStatus.COMPLETED
            await socket.send(frame(replace(job, graph=tiny_graph(tokens=(4,)))))
            refused = await receive(socket)
        assert isinstance(refused, Refused) and refused.error["code"] == "job_conflict"
        assert await gateway.broker.queue.load("ada") == {"queued": 0, "running": 0}


BAD = Node(1, "save", args=(), invoke=0)
READ = tiny_graph().nodes[0]
REFUSED = {
    "unknown_model": frame(submission(id="ab" * 16, model="none")),
    "invalid_graph": frame(submission(replace(tiny_graph(), nodes=(READ, BAD)), id="ab" * 16)),
    "invalid_payload": frame(submission(), under="ab" * 16),
}


@pytest.mark.parametrize("code", REFUSED)
async def test_what_is_wrong_is_said_of_the_job(settings: Settings, code: str) -> None:
    async with run_gateway(settings) as gateway, opened(gateway) as socket:
        await socket.send(REFUSED[code])
        refused = await receive(socket)
        assert (refused.job, refused.error["code"]) == ("ab" * 16, code)
        assert await gateway.broker.queue.load("ada") == {"queued": 0, "running": 0}


async def test_a_large_one_belongs_to_post(settings: Settings) -> None:
    async with run_gateway(settings) as gateway, opened(gateway) as socket:
        await socket.send(encode(Submit("ab" * 16, 0, bytes(SUBMIT_BYTES + 1))))
        refused = await receive(socket)
        assert refused.error["code"] == "invalid_payload" and "POST" in refused.error["message"]


async def test_a_key_revoked_unheard_hands_nothing_in(settings: Settings) -> None:
    async with run_gateway(settings) as gateway, opened(gateway) as socket:
        await gateway.broker.redis.delete(keys.KEYS)  # as if the wake-up of its revocation had been lost
        job = submission()
        await socket.send(frame(job))
        assert (await receive(socket)).error["code"] == "unauthorized"
        assert await gateway.broker.queue.depth("tiny") == 0


async def test_nobody_goes_faster_than_a_user_may(settings: Settings) -> None:
    slow = settings.model_copy(update={"rate_per_s": 0.01, "rate_burst": 4})
    async with run_gateway(slow) as gateway, opened(gateway) as socket:
        for _ in range(4):
            await socket.send(frame(submission()))
        codes = [message.error["code"] for _ in range(4) if isinstance(message := await receive(socket), Refused)]
    assert codes and set(codes) == {"queue_full"}


async def test_a_job_nobody_follows_any_more_runs_all_the_same(settings: Settings) -> None:
    async with run_gateway(settings) as gateway, opened(gateway) as socket:
        job = submission()
        await socket.send(frame(job))
        assert (await receive(socket)).status is JobStatus.QUEUED
        await socket.send(encode(Unsubscribe(job.id)))
        await finish(gateway, job.id)
        assert (await gateway.broker.queue.info("ada", job.id)).status is JobStatus.COMPLETED
