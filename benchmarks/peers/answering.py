"""A peer's side of `peer.py`: `answering.py NAME PACKAGE ARGUMENT ...` says how long what it is told to do took.

What it can do is what `works` of `of_NAME.py` returns for the arguments. The first line of output is the package's
name and version. Each line of input then names a work; it is done once for the caches' sake, and once measured, or
only the latter after the word `once`.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

Works = Mapping[str, Callable[[], object]]


def main(name: str, package: str, *arguments: str) -> None:
    warnings.simplefilter("ignore")
    # What libraries print is not an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    works: Works = importlib.import_module(f"of_{name}").works(*arguments)
    print(package, version(package), file=answers)
    for line in sys.stdin:
        *once, work = line.split()
        if not once:
            works[work]()
        start = time.perf_counter()
        works[work]()
        print(time.perf_counter() - start, file=answers)


def model(folder: str, threads: str) -> tuple[Any, Any]:
    """The model and its tokenizer, as the transformers library loads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(threads))
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    return loaded, AutoTokenizer.from_pretrained(folder)


def bare(plain: Any, ids: Any) -> Callable[[], object]:
    """The forward without anything around it."""
    import torch

    def work() -> None:
        with torch.no_grad():
            plain(ids)

    return work


if __name__ == "__main__":
    main(*sys.argv[1:])
