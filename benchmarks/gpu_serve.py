"""`interpose serve` from this tree, nothing of ours installed."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "from interpose.cli.main import app; app()"


@contextmanager
def served(folder: Path, wanted: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Its address and key. Where its log is, it says if it doesn't start."""
    paths = [str(ROOT / "client"), str(ROOT / "server"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory(prefix="gpu-data-") as data, Path(data, "log").open("w+") as log:
        options = ["--port", "0", "--data-dir", f"{data}/data", "--print-env", "--device", wanted.device]
        command = [sys.executable, "-c", COMMAND, "serve", f"random={folder}", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline().strip() for _ in range(2)]
            if not all(lines):
                log.seek(0)
                raise RuntimeError(f"the server didn't start:\n{log.read()[-4000:]}")
            found = dict(line.split("=", 1) for line in lines)
            yield found["INTERPOSE_HOST"], found["INTERPOSE_API_KEY"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            process.stdout.close()
