"""Clients with and without torch: the same bytes, in the arrays or tensors each has."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clients import HERE, client, told
from serving import Served

ROOT = HERE.parent.parent
PROMPT = "The capital of France is"


@pytest.fixture(scope="session")
def torch_free() -> Path:
    """The interpreter of an environment into which only the client was installed."""
    subprocess.run([ROOT / "scripts" / "setup", "client"], check=True, stdout=subprocess.DEVNULL)
    return ROOT / ".venv-client" / "bin" / "python"


def same_as_with_torch(open_model: Callable[..., Any], path: Path) -> None:
    """What the other process wrote, against tensors of this one."""
    model, half = open_model("tiny-llama"), open_model("tiny-llama-bf16")
    with model.trace(PROMPT, remote=True):
        model.model.layers[2].output[0][:, -1] += torch.ones(64)
        logits = model.output.save()
    layer, direction = model.model.layers[1], np.linspace(-1, 1, 64, dtype=np.float32)
    with model.trace(PROMPT, remote=True):
        sure = model.lm_head(model.model.norm(layer.mlp.output)).softmax(-1).amax(-1, keepdim=True)
        layer.output[0][:] += sure * direction
        steered = model.logits.save()
    with half.trace(PROMPT, remote=True):
        low = half.model.layers[1].output[0].save()
    assert isinstance(low, torch.Tensor) and low.dtype == torch.bfloat16 and logits.dtype == torch.float32
    found = np.load(path)
    assert np.array_equal(found["logits"], logits.numpy())
    assert np.array_equal(found["steered"], steered.numpy())
    assert np.array_equal(found["low"], low.view(torch.uint16).numpy())
    assert torch.nn.Parameter(low * 2).requires_grad


def test_torch_blocked(lab: Served, open_model: Callable[..., Any], tmp_path: Path) -> None:
    with client(lab, "numpy", tmp_path / "found.npz", blocker=True) as process:
        assert told(process) == {"done": True}
    same_as_with_torch(open_model, tmp_path / "found.npz")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torch_not_installed(lab: Served, open_model: Callable[..., Any], tmp_path: Path, torch_free: Path) -> None:
    with client(lab, "numpy", tmp_path / "found.npz", python=torch_free) as process:
        assert told(process) == {"done": True}
    same_as_with_torch(open_model, tmp_path / "found.npz")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_importing_takes_no_time(torch_free: Path) -> None:
    code = "import sys, interpose; assert not {'torch', 'httpx', 'websockets'} & set(sys.modules)"
    for python in (Path(sys.executable), torch_free):
        costs = []
        for _ in range(5):
            # Processor time: what importing takes, however busy the machine is beside it.
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([python, "-c", code], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert statistics.median(costs) < 0.5
