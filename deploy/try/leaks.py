"""Where secrets must not be: logs, command lines, what images carry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import images
from machine import run, say
from stack import Stack


def lines() -> dict[str, str]:
    """Of every process on this machine but this one: its id -> its command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if path.parent.name != str(os.getpid()):
            try:
                found[path.parent.name] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # It has ended.
    return found


def carried(image: str) -> str:
    """An image's history, environment and labels."""
    return run("podman", "history", "--no-trunc", image) + run("podman", "image", "inspect", image)


def check(stack: Stack, others: Mapping[str, str]) -> None:
    """Raises AssertionError where a secret of the stack's .env, or one of `others`, is found."""
    secrets = {**stack.secrets(), **others}
    texts = {f"the log of {service}": stack.logs(service, lines=None) for service in stack.users()}
    texts |= {f"the command line of process {pid}": line for pid, line in lines().items()}
    texts |= {f"the image of {name}": carried(f"localhost/interpose-{name}:try") for name in images.OURS}
    leaks = [(name, where) for name, value in secrets.items() for where, text in texts.items() if value in text]
    assert not leaks, leaks
    say(f"none of {len(secrets)} secrets is in {len(texts)} logs, command lines and images' histories")
