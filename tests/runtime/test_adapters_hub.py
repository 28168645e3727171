"""Adapters from a hub, and from what is kept of it; in a process of its own, as both are looked up on import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, Hub, serving_hub
from interpose.errors import ConfigError
from interpose.runtime.adapter_files import folder_of, pinned
from interpose.runtime.loading import load
from lora import lora
from models import tiny

ASK = """
import json, sys
from pathlib import Path
from interpose.errors import InterposeError
from interpose.runtime.loading import load, with_adapters
from sharding import assembled
source, asked = json.loads(sys.argv[1])
whole = load(source, device="cpu")
for adapter, parts in asked:
    try:
        if parts:
            loaded = assembled(Path(source), parts, {"a": adapter})
        else:
            loaded = with_adapters(whole, {"a": adapter})
        print(json.dumps(["loaded", loaded.manifest.adapters["a"].revision]))
    except InterposeError as error:
        print(json.dumps([type(error).__name__, error.details.get("reason"), error.message]))
"""


def ask(home: Path, *asked: tuple[str, int], url: str | None) -> list[list[Any]]:
    """How each loads on a model in so many parts, 0 for one process. Args: url: the hub's; None asks no network."""
    env = os.environ | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"HF_HUB_OFFLINE": "1"} if url is None else {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", ASK, json.dumps([str(tiny("gpt2")), asked])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def kept(home: Path, name: str, folder: Path, commit: str = COMMIT) -> None:
    """A repository as the hub's library keeps it."""
    at = home / "hub" / f"models--{name.replace('/', '--')}"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text(commit)
    shutil.copytree(folder, at / "snapshots" / commit)


@cache
def revision() -> str:
    return load(tiny("gpt2"), device="cpu", adapters={"a": lora("gpt2")}).manifest.adapters["a"].revision


def test_from_what_is_kept_without_a_network(tmp_path: Path) -> None:
    kept(tmp_path, "org/french", lora("gpt2"))
    given = [("org/french", 0), ("org/french", 2), (f"org/french@{COMMIT}", 2)]
    lacking = [("org/french@v9", 0), ("org/other", 2)]
    found = ask(tmp_path, *given, *lacking, url=None)
    assert found[:3] == 3 * [["loaded", revision()]]
    for (source, _), (kind, why, message) in zip(lacking, found[3:], strict=True):
        assert (kind, why) == ("ModelUnavailable", "network")
        assert "'a'" in message and source in message


def test_from_a_hub(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    repos = {"org/french": lora("gpt2"), "org/empty": tmp_path / "empty"}
    given = [("org/french", 2), ("org/french", 0), (f"org/french@{COMMIT}", 0)]
    refused = [
        ("org/french@v9", 0),
        ("org/french@refs/pr/1", 0),
        ("org/gated", 0),
        ("org/gated", 2),
        ("org/none", 0),
    ]
    with serving_hub(Hub(repos, gated={"org/gated"})) as hub:
        found = ask(tmp_path / "home", *given, *refused, ("org/empty", 0), ("org/two words", 0), url=hub.url)
    assert found[:3] == 3 * [["loaded", revision()]]
    assert [(kind, why) for kind, why, _ in found[3:]] == [
        ("ModelUnavailable", "missing"),
        ("ModelUnavailable", "missing"),
        ("ModelUnavailable", "gated"),
        ("ModelUnavailable", "gated"),
        ("ModelUnavailable", "missing"),
        ("ConfigError", "missing"),
        ("ConfigError", "missing"),
    ]


@pytest.mark.parametrize("source", ["./none", "/none/such", "one", "a/b/c", Path("org/french")])
def test_what_is_neither_a_folder_nor_of_a_hub(source: str | Path) -> None:
    with pytest.raises(ConfigError) as info:
        folder_of("a", source)
    assert info.value.details == {"reason": "missing"}


def test_a_folder_is_pinned_as_it_is() -> None:
    assert pinned("a", str(lora("gpt2"))) == str(lora("gpt2"))
