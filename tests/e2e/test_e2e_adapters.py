"""Adapters on a real server: chosen by each job, beside jobs with others and none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.client import submit_remote
from interpose.errors import UnknownAdapter
from interpose.program import Program
from lora import lora, stock
from models import tiny
from recording import recorded
from serving import Served

FOLDERS = {"first": lora("llama"), "second": lora("llama", 1), None: None}
ROW = [5, 9, 33, 7]


@pytest.fixture(scope="module")
def expected() -> dict[str | None, tuple[torch.Tensor, torch.Tensor]]:
    """Logits and greedily generated ids, as peft has them."""
    found = {}
    ids = torch.tensor([ROW])
    for name, folder in FOLDERS.items():
        model = stock("llama", folder)
        with torch.no_grad():
            new = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False
            )
            found[name] = model(ids).logits, new
    return found


def test_the_manifest_tells_them(open_model: Callable[..., Any]) -> None:
    model = open_model("tiny-llama")
    assert {name: info.rank for name, info in model.adapters.items()} == {"first": 3, "second": 3}
    assert model.adapters["first"].targets == ("down_proj", "o_proj", "q_proj")
    assert open_model("tiny-gpt2").adapters == {}


def test_each_job_has_its_own(open_model: Callable[..., Any], expected: Any) -> None:
    """Many clients at once, forwards and generations that host one another."""
    failures: list[BaseException] = []

    def work(name: str | None) -> None:
        try:
            model = open_model("tiny-llama")
            for turn in range(4):
                exclusive = "exclusive" if turn == 3 else "auto"
                with model.trace(ROW, remote=True, adapter=name, batching=exclusive):
                    logits = model.logits.save()
                with model.generate(ROW, remote=True, adapter=name, max_new_tokens=9) as tracer:
                    ids = tracer.result.save()
                torch.testing.assert_close(logits.detach(), expected[name][0], rtol=0, atol=1e-4)
                assert turn < 3 or torch.equal(logits, expected[name][0])
                assert torch.equal(ids, expected[name][1])
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in (*FOLDERS, *FOLDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_sessions_and_files(open_model: Callable[..., Any], expected: Any, tmp_path: Any) -> None:
    model = open_model("tiny-llama")
    with model.session(remote=True, adapter="first"):
        with model.trace(ROW) as tracer:
            one = tracer.name("logits", model.logits)
        with model.trace(ROW, adapter="second"):
            two = model.logits.save()
        program = tracer.graph
    torch.testing.assert_close(one.detach(), expected["first"][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(two.detach(), expected["second"][0], rtol=0, atol=1e-4)
    again = Program.load(program.save(tmp_path / "x.json")).run(model, adapter="second", remote=True)
    torch.testing.assert_close(again["logits"], expected["second"][0], rtol=0, atol=1e-4)


def test_unknown_ones_are_refused_here_and_there(lab: Served, open_model: Callable[..., Any]) -> None:
    model = open_model("tiny-llama")
    with pytest.raises(UnknownAdapter, match="it has first, second"):
        model.trace(ROW, remote=True, adapter="third")
    other = LanguageModel(str(tiny("llama")), adapters={"third": lora("llama")})
    graph = recorded(other.trace(ROW, adapter="third"), lambda tracer: other.logits.save())
    with pytest.raises(UnknownAdapter, match="it has first, second") as refused:
        submit_remote(graph, "tiny-llama", {}, host=lab.host, api_key=lab.key)
    assert refused.value.details == {"adapters": ["first", "second"]}
