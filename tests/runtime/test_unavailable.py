"""What a hub gives, refuses and doesn't have; in a process of its own, as the hub's address is read on import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import COMMIT, Hub, serving_hub
from interpose.runtime.unavailable import reason
from models import tiny

ASK = """
import json, sys
import transformers
from interpose.errors import InterposeError
from interpose.runtime.loading import load
from interpose.runtime.partial_loading import inside, load_part
transformers.utils.logging.disable_progress_bar()
for place, revision in json.loads(sys.argv[1]):
    try:
        loaded = load(place, revision=revision, device="cpu")
        load_part(place, inside(["transformer.h.1"]), revision=revision, device="cpu")
        print(json.dumps(["loaded", loaded.manifest.revision]))
    except InterposeError as error:
        print(json.dumps([type(error).__name__, error.details.get("reason")]))
"""


def ask(url: str, home: Path, *places: tuple[str, str | None]) -> list[list[str]]:
    env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", ASK, json.dumps(places)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_and_its_cache(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving_hub(Hub({"org/tiny": tiny("gpt2")}, gated={"org/gated"})) as hub:
        first = ask(
            hub.url,
            home,
            ("org/gated", None),
            ("org/none", None),
            ("org/tiny", "v9"),
            ("org/tiny", COMMIT),
            ("/no/such", None),
        )
    (_, revision) = first.pop(3)
    assert first == [
        ["ModelUnavailable", "gated"],
        ["ModelUnavailable", "missing"],
        ["ModelUnavailable", "missing"],
        ["ConfigError", "missing"],
    ]
    # The hub is gone; what is in the folder that nodes share comes from there.
    assert ask(hub.url, home, ("org/tiny", COMMIT), ("org/other", None)) == [
        ["loaded", revision],
        ["ModelUnavailable", "network"],
    ]


@pytest.mark.parametrize("error, word", [(MemoryError(), "memory"), (TimeoutError(), "network"), (OSError(), None)])
def test_reasons(error: BaseException, word: str | None) -> None:
    assert reason(error) == word
    outer = RuntimeError()
    outer.__cause__ = error
    assert reason(outer) == word
