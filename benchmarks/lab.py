"""The models measured on, as folders, and a server that is gone when the block is left."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

import fetch_models  # noqa: E402
import models  # noqa: E402
import serving  # noqa: E402

TINY = "tiny-gpt2"
SMOL = "SmolLM2-135M-Instruct"
PROMPT = "The capital of France is"
CORES = len(os.sched_getaffinity(0))


def tiny() -> Path:
    """A random GPT-2 of 4 layers and 64 dimensions."""
    return models.tiny("gpt2", n_layer=4)


def smol() -> Path:
    return fetch_models.fetch(SMOL)


@contextmanager
def served(name: str, folder: Path, env: dict[str, str] | None = None) -> Iterator[serving.Served]:
    """`interpose serve` of one model, as an operator starts it."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as scratch,
        serving.serve(f"{name}={folder}", data_dir=Path(scratch, "data"), env=env) as server,
    ):
        yield server


_KEPT = ExitStack()


@cache
def tiny_server() -> serving.Served:
    """One that parts share, with room for many connections."""
    return _KEPT.enter_context(served(TINY, tiny(), {"INTERPOSE_SERVER_STREAMS_PER_USER": "2000"}))


@cache
def smol_server() -> serving.Served:
    """One that all parts share. It takes long to load."""
    return _KEPT.enter_context(served(SMOL, smol()))


def close() -> None:
    """End what is shared."""
    tiny_server.cache_clear()
    smol_server.cache_clear()
    _KEPT.close()


def bare(folder: Path, threads: int = 1) -> Any:
    """The model as the transformers library loads it. The tiny one gains nothing from a second thread."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return AutoModelForCausalLM.from_pretrained(folder).eval()
