"""A real server for tests: `interpose serve` in processes of its own, gone when the block is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

INTERPOSE = Path(sys.executable).with_name("interpose")


@dataclass(frozen=True)
class Served:
    """A server that is ready. `process` is its supervisor."""

    host: str
    key: str
    data_dir: Path
    process: subprocess.Popen[str]

    @property
    def env(self) -> dict[str, str]:
        return {"INTERPOSE_HOST": self.host, "INTERPOSE_API_KEY": self.key}


def parts(served: Served, mark: str) -> list[psutil.Process]:
    """The server's processes that run, and have `mark` in a word of their command."""
    found = []
    for process in psutil.Process(served.process.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if any(mark in word for word in process.cmdline()) and runs(process):
                found.append(process)
    return found


def runs(process: psutil.Process) -> bool:
    """Whether it is there, and not only because nobody has asked yet how it ended."""
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def serve(
    *models: str, data_dir: Path, options: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> Iterator[Served]:
    """Serve models (`NAME=FOLDER`) on a free port until the block is left."""
    command = [INTERPOSE, "serve", *models, "--port", "0", "--data-dir", data_dir, "--print-env", *options]
    with _running(command, data_dir, env) as served:
        yield served


@contextmanager
def deploy(config: Path, *models: Mapping[str, Any], env: dict[str, str] | None = None) -> Iterator[Served]:
    """`deploy up` of models on a Ray cluster of this machine's own, until the block is left.

    Args:
        config: where to write the file; the server's data lies beside it.
    """
    data_dir = config.with_suffix(".data")
    plain = {"data_dir": str(data_dir), "port": 0, "models": list(models)}
    config.write_text(json.dumps(plain))  # which is YAML, too
    with _running([INTERPOSE, "deploy", "up", config, "--print-env"], data_dir, env) as served:
        yield served


@contextmanager
def _running(command: Sequence[str | Path], data_dir: Path, env: dict[str, str] | None) -> Iterator[Served]:
    log = (data_dir.parent / f"{data_dir.name}.log").open("w+")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | (env or {}))
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(2)]
        if not all(lines):
            log.seek(0)
            raise RuntimeError(f"the server didn't start:\n{log.read()[-4000:]}")
        found = dict(line.split("=", 1) for line in lines)
        yield Served(found["INTERPOSE_HOST"], found["INTERPOSE_API_KEY"], data_dir, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)
        log.close()
        assert process.stdout is not None
        process.stdout.close()
