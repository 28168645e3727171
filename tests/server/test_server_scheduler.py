"""Which jobs share a forward."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from interpose.graph.footprint import Footprint
from interpose_server.broker.waiting import Waiting
from interpose_server.worker.scheduler import Budget, choose

BUDGET = Budget(jobs=4, rows=8, tokens=64, memory_bytes=1000)


def job(ref: str, *, alone: bool = False, **footprint: Any) -> Waiting:
    return Waiting(ref, Footprint(**footprint), alone, 0)


def test_compatible_jobs_join_the_first() -> None:
    jobs = [job("a", longest=4), job("b", attention=True), job("c", longest=5), job("d", kind="generate")]
    assert choose(jobs, BUDGET) == ["a", "c"]


def test_padding_counts() -> None:
    assert choose([job("a", rows=4, longest=4), job("b", longest=16), job("c")], BUDGET) == ["a", "c"]


def test_exclusive_and_suspected_jobs_go_alone() -> None:
    assert choose([job("a", exclusive=True), job("b")], BUDGET) == ["a"]
    assert choose([job("a", alone=True), job("b")], BUDGET) == ["a"]
    assert choose([job("a"), job("b", exclusive=True), job("c", alone=True), job("d")], BUDGET) == ["a", "d"]


def test_the_first_goes_even_if_it_fits_no_budget() -> None:
    assert choose([job("a", rows=1000, longest=1000), job("b")], BUDGET) == ["a"]
    assert choose([], BUDGET) == []


@given(st.lists(st.builds(Footprint, rows=st.integers(0, 9), longest=st.integers(0, 40)), max_size=12))
def test_batches_keep_to_the_budget(prints: list[Footprint]) -> None:
    jobs = [Waiting(str(index), footprint, False, 0) for index, footprint in enumerate(prints)]
    chosen = [prints[int(ref)] for ref in choose(jobs, BUDGET)]
    assert bool(chosen) == bool(jobs)
    if len(chosen) > 1:
        rows = sum(footprint.rows for footprint in chosen)
        assert len(chosen) <= BUDGET.jobs and rows <= BUDGET.rows
        assert rows * max(footprint.longest for footprint in chosen) <= BUDGET.tokens


def test_it_imports_neither_torch_nor_redis() -> None:
    code = "import sys, interpose_server.worker.scheduler; print({'torch', 'redis'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
