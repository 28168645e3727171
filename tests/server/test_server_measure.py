"""What is measured of a model at load, and the budget that makes of it."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpose.graph.footprint import Footprint
from interpose.runtime.loading import load, wrap
from interpose_server.settings import Settings
from interpose_server.worker import measure as timing
from interpose_server.worker import memory
from interpose_server.worker.budget import budget, describe, told
from interpose_server.worker.cost import Cost
from interpose_server.worker.measure import Measured, _knee, estimate, measure
from interpose_server.worker.scheduler import Load
from models import tiny
from transformers import AutoModelForCausalLM

WRITES = ("gpt2", "llama", "mamba", "qwen2_vl")


@pytest.fixture(autouse=True)
def own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this thread computes for: whoever else uses the machine takes none of it."""
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=time.thread_time))


@pytest.mark.parametrize("arch", [*WRITES, "bert", "vit"])
def test_forwards_and_steps_are_timed(arch: str) -> None:
    found = measure(load(tiny(arch)), 0.1)
    cost = found.cost
    assert cost.forward_s + cost.token_s > 0 and min(cost.forward_s, cost.token_s, cost.step_s, cost.row_s) >= 0
    assert len(found.points) >= 4 and found.why in ("knee", "time", "memory")
    assert found.tokens is None or found.tokens in dict(found.points)
    assert 0 < cost.token_bytes <= cost.kept_bytes and found.memory_bytes > 0
    assert found.took_s < 20
    # Keys and values of 3 layers, or of a model with a running state whatever that is.
    assert arch != "gpt2" or cost.cache_bytes == 2 * 3 * 64 * 4


def test_a_larger_model_costs_more_and_the_line_foresees_what_was_timed() -> None:
    small, large = (
        measure(load(tiny("llama", hidden_size=size, intermediate_size=4 * size)), 0.5) for size in (64, 512)
    )
    assert large.cost.forward(512) > 2 * small.cost.forward(512)
    tokens, spent = large.points[-1]
    assert 0.3 * spent < large.cost.forward(tokens) < 3 * spent


def test_bytes_a_token_come_from_the_layouts() -> None:
    manifest = load(tiny("gpt2")).manifest
    at_once, kept = estimate(manifest)
    vocab = (manifest.vocab or 0) * 4
    assert at_once >= 2 * vocab and kept >= vocab + 3 * 5 * 64 * 4


def test_nothing_is_measured_of_what_nobody_knows_how_to_run_or_when_told_so() -> None:
    unknown = wrap(torch.nn.Linear(3, 3), "plain")
    for found in (measure(unknown, 1.0), measure(load(tiny("gpt2")), 0.0)):
        assert (found.points, found.tokens, found.cost.forward_s) == ((), None, 0.0)


def test_an_operators_word_counts_more_than_a_measurement(tmp_path: Path) -> None:
    found = Measured(640, 10 << 30, Cost(0.01, 0.0001), took_s=1.0)
    plain = budget(found, Settings(data_dir=tmp_path), shared=True)
    assert (plain.tokens, plain.memory_bytes, plain.seconds, plain.jobs) == (640, 10 << 30, 2.0, 64)
    told_so = Settings(data_dir=tmp_path, batch_tokens=99, batch_memory_bytes=5 << 20, batch_s=0.5)
    own = budget(found, told_so, shared=False)
    assert (own.tokens, own.memory_bytes, own.seconds, own.jobs) == (99, 5 << 20, 0.5, 1)
    assert told(own, found)["forward_tokens"] == 99 and told(own, found)["measured"]["tokens"] == 640
    assert "99 tokens a forward" in describe(own, found) and "measured in 1.0 s" in describe(own, found)
    assert "(20 ms; one row of 16 12 ms" in describe(own, found)
    slow = budget(Measured(640, 10 << 30, Cost(0.18, 0.0001)), Settings(data_dir=tmp_path), shared=True)
    assert "one row of 16 0.18 s" in describe(slow, found)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"max": "max\n", "current": "400000000\n", "stat": "anon 1\ninactive_file 100000000\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_LIMITS", (tuple(str(tmp_path / name) for name in files),))
    model = torch.nn.Linear(2, 2)
    assert memory.free_bytes(model) > 0
    (tmp_path / "max").write_text("500000000\n")
    assert memory.free_bytes(model) == 200_000_000
    (tmp_path / "max").write_text("100\n")
    assert memory.free_bytes(model) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_bytes_a_token_are_what_the_allocator_gave() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny("llama")).to("cuda")
    found = measure(wrap(model, "llama"), 1.0)
    load_ = Load().plus(Footprint(rows=64, longest=64), found.cost)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        model(torch.ones(64, 64, dtype=torch.int64, device="cuda"), use_cache=False)
    assert torch.cuda.max_memory_allocated() - before <= 1.5 * load_.tokens * found.cost.token_bytes


def test_a_slow_moment_is_not_taken_for_the_end_of_what_more_rows_gain(tmp_path: Path) -> None:
    """Ten times too slow throughout, and no cheaper with more rows up to 256 tokens: jobs share all the same."""
    assert _knee([(16, 0.1), (32, 0.4), (64, 0.9), (128, 2.0), (256, 3.0), (512, 5.0), (1024, 9.9)]) == 256
    slow = Measured(None, 10 << 30, Cost(0.4, 0.04, 0.5, 0.1))
    allowed = budget(slow, Settings(data_dir=tmp_path), shared=True)
    assert allowed.most >= 8 * 16 and allowed.seconds > 8
