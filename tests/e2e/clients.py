"""Clients of a real server: in this process, and in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from interpose import LanguageModel
from serving import Served

HERE = Path(__file__).parent


def next_token_logits(server: Served, model: str = "tiny-gpt2") -> Any:
    """A good job's result, from this process."""
    opened = LanguageModel(model, host=server.host, api_key=server.key)
    with opened.trace("The capital of France is", remote=True, batching="exclusive"):
        logits = opened.output[:, -1].save()
    return np.asarray(logits)


def figures(server: Served) -> dict[str, float]:
    """What /metrics says."""
    text = httpx.get(f"{server.host}/metrics", trust_env=False).text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def start(server: Served, *args: Any, blocker: bool = False, **env: str) -> subprocess.Popen[str]:
    """A client in a process of its own: `python client.py ARGS`. With `blocker`, torch can't be imported there."""
    command = [sys.executable, HERE / "client.py", *map(str, args)]
    extra = {"INTERPOSE_BLOCK_TORCH": "1"} if blocker else {}
    return subprocess.Popen(
        command,
        env=os.environ | server.env | extra | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def held_up(model: Any) -> Iterator[None]:
    """Keep the model's worker busy for about a second, so that what is submitted meanwhile waits together."""
    with model.trace([1], remote=True, blocking=False, batching="exclusive") as tracer:
        value = model.output.mean() + np.eye(1600, dtype=np.float32)
        for _ in range(6):
            value = value @ value
        value.mean().save()
    yield
    tracer.job.result()


def told(client: Any) -> dict[str, Any]:
    line = client.stdout.readline()
    assert line, client.stderr.read()
    facts: dict[str, Any] = json.loads(line)
    return facts
