"""One client of many, a process of its own without torch: runs jobs one after another when told to.

`client.py HOST KEY MODEL INDEX`; each line "SECONDS" on its input is answered by "JOBS SECONDS": jobs completed,
and the time up to the end of the last.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from interpose import CONFIG, LanguageModel
from interpose import torch as t

BLOCKS = 30
TOKENS = 12


def main(host: str, key: str, name: str, index: int) -> None:
    CONFIG.BACKEND, CONFIG.progress = "numpy", False
    model = LanguageModel(name, host=host, api_key=key)
    prompt = [(37 * index + 11 * place) % 40_000 + 100 for place in range(TOKENS)]
    for line in sys.stdin:
        start, end, jobs = time.perf_counter(), float(line), 0
        while (spent := time.perf_counter() - start) < end:
            job(model, prompt, index)
            jobs += 1
        spent = time.perf_counter() - start
        print(jobs, spent, flush=True)


def job(model: Any, prompt: list[int], index: int) -> None:
    """One of four kinds of graph, at a block of its own. All need the whole forward: each reads the logits."""
    block = model.model.layers[7 * index % BLOCKS]
    with model.trace(prompt, remote=True):
        match index % 4:
            case 0:
                block.output[0][0, -1].save()
            case 1:
                block.output[0][:, -1] *= 1.5
            case 2:
                block.mlp.output[:] = 0
            case _:
                model.lm_head(model.model.norm(block.output[0][:, -1])).argmax(dim=-1).save()
        best = t.softmax(model.output[0, -1], dim=-1).topk(5).save()
    assert best.values.shape == (5,)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
