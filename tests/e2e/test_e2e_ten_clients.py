"""Ten clients at once, one of them failing: nobody sees anybody."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import workloads
from clients import client, figures, held_up, told, until
from serving import Served
from workloads import PROGRAMS


def failing_line() -> int:
    lines, first = inspect.getsourcelines(workloads.out_of_range)
    return first + next(index for index, line in enumerate(lines) if "# the failing line" in line)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_each_gets_what_it_would_get_alone(
    name: str, lab: Served, open_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = open_model(name)
    good = [program for program in PROGRAMS if program != "out_of_range"]
    alone = {program: PROGRAMS[program](model, remote=True, batching="exclusive") for program in good}
    with ExitStack() as stack:
        clients = {
            program: stack.enter_context(
                client(lab, "run", name, program, tmp_path / f"{program}.npz", INTERPOSE_BACKEND="numpy")
            )
            for program in PROGRAMS
        }
        for process in clients.values():
            assert told(process)["ready"]
        before = figures(lab)
        with held_up(model):
            for process in clients.values():
                process.stdin.write("go\n")
                process.stdin.flush()
            answers = {program: told(process) for program, process in clients.items()}
        for process in clients.values():
            assert process.wait(30) == 0
    error = answers.pop("out_of_range")["error"]
    assert (error["code"], error["cls"], error["line"]) == ("index_out_of_range", "IndexOutOfRange", failing_line())
    for program in answers:
        found = np.load(tmp_path / f"{program}.npz")
        assert sorted(found) == sorted(alone[program])
        for key, value in alone[program].items():
            close(found[key], np.asarray(value), f"{program}: {key}")
    shared(before, lab, name)


def close(found: Any, expected: Any, what: str) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    assert np.isfinite(expected).all() and np.abs(expected).max() > 0, what
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), what


def shared(before: dict[str, float], lab: Served, name: str) -> None:
    """Prove by the worker's own figures that forwards were shared, and that none had to be taken apart."""

    def grown(figure: str) -> float:
        key = f'{figure}{{model="{name}"}}'
        return figures(lab)[key] - before[key]

    until(lambda: grown("interpose_batched_jobs") == len(PROGRAMS) + 1)
    assert grown("interpose_batches") <= 5
    assert "run apart" not in lab.data_dir.with_name(f"{lab.data_dir.name}.log").read_text()
