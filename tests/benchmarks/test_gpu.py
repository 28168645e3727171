"""The script for a GPU: rehearsed without one, run for its figures on one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
SMALL = {"layers": 2, "width": 64, "heads": 4, "kv-heads": 2, "mlp": 112, "vocab": 400, "tokens": 8, "jobs": 4}
PARTS = {"hooks", "batch", "link", "serve"}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def run(*options: str) -> list[str]:
    """The cells of "part: measured: ours | beside | relation | note" of each row it prints as it goes."""
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [
        line for line in done.stdout.splitlines() if line.partition(":")[0] in ("hooks", "batch", "link", "serve")
    ]


@pytest.mark.slow
def test_its_parts_run_without_a_gpu() -> None:
    sizes = [word for name, size in SMALL.items() for word in (f"--{name}", str(size))]
    rows = run("--device", "cpu", "--dtype", "float32", "--repeat", "2", *sizes)
    assert {row.partition(":")[0] for row in rows} == PARTS
    assert all(row.count(" | ") == 3 for row in rows)


@GPU
@pytest.mark.gpu
def test_all_layers_of_an_8b_model_are_at_the_client_within_200_ms() -> None:
    first = run("--parts", "serve")[0]
    took, unit = first.partition(" at the client: ")[2].split()[:2]
    assert unit == "ms" and float(took) < 200, first
