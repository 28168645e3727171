"""A process of many clients, without torch: each is a thread with a key, and so a connection, of its own.

`client.py HOST MODEL FIRST KEY ...`; clients are numbered from FIRST. Each line of its input is a JSON list, and is
answered by one:

- `["forwards", CLIENTS, BEGIN, END]`: so many clients trace without pause until END, on `time.monotonic`'s clock,
  which processes share. Answer: the number of traces that ended between BEGIN and END.
- `["generations", [TIME, ...]]`: the n-th client generates once, from the n-th time on. Answer: seconds that each
  took, from its time on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from interpose import CONFIG, LanguageModel
from interpose import torch as t
from kinds import fill

BLOCKS = 30
TOKENS = 12
WIDTH = 576
NEVER = 49_151
"""A token that no text ends with: every generation has all its steps."""
NEW_TOKENS = 32


def main(host: str, name: str, first: int, keys: Sequence[str]) -> None:
    CONFIG.BACKEND, CONFIG.progress = "numpy", False
    crowd = [(LanguageModel(name, host=host, api_key=key), first + place) for place, key in enumerate(keys)]
    with ThreadPoolExecutor(len(crowd)) as pool:
        for line in sys.stdin:
            what, *given = json.loads(line)
            answer = forwards(pool, crowd, *given) if what == "forwards" else generations(pool, crowd, *given)
            print(json.dumps(answer), flush=True)


def forwards(pool: ThreadPoolExecutor, crowd: Any, clients: int, begin: float, end: float) -> list[int]:
    works = [pool.submit(trace_until, model, index, begin, end) for model, index in crowd[:clients]]
    return [sum(work.result() for work in works)]


def trace_until(model: Any, index: int, begin: float, end: float) -> int:
    counted = 0
    while time.monotonic() < end:
        trace(model, index)
        counted += begin < time.monotonic() <= end
    return counted


def generations(pool: ThreadPoolExecutor, crowd: Any, times: Sequence[float]) -> list[float]:
    works = [pool.submit(partial(generate, *one), at) for one, at in zip(crowd, times, strict=False)]
    return [work.result() for work in works]


def prompt(index: int) -> list[int]:
    return [(37 * index + 11 * place) % 40_000 + 100 for place in range(TOKENS)]


def trace(model: Any, index: int) -> None:
    """One of four kinds of graph, at a block of its own. All need the whole forward: each reads the logits."""
    block = model.model.layers[7 * index % BLOCKS]
    with model.trace(prompt(index), remote=True):
        fill(model, block, index)
        best = t.softmax(model.output[0, -1], dim=-1).topk(5).save()
    assert best.values.shape == (5,)


def generate(model: Any, index: int, at: float) -> float:
    """A generation steered at every step, by a vector and at a block of its own. Seconds from `at` on."""
    time.sleep(max(0.0, at - time.monotonic()))
    vector = np.random.default_rng(index).standard_normal(WIDTH).astype(np.float32) / WIDTH**0.5
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": NEVER}
    with model.generate(prompt(index), remote=True, **options) as tracer:
        with tracer.all():
            model.model.layers[7 * index % BLOCKS].output[0][:, -1] += vector
        ids = tracer.result.save()
    assert ids.shape == (1, TOKENS + NEW_TOKENS)
    return time.monotonic() - at


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
