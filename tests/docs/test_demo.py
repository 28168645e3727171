"""`make demo`, as a newcomer meets it: watch, paste the three lines, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from serving import runs

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / ".venv-client" / "bin" / "python"

TRACE = """
with model.trace("The capital of France is", remote=True):
    token = model.output[0, -1].argmax().save()
print(repr(model.tokenizer.decode([int(token)])))
"""


@pytest.fixture
def demo(smollm2: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    subprocess.run([ROOT / "scripts" / "setup", "client"], check=True)
    command = [sys.executable, ROOT / "scripts" / "demo.py", smollm2, CLIENT, tmp_path / "data"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes, text=True, start_new_session=True) as process:
        yield process
        process.kill()


def until(process: subprocess.Popen[str], start: str) -> list[str]:
    """The lines it prints, up to the first that begins like this."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith(start):
            return lines
    raise AssertionError("\n".join(lines))


def ctrl_c(process: subprocess.Popen[str]) -> str:
    """What it prints after Ctrl-C. It and everything it started is gone then."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=90)
    assert process.returncode == 0
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not any(map(runs, alive))
    return rest


@pytest.mark.slow
def test_the_demo_shows_serves_and_ends(demo: subprocess.Popen[str]) -> None:
    shown = until(demo, "Ctrl-C")
    assert any(line.startswith("  as it is  ' Paris'") for line in shown)
    assert any(line.startswith("  patched   ' Rome'") for line in shown)
    assert any("│ 29 " in line and "' Paris'" in line for line in shown)
    first = shown.index("from interpose import CONFIG, LanguageModel")
    pasted = "\n".join(shown[first : first + 3]) + TRACE
    answer = subprocess.run([CLIENT, "-"], input=pasted, capture_output=True, text=True, cwd="/", check=True)
    assert answer.stdout == "' Paris'\n"
    assert ctrl_c(demo).split() == ["stopping", "stopped"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting the embedded", "ready at"])
def test_ctrl_c_at_an_early_moment(demo: subprocess.Popen[str], moment: str) -> None:
    until(demo, moment)
    assert "Traceback" not in ctrl_c(demo)
