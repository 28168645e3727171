"""What the gateway says of models that aren't loaded: that they will be, or why not."""

from __future__ import annotations

import math
from dataclasses import replace

from interpose.errors import ModelUnavailable
from interpose_server.broker.states import ModelState
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import Settings
from interpose_server.sweeper import retire
from rig import Gateway, run_gateway, submission, tiny_manifest

NEW = ModelSpec(name="org/new")
GATED = ModelUnavailable("/srv/new: 403", details={"reason": "gated"})


def fresh(gateway: Gateway) -> None:
    """Have the next answer look at the broker."""
    gateway.app.state.parts.catalogue._hosted.clear()


async def test_a_question_about_a_model_that_never_was_loaded_has_it_loaded(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        await gateway.broker.specs.put(NEW)
        answer = await gateway.client.get("/v1/models/org/new")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["code"] == "model_loading" and answer.json()["details"]["state"] == "cold"
        assert "what loads models here is away" in answer.json()["detail"]
        assert (await gateway.broker.models.get("org/new")).wished
        await gateway.broker.specs.keep()
        await gateway.broker.models.crowd({"org/new": True})
        answer = await gateway.client.get("/v1/models/org/new")
        assert (
            answer.json()["details"]["state"] == "crowded" and "until a device is free" in answer.json()["detail"]
        )
        await gateway.broker.models.crowd({"org/new": False})
        await gateway.broker.models.announce("org/new", "w1", ModelState.LOADING)
        answer = await gateway.client.get("/v1/models/org/new")
        assert answer.json()["details"]["state"] == "loading" and "is being loaded" in answer.json()["detail"]
        job = await gateway.post(submission(model="org/new"))
        assert (job.status_code, job.json()["code"]) == (503, "model_loading")
        await gateway.broker.models.publish("org/new", "w1", tiny_manifest("org/new"), "")
        fresh(gateway)
        assert (await gateway.client.get("/v1/models/org/new")).status_code == 200
        assert (await gateway.post(submission(model="org/new"))).status_code == 202


async def test_a_model_that_cannot_be_loaded_says_why_until_it_is_asked_for_again(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        await gateway.broker.specs.put(NEW)
        await gateway.broker.models.announce("org/new", "w1", ModelState.FAILED, GATED)
        answers = [await gateway.client.get("/v1/models/org/new"), await gateway.post(submission(model="org/new"))]
        for answer in answers:
            assert (answer.status_code, answer.json()["code"]) == (503, "model_failed")
            assert answer.json()["details"]["reason"] == "gated" and int(answer.headers["retry-after"]) > 250
            assert "/srv" not in answer.text
        assert not (await gateway.broker.models.get("org/new")).wished
        listed = {model["id"]: model for model in (await gateway.client.get("/v1/models")).json()["models"]}
        assert listed["org/new"]["state"] == "failed" and listed["org/new"]["failure"]["reason"] == "gated"
        assert "the hub gives it only to those" in (await gateway.client.get("/")).text
        await gateway.broker.specs.load("org/new")
        fresh(gateway)
        assert (await gateway.client.get("/v1/models/org/new")).json()["code"] == "model_loading"


async def test_after_its_time_a_failed_model_is_tried_again_by_whoever_asks(settings: Settings) -> None:
    async with run_gateway(settings.model_copy(update={"load_retry_s": 0.0001})) as gateway:
        await gateway.broker.specs.put(NEW)
        await gateway.broker.models.announce("org/new", "w1", ModelState.FAILED, GATED)
        answer = await gateway.client.get("/v1/models/org/new")
        assert answer.json()["code"] == "model_loading"
        assert (await gateway.broker.models.get("org/new")).wished


async def test_what_may_pass_is_waited_for(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        await gateway.broker.specs.put(NEW)
        await gateway.broker.models.announce("org/new", "w1", ModelState.FAILED, RuntimeError("once"))
        answer = await gateway.client.get("/v1/models/org/new")
        assert answer.json()["code"] == "model_loading" and answer.json()["details"]["state"] == "failed"


async def test_a_removed_model_takes_no_more_jobs(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        await gateway.broker.specs.put(ModelSpec(name="tiny"))
        await gateway.broker.specs.remove("tiny")
        answer = await gateway.post(submission())
        assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable")
        assert "out of service" in answer.json()["detail"]


async def test_a_job_that_a_gateway_takes_for_a_model_it_still_knows_is_run_or_refused(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        broker, remembered = gateway.broker, gateway.app.state.parts.catalogue._hosted
        await broker.specs.put(ModelSpec(name="tiny"))
        await broker.models.announce("tiny", "w1", ModelState.STOPPED)
        job = submission()

        async def remember() -> None:
            remembered["tiny"] = math.inf, replace(await broker.models.get("tiny"), removed=False, wanted=True)

        await remember()
        await broker.specs.remove("tiny")
        assert (await gateway.post(job)).status_code == 202
        assert await retire(broker) == [], "it has a job"
        await remember()
        await broker.queue.cancel("ada", job.id)
        assert await retire(broker) == ["tiny"]
        answer = await gateway.post(submission())
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")
