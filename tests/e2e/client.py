"""A client process: `client.py RUN MODEL PROGRAM FILE` and others; the server comes from the environment.

Says on stdout, as lines of JSON, what happened. With INTERPOSE_BLOCK_TORCH set, torch can't be imported.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

if os.environ.get("INTERPOSE_BLOCK_TORCH"):
    sys.modules["torch"] = None  # type: ignore[assignment]

import numpy as np
from interpose import LanguageModel, torch
from interpose.errors import InterposeError
from interpose.job import Job
from workloads import EVERY, slow

PROMPT = "The capital of France is"

# What a shell starts in the background ignores Ctrl-C, and so would this, if the tests were started that way.
signal.signal(signal.SIGINT, signal.default_int_handler)


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def described(error: InterposeError) -> dict[str, Any]:
    line = error.source.line if error.source else None
    return {"code": error.code, "cls": type(error).__name__, "line": line, "message": error.message}


def run(name: str, program: str, path: str) -> None:
    """Run a program once a line comes on stdin, and write what it saved to a file."""
    model = LanguageModel(name)
    model.tokenizer.encode("warm")
    say(ready=True)
    sys.stdin.readline()
    try:
        saved = EVERY[program](model, remote=True)
    except InterposeError as error:
        say(error=described(error))
        return
    say(types={key: [type(value).__module__, str(value.dtype)] for key, value in saved.items()})
    np.savez(path, **{key: np.asarray(value) for key, value in saved.items()})


def numpy(path: str) -> None:
    """Use saved values as NumPy users do, where torch isn't; write the bytes they hold."""
    import ml_dtypes

    assert sys.modules.get("torch") is None
    model, half = LanguageModel("tiny-llama"), LanguageModel("tiny-llama-bf16")
    with model.trace(PROMPT, remote=True):
        hidden = model.model.layers[1].output[0].save()
        model.model.layers[2].output[0][:, -1] += np.ones(64, dtype=np.float32)
        logits = model.output.save()
        top = torch.softmax(model.output[0, -1], dim=-1).topk(3).save()
    layer, direction = model.model.layers[1], np.linspace(-1, 1, 64, dtype=np.float32)
    with model.trace(PROMPT, remote=True):
        sure = model.lm_head(model.model.norm(layer.mlp.output)).softmax(-1).amax(-1, keepdim=True)
        layer.output[0][:] += sure * direction
        steered = model.logits.save()
    with half.trace(PROMPT, remote=True):
        low = half.model.layers[1].output[0].save()
    array = np.asarray(hidden)
    assert type(array) is np.ndarray and array.dtype == np.float32 and array.shape == hidden.shape
    assert np.array_equal(hidden[0, -1], array[0, -1]) and len(hidden) == 1
    assert np.array_equal(hidden * 2 + 1, array * 2 + 1) and np.array_equal(2 - hidden, 2 - array)
    assert np.array_equal(np.exp(hidden), np.exp(array)) and np.array_equal(hidden @ array[0].T, array @ array[0].T)
    assert float(hidden.mean()) == float(array.mean()) and int(logits[0, -1].argmax()) == int(top.indices[0])
    hidden[0, 0] = 0
    assert not array[0, 0].any()
    assert low.dtype == ml_dtypes.bfloat16 and np.asarray(low).dtype == ml_dtypes.bfloat16
    assert np.isfinite(np.asarray(low, dtype=np.float32)).all()
    assert sys.modules.get("torch") is None
    np.savez(path, logits=np.asarray(logits), steered=np.asarray(steered), low=np.asarray(low).view(np.uint16))
    say(done=True)


def submit(name: str) -> None:
    """Hand in a job and say its id; then wait to be killed."""
    model = LanguageModel(name)
    with model.trace(PROMPT, remote=True, blocking=False) as tracer:
        model.output[:, -1].save()
    say(job=tracer.job.id)
    sys.stdin.readline()


def attach(job: str) -> None:
    """Take over another process's job."""
    found = Job.attach(job)
    values = found.result(timeout=60)
    say(
        status=str(found.status),
        values={node: np.asarray(value).ravel().tolist() for node, value in values.items()},
    )


def block(name: str) -> None:
    """Run a slow job and wait for it, until Ctrl-C."""
    model = LanguageModel(name)
    try:
        slow(model, remote=True)
    except KeyboardInterrupt:
        say(interrupted=True)


def main() -> None:
    verb, *args = sys.argv[1:]
    {"run": run, "numpy": numpy, "submit": submit, "attach": attach, "block": block}[verb](*args)


if __name__ == "__main__":
    main()
