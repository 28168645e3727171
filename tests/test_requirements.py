"""What the images install: the extras, without what they don't need."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def needed(*extras: str) -> set[str]:
    """Names of the packages that the script lists."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "requirements.py", *extras], capture_output=True, text=True, check=True
    )
    return {re.split(r"[\[><=]", line)[0].lower() for line in done.stdout.split()}


def test_a_gateway_needs_no_torch() -> None:
    assert needed() < needed("gateway") < needed("server") < needed("cluster")
    assert {"fastapi", "redis"} <= needed("gateway")
    assert not needed("gateway") & {"torch", "transformers", "ray"}
    assert {"torch", "ray"} <= needed("cluster")


def test_the_gateway_and_the_commands_load_without_torch() -> None:
    code = "import sys, interpose_server.gateway, interpose.cli.server; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "accelerate", "ray"}


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert {name.replace("_", "-") for name in needed("cluster")} <= pinned
