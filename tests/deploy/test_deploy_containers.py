"""Images and compose file for real, where that is asked for: `INTERPOSE_CONTAINERS=1 pytest tests/deploy`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not os.environ.get("INTERPOSE_CONTAINERS"), reason="INTERPOSE_CONTAINERS isn't set: takes minutes"
)
@pytest.mark.skipif(shutil.which("podman") is None, reason="no podman")
def test_the_stack_comes_up_and_survives(smollm2: Path) -> None:
    command = [sys.executable, ROOT / "deploy" / "try", "--models", smollm2.parent]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.endswith("everything that was tried works\n")
