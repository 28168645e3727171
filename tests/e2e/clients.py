"""Clients of a real server: in this process, and in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from interpose import LanguageModel
from interpose.errors import JobCancelled
from serving import Served
from workloads import slow

HERE = Path(__file__).parent

LONG = 900
"""Steps of `slow` that take a minute or more, of a job that is to be cancelled."""


def next_token_logits(server: Served, model: str = "tiny-gpt2") -> Any:
    """A good job's result, from this process."""
    opened = LanguageModel(model, host=server.host, api_key=server.key)
    with opened.trace("The capital of France is", remote=True, batching="exclusive"):
        logits = opened.output[:, -1].save()
    return np.asarray(logits)


def figures(server: Served) -> dict[str, float]:
    """What /metrics says."""
    text = httpx.get(f"{server.host}/metrics", trust_env=False, timeout=60).text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


@contextmanager
def client(
    server: Served, *args: Any, blocker: bool = False, python: str | Path = sys.executable, **env: str
) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, `python client.py ARGS`; with `blocker`, torch can't be imported there."""
    extra = {"INTERPOSE_BLOCK_TORCH": "1"} if blocker else {}
    process = subprocess.Popen(
        [python, HERE / "client.py", *map(str, args)],
        env=os.environ | server.env | extra | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def held_up(model: Any) -> Iterator[Callable[[], None]]:
    """Keep the model's worker busy, so that what is submitted meanwhile waits together, until the block is left or
    what it gives is called."""
    tracer, _, _ = slow(model, LONG, remote=True, blocking=False, batching="exclusive")
    until(lambda: tracer.job.status == "running")
    try:
        yield tracer.job.cancel
    finally:
        tracer.job.cancel()
        with suppress(JobCancelled):
            tracer.job.result(timeout=90)


def told(process: Any) -> dict[str, Any]:
    """What it says next."""
    line = process.stdout.readline()
    assert line, process.stderr.read()
    facts: dict[str, Any] = json.loads(line)
    return facts


def until(found: Callable[[], Any], seconds: float = 90) -> Any:
    """What `found` gives, once it gives something."""
    ends = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < ends, "waited too long"
        time.sleep(0.05)
    return value
