"""Ten clients at once, one of them failing: nobody sees anybody."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import client, figures, held_up, told, until
from serving import Served
from workloads import EVERY, MORE, PROGRAMS

FAILING = {"out_of_range", "late_failure"}
TWICE = [*MORE, *MORE]


@pytest.mark.parametrize(
    ("name", "programs", "most"),
    [("tiny-gpt2", list(PROGRAMS), 6), ("tiny-llama", list(PROGRAMS), 6), ("tiny-gpt2", TWICE, 9)],
    ids=["traces on gpt2", "traces on llama", "other kinds"],
)
def test_each_gets_what_it_would_get_alone(
    name: str, programs: list[str], most: int, lab: Served, open_model: Callable[..., Any], tmp_path: Path
) -> None:
    """`most`: batches in which they may run; one holds them up, and who comes first is claimed alone meanwhile."""
    model = open_model(name)
    alone = {program: EVERY[program](model, remote=True, batching="exclusive") for program in {*programs} - FAILING}
    files = [tmp_path / f"{index}.npz" for index in range(len(programs))]
    with ExitStack() as stack:
        clients = [
            stack.enter_context(client(lab, "run", name, program, file, INTERPOSE_BACKEND="numpy"))
            for program, file in zip(programs, files, strict=True)
        ]
        for process in clients:
            assert told(process)["ready"]
        before = figures(lab)
        with held_up(model) as let_go:
            for process in clients:
                process.stdin.write("go\n")
                process.stdin.flush()
            accepted = f'interpose_jobs_total{{model="{name}"}}'
            until(lambda: figures(lab)[accepted] == before[accepted] + len(clients) + 1)
            let_go()
            answers = [told(process) for process in clients]
        for process in clients:
            assert process.wait(90) == 0
    for program, file, answer in zip(programs, files, answers, strict=True):
        if program in FAILING:
            error = answer["error"]
            assert (error["code"], error["cls"]) == ("index_out_of_range", "IndexOutOfRange")
            assert error["line"] == failing_line(EVERY[program])
            continue
        assert "types" in answer, (program, answer)
        found = np.load(file)
        assert sorted(found) == sorted(alone[program])
        for key, value in alone[program].items():
            close(found[key], np.asarray(value), f"{program}: {key}")
    shared(before, lab, name, len(programs) + 1, most)


def failing_line(program: Callable[..., Any]) -> int:
    lines, first = inspect.getsourcelines(program)
    return first + next(index for index, line in enumerate(lines) if "# the failing line" in line)


def close(found: Any, expected: Any, what: str) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    assert np.isfinite(expected).all() and np.abs(expected).max() > 0, what
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), what


def shared(before: dict[str, float], lab: Served, name: str, jobs: int, most: int) -> None:
    """Prove by the worker's own figures that forwards were shared, and that none had to be taken apart."""

    def grown(figure: str) -> float:
        key = f'{figure}{{model="{name}"}}'
        return figures(lab)[key] - before[key]

    until(lambda: grown("interpose_batched_jobs") == jobs)
    assert grown("interpose_batches") <= most
    assert "run apart" not in lab.data_dir.with_name(f"{lab.data_dir.name}.log").read_text()
