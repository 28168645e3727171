"""A client process: `client.py RUN MODEL PROGRAM FILE` and others; the server comes from the environment.

Says on stdout, as lines of JSON, what happened. With INTERPOSE_BLOCK_TORCH set, torch can't be imported.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

if os.environ.get("INTERPOSE_BLOCK_TORCH"):
    sys.modules["torch"] = None  # type: ignore[assignment]

import numpy as np
from interpose import LanguageModel
from interpose.errors import InterposeError
from programs import PROGRAMS


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
        saved = PROGRAMS[program](model, remote=True)
    except InterposeError as error:
        say(error=described(error))
        return
    say(types={key: [type(value).__module__, str(value.dtype)] for key, value in saved.items()})
    np.savez(path, **{key: np.asarray(value) for key, value in saved.items()})


def main() -> None:
    verb, *args = sys.argv[1:]
    {"run": run}[verb](*args)


if __name__ == "__main__":
    main()
