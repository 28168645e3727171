"""A researcher outside, without torch: `outside.py numbers | load N | again JOB ...`. Prints JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import interpose
import numpy as np
from interpose import LanguageModel

PROMPT = "The capital of France is"


def numbers(model: Any) -> dict[str, Any]:
    """A layer in the middle and the last position's logits, as they came over the network."""
    with model.trace(PROMPT, remote=True):
        hidden = model.model.layers[15].output[0][:, -1].save()
        logits = model.output[0, -1].save()
    return {"hidden": np.asarray(hidden)[0].tolist(), "logits": np.asarray(logits).tolist()}


def load(model: Any, count: int) -> dict[str, Any]:
    """Many jobs at once, each a generation with an intervention; says when all are in, then waits for them."""
    jobs, begun = [], time.monotonic()
    for index in range(count):
        with model.generate(f"{PROMPT} {index}", max_new_tokens=24, remote=True, blocking=False) as tracer:
            norm = model.model.layers[15].output[0].norm().save()
            ids = tracer.result.save()
        jobs.append((tracer.job, norm, ids))
    print(json.dumps({"submitted": [job.id for job, *_ in jobs]}), flush=True)
    ended: dict[str, int] = {}
    results = []
    for job, norm, ids in jobs:
        job.result(timeout=300)
        ended[job.status] = ended.get(job.status, 0) + 1
        results.append([float(norm), np.asarray(ids)[0].tolist()])
    return {"ended": ended, "seconds": time.monotonic() - begun, "results": results}


def again(jobs: Sequence[str]) -> dict[str, Any]:
    """Results of jobs that another process submitted."""
    kept = {}
    for job in jobs:
        norm, ids = (value for _, value in sorted(interpose.Job.attach(job).result(timeout=60).items()))
        kept[job] = [float(norm), np.asarray(ids)[0].tolist()]
    return kept


def main(verb: str, *rest: str) -> None:
    assert "torch" not in sys.modules
    if verb == "again":
        print(json.dumps(again(rest)))
        return
    model = LanguageModel("SmolLM2-135M-Instruct")
    print(json.dumps(numbers(model) if verb == "numbers" else load(model, int(rest[0]))))


if __name__ == "__main__":
    main(*sys.argv[1:])
