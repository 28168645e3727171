"""Which jobs share a forward."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from interpose.graph.footprint import Footprint
from interpose_server.broker.waiting import Waiting
from interpose_server.worker.cost import Cost, line
from interpose_server.worker.scheduler import Budget, Load, Place, Turn, UnderWay, batches, between, choose

BUDGET = Budget(jobs=4, rows=8, tokens=64, memory_bytes=1000)


def job(ref: str, *, alone: bool = False, **footprint: Any) -> Waiting:
    return Waiting(ref, Footprint(**footprint), alone, 0)


def test_compatible_jobs_join_the_first() -> None:
    jobs = [job("a", longest=4), job("b", attention=True), job("c", longest=5), job("d", kind="generate")]
    assert choose(jobs, BUDGET) == ["a", "c"]


def test_jobs_of_other_adapters_run_apart() -> None:
    chosen = [("",), ("a",), ("b",), ("a",), ("",), ("", "a")]
    jobs = [job(str(index), adapters=adapters) for index, adapters in enumerate(chosen)]
    assert batches(jobs, BUDGET) == [["0", "4"], ["1", "3"], ["2"], ["5"]]
    running = [Footprint(kind="generate", adapters=("a",))]
    coming = [job(str(index), kind="generate", adapters=adapters) for index, adapters in enumerate(chosen)]
    assert between(coming[1:], UnderWay(running, joinable=True), BUDGET) == Turn(["1", "3"], Place.JOINS)
    assert between(coming, UnderWay(running, joinable=True), BUDGET).place is not Place.JOINS
    plain = Footprint(adapters=("", "a")).to_plain()
    assert Footprint.from_plain(json.loads(json.dumps(plain))) == Footprint(adapters=("", "a"))
    del plain["adapters"]
    assert Footprint.from_plain(plain).adapters == ("",), "queued before there were any"


def test_padding_counts() -> None:
    assert choose([job("a", rows=4, longest=4), job("b", longest=16), job("c")], BUDGET) == ["a", "c"]


def test_exclusive_and_suspected_jobs_go_alone() -> None:
    assert choose([job("a", exclusive=True), job("b")], BUDGET) == ["a"]
    assert choose([job("a", alone=True), job("b")], BUDGET) == ["a"]
    assert choose([job("a"), job("b", exclusive=True), job("c", alone=True), job("d")], BUDGET) == ["a", "d"]


def test_the_first_goes_even_if_it_fits_no_budget() -> None:
    assert choose([job("a", rows=1000, longest=1000), job("b")], BUDGET) == ["a"]
    assert choose([], BUDGET) == []


COST = Cost(forward_s=0.05, token_s=0.002, step_s=0.04, row_s=0.01, token_bytes=100, kept_bytes=400, cache_bytes=20)
TIMED = Budget(jobs=16, rows=32, tokens=400, memory_bytes=60_000, seconds=0.6, cost=COST)
OPEN = replace(TIMED, jobs=10**6, rows=10**6, tokens=10**9, memory_bytes=10**12, seconds=math.inf)


def test_jobs_of_like_lengths_share_a_forward_where_that_is_faster() -> None:
    jobs = [job(str(index), longest=12 if index % 2 else 90) for index in range(8)]
    assert choose(jobs, OPEN) == ["0", "2", "4", "6"]
    assert batches(jobs, OPEN) == [["0", "2", "4", "6"], ["1", "3", "5", "7"]]
    assert choose(jobs, replace(OPEN, cost=replace(COST, forward_s=5.0))) == [str(index) for index in range(8)]


def test_a_budget_says_how_large_a_forward_can_be() -> None:
    assert TIMED.most in (274, 275), "what 0.6 s are enough for"
    assert replace(TIMED, tokens=100).most == 100
    assert replace(TIMED, memory_bytes=5_000).most == 50
    assert replace(TIMED, seconds=0.01).most == 1
    assert replace(OPEN, tokens=7).most == 7


def test_prompts_count_for_the_forward_and_new_tokens_for_the_cache() -> None:
    generation = Footprint(kind="generate", rows=2, longest=110, steps=100, memory_bytes=5)
    load = Load().plus(generation, COST)
    assert (load.tokens, load.kept_bytes) == (20, 5 + 2 * 110 * 20)
    assert load.under_way().tokens == 0
    many = [job(str(index), kind="generate", longest=110, steps=100) for index in range(40)]
    assert len(choose(many, TIMED)) == 16, "as many as jobs are allowed, though all their positions are 1,760"


def test_a_small_job_is_one_that_a_forward_of_the_budget_could_be() -> None:
    assert TIMED.small(Footprint(longest=5000)), "nobody can divide a forward"
    assert TIMED.small(Footprint(runs=4, longest=12, tokens=48))
    assert not TIMED.small(Footprint(runs=100, longest=12, tokens=1200))
    assert TIMED.small(Footprint(kind="generate", longest=20, steps=8))
    assert not TIMED.small(Footprint(kind="generate", longest=200, steps=180))


def test_a_line_near_points() -> None:
    fixed, each = line([(tokens, 0.03 + 0.002 * tokens) for tokens in (16, 32, 64, 512)])
    assert math.isclose(fixed, 0.03, rel_tol=1e-6) and math.isclose(each, 0.002, rel_tol=1e-6)
    assert line([]) == (0.0, 0.0) and line([(16, 0.5)]) == (0.5, 0.0)
    for points in ([(16, 0.5), (32, 0.4)], [(16, 0.1), (32, 0.9)]):
        assert min(line(points)) >= 0, "neither is negative, whatever noise says"


footprints = st.lists(
    st.builds(
        Footprint,
        kind=st.sampled_from(["trace", "trace", "generate"]),
        rows=st.integers(0, 9),
        longest=st.integers(1, 200),
        gradients=st.booleans(),
        exclusive=st.sampled_from([False, False, False, True]),
        memory_bytes=st.integers(0, 20_000),
    ),
    max_size=24,
)
budgets = st.builds(
    replace,
    st.just(TIMED),
    jobs=st.integers(1, 12),
    rows=st.integers(1, 40),
    tokens=st.integers(1, 2000),
    seconds=st.sampled_from([0.1, 1.0, math.inf]),
    cost=st.sampled_from([COST, Cost(), replace(COST, forward_s=1.0), replace(COST, forward_s=0.0)]),
)


def as_waiting(prints: Sequence[Footprint]) -> list[Waiting]:
    return [Waiting(f"u{index % 3}/{index}", footprint, False, 0) for index, footprint in enumerate(prints)]


@settings(max_examples=200)
@given(footprints, budgets)
def test_batches_keep_to_the_budget_and_to_the_order(prints: list[Footprint], budget: Budget) -> None:
    jobs = as_waiting(prints)
    chosen = choose(jobs, budget)
    assert chosen == choose(jobs, budget), "the same jobs, the same batch"
    assert chosen[:1] == [job.ref for job in jobs[:1]], "the fairest goes"
    assert chosen == [job.ref for job in jobs if job.ref in chosen], "in the order given"
    if len(chosen) > 1:
        load = Load()
        for one in jobs:
            load = load.plus(one.footprint, budget.cost) if one.ref in chosen else load
        assert load.within(budget)
        assert load.jobs <= budget.jobs and load.rows <= budget.rows and load.tokens <= budget.tokens
        assert load.seconds(budget.cost) <= budget.seconds and load.kept_bytes <= budget.memory_bytes


@given(footprints, budgets)
def test_nobody_starves(prints: list[Footprint], budget: Budget) -> None:
    """Every batch takes the fairest: a job waits for those before it at most, whoever comes later."""
    jobs = as_waiting(prints)
    found = batches(jobs, budget)
    assert sorted(ref for refs in found for ref in refs) == sorted(job.ref for job in jobs)
    gone: set[str] = set()
    for refs in found:
        assert refs[0] == next(job.ref for job in jobs if job.ref not in gone)
        gone |= {*refs}


@given(st.lists(st.builds(Footprint, rows=st.integers(1, 4), longest=st.integers(1, 300)), min_size=1, max_size=12))
def test_lengths_are_grouped_so_that_all_take_least_time(prints: list[Footprint]) -> None:
    jobs = as_waiting(prints)
    by_ref = {job.ref: job.footprint for job in jobs}

    def takes(several: list[list[str]]) -> float:
        loads = []
        for refs in several:
            load = Load()
            for ref in refs:
                load = load.plus(by_ref[ref], COST)
            loads.append(load.seconds(COST))
        return sum(loads)

    refs = [job.ref for job in jobs]
    least = takes(batches(jobs, OPEN)) - 1e-9
    assert least <= takes([refs]) and least <= takes([[ref] for ref in refs])
    ordered = sorted(refs, key=lambda ref: by_ref[ref].longest)
    assert all(least <= takes([ordered[:cut], ordered[cut:]]) for cut in range(1, len(ordered)))


def test_it_imports_neither_torch_nor_redis() -> None:
    code = "import sys, interpose_server.worker.scheduler; print({'torch', 'redis'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
