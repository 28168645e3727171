"""Other libraries, each in a process of its own environment, timed between our own runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

HERE = Path(__file__).with_name("peers")
sys.path.append(str(HERE))

from install import PEERS, python_of  # noqa: E402


class Peer:
    """A library that answers. `label`: its name and version."""

    def __init__(self, process: subprocess.Popen[str], label: str) -> None:
        self._process = process
        self.label = label

    def seconds(self, work: str, *, once: bool = False) -> float:
        """How long a work of its script took. It is done once before, to warm up, unless `once`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print("once " * once + work, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


@contextmanager
def peer(name: str, *arguments: object) -> Iterator[Peer | None]:
    """A peer that is ready, or None, with a word, if its environment isn't there or doesn't work."""
    python = python_of(name)
    if not python.exists():
        print(f"{name} isn't installed: `make peers` installs it", file=sys.stderr, flush=True)
        yield None
        return
    package = PEERS[name].partition("==")[0]
    command = [python, HERE / "answering.py", name, package, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"WANDB_MODE": "disabled"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        label = process.stdout.readline().strip()
        if label:
            yield Peer(process, label)
        else:
            _, said = process.communicate()
            print(f"{name} doesn't run: {said.strip().rsplit(chr(10), 1)[-1]}", file=sys.stderr, flush=True)
            yield None
    finally:
        if process.poll() is None:
            process.communicate("")


@contextmanager
def peers(*arguments: object) -> Iterator[list[Peer]]:
    """All that are there, with the same arguments."""
    with ExitStack() as stack:
        found = [stack.enter_context(peer(name, *arguments)) for name in PEERS]
        yield [one for one in found if one is not None]
