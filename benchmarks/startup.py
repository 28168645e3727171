"""From `interpose serve` to the first result, beside a fresh Python that loads the model and runs it once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from interpose import LanguageModel
from lab import PROMPT, TINY, served, tiny
from latency import trace
from table import Row
from timing import Effort, interleaved, ratio, seconds

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2], return_tensors="pt")
with torch.no_grad():
    AutoModelForCausalLM.from_pretrained(sys.argv[1])(**ids)
"""


def measure(effort: Effort) -> Iterator[Row]:
    folder = tiny()
    works = (partial(first_result, folder), partial(load, folder))
    ours, beside = interleaved(effort.starts, *works, warm=0)
    yield Row(
        "start to first result", f"{median(ours):.1f} s", f"bare load and forward {median(beside):.1f} s",
        f"{ratio(ours, beside):.1f}x", "tiny GPT-2; the client runs already",
    )  # fmt: skip


def first_result(folder: Path) -> float:
    """The server's end isn't counted."""
    start = time.perf_counter()
    with served(TINY, folder) as server:
        trace(LanguageModel(TINY, host=server.host, api_key=server.key))
        return time.perf_counter() - start


def load(folder: Path) -> float:
    command = [sys.executable, "-c", LOAD, str(folder), PROMPT]
    return seconds(lambda: subprocess.run(command, check=True, stderr=subprocess.DEVNULL))
