"""A model over processes: loaded by parts, measured by parts, served as the whole one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.errors import LimitExceeded, ReplicaLost
from interpose.graph.limits import UNLIMITED
from interpose.graph.manifest import fingerprint
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.loading import load
from interpose_server.shards.process import stand
from lora import lora
from models import tiny
from processes import Running, spread

PROMPTS = ["The capital of France is", "When Mary and John went to the store, John gave a drink to"]

LIMITS = replace(UNLIMITED, flops=5_000_000)

ADAPTERS = {"a": lora("gpt2", targets=["wte", "c_attn", "c_proj", "c_fc"])}


def language(engine: Engine) -> LanguageModel:
    model = LanguageModel(str(tiny("gpt2")), adapters=ADAPTERS)
    model._access.local.engine = engine
    return model


def steer(model: LanguageModel, block: int) -> None:
    """Write into a block what home's modules and another shard's make of its own value."""
    h = model.transformer.h
    inner = h[block].mlp.output
    lens = model.lm_head(model.transformer.ln_f(inner)).softmax(-1).amax(-1, keepdim=True)
    h[block].output[0][:] += h[2 - block].mlp(inner) * lens


def steered(model: LanguageModel) -> None:
    """The first shard asks home, and then the second."""
    with model.trace(PROMPTS[0]):
        steer(model, 0)
        model.logits.save()


def read(model: LanguageModel, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """Values of every site: read, changed, asked for in a block, of gradients, of a generation."""
    with model.trace(PROMPTS, adapter=adapter) as t:
        model.transformer.h[0].output[0][:, -1] *= 2
        hidden = model.transformer.h[2].output[0].save()
        logits = model.lm_head.output.save()
        weight = model.transformer.h[2].attn.c_proj.weight.save()
        del t
    with model.trace(PROMPTS[0], adapter=adapter):
        first = model.transformer.h[0].output[0]
        first.retain_grad()
        steer(model, 1)
        model.lm_head.output[:, -1].sum().backward()
        grad = first.grad.save()
    with model.generate(PROMPTS[0], max_new_tokens=4, adapter=adapter) as t:
        with t.all():
            steer(model, 0)
            steer(model, 2)
        ids = t.result.save()
    return {"hidden": hidden, "logits": logits, "weight": weight, "grad": grad, "ids": ids}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with spread(tiny("gpt2"), [(0, 1), (1, 3)], ADAPTERS, beat_s=0.2) as found:
        yield found


@pytest.mark.slow
def test_it_serves_as_the_whole_model(running: Running) -> None:
    loaded = running.home.loaded
    whole = load(tiny("gpt2"), name="tiny", device="cpu", adapters=ADAPTERS)
    assert fingerprint(loaded.manifest) == fingerprint(whole.manifest)
    assert not any(param.is_meta for param in loaded.model.parameters()), "home has its own weights and no others"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the shards have it: sums are split by threads
    try:
        split, together = language(Engine(loaded)), language(Engine(whole))
        pairs = [(read(split, adapter), read(together, adapter)) for adapter in (None, "a", None)]
    finally:
        torch.set_num_threads(threads)
    for found, expected in pairs:
        for name, value in expected.items():
            assert torch.equal(found[name].detach(), value.detach()), name
    assert not torch.equal(pairs[0][0]["logits"], pairs[1][0]["logits"])
    assert running.home.free_bytes() > 0


@pytest.mark.slow
def test_lanes_share_one_engine_and_keep_apart(running: Running) -> None:
    lanes = [language(Engine(running.home.loaded)) for _ in range(3)]
    (alone, *_) = map(read, lanes)  # each once by itself: what it tries at first is over
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda lane: [read(lane) for _ in range(3)][-1], lanes):
            for name, value in alone.items():
                assert torch.equal(found[name].detach(), value.detach()), name


@pytest.mark.slow
def test_what_a_job_may_do_is_counted_over_all_processes(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Engine.run

    def limited(self: Engine, jobs: list[EngineJob], *args: Any, **kwargs: Any) -> Any:
        return run(self, [replace(job, limits=LIMITS) for job in jobs], *args, **kwargs)

    monkeypatch.setattr(Engine, "run", limited)
    ends = []
    for loaded in (running.home.loaded, load(tiny("gpt2"), name="tiny", device="cpu", adapters=ADAPTERS)):
        model = language(Engine(loaded))
        with pytest.raises(LimitExceeded) as info, model.trace([7, 21, 90, 33, 150, 61]):
            for block in model.transformer.h:
                chosen = block.output.masked_select(block.output > 0)
                (chosen[:, None] @ chosen[None]).sum().save()
        ends.append((info.value.node, info.value.details, info.value.source))
    assert ends[0] == ends[1]
    assert ends[0][0] > 14, "in the last of three blocks, the second of that process"


def test_a_shard_without_a_secret_or_of_no_blocks_is_none() -> None:
    for secret, own, why in ((b"", ["transformer.h.0"], "secret"), (b"s" * 32, [], "a block")):
        with pytest.raises(ValueError, match=why):
            stand(1, secret, str(tiny("gpt2")), own, ["transformer.h.0"], device="cpu")


@pytest.mark.slow
def test_a_shard_that_hangs_ends_the_replica(running: Running) -> None:
    """While the other waits for what it is asked. The last of them: it ends what the others use."""
    model, link = language(Engine(running.home.loaded)), running.home.link
    asked, stopped, own = threading.Event(), threading.Event(), link._own
    assert own is not None

    def slow(name: str, request: Any) -> Any:
        asked.set()
        assert stopped.wait(60)
        return own(name, request)

    link.answer(slow)
    begun = time.monotonic()
    link._silence_s = 3.0
    try:
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(steered, model)
            assert asked.wait(60)
            os.kill(running.shards[2].pid, signal.SIGSTOP)
            stopped.set()
            with pytest.raises(ReplicaLost, match="sign of life"):
                reading.result(90)
        assert time.monotonic() - begun < 90
        with pytest.raises(ReplicaLost):
            running.home.link.check()
        assert running.shards[1].wait(60) == 0, "it ends with its home"
    finally:
        os.kill(running.shards[2].pid, signal.SIGCONT)
