"""Shards as processes of their own, as they are in a cluster."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interpose.runtime.split.building import blocks_of
from interpose_server.shards.assembly import SplitModel, assemble
from interpose_server.shards.process import SECRET


@dataclass
class Running:
    """A split model, and the processes of its shards by site."""

    home: SplitModel
    shards: dict[int, subprocess.Popen[str]]


def start(site: int, source: Path, start_: int, end: int, secret: bytes, **options: Any) -> subprocess.Popen[str]:
    more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "interpose_server.shards.process",
                "--site",
                str(site),
                "--source",
                str(source),
            ),
            *("--blocks", f"{start_}:{end}", "--device", "cpu", "--threads", "1", *more),
        ],
        env={**os.environ, SECRET: secret.hex(), "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def spread(
    source: Path,
    ranges: Sequence[tuple[int, int]],
    adapters: Mapping[str, Path] | None = None,
    **timing: float,
) -> Iterator[Running]:
    """A model over processes of this machine."""
    sources = {name: str(folder) for name, folder in (adapters or {}).items()}
    secret = secrets.token_bytes(32)
    shards = {site: start(site, source, *own, secret) for site, own in enumerate(ranges, 1)}
    try:
        addresses = {}
        for site, shard in shards.items():
            assert shard.stdout is not None
            told = json.loads(shard.stdout.readline())
            addresses[site] = told["host"], told["port"]
        blocks = blocks_of(source)
        parts = [blocks[first:end] for first, end in ranges]
        home = assemble("tiny", str(source), secret, addresses, parts, device="cpu", adapters=sources, **timing)
        try:
            yield Running(home, shards)
        finally:
            home.link.close()
        for shard in shards.values():
            shard.wait(60)
    finally:
        for shard in shards.values():
            if shard.poll() is None:
                shard.kill()
            shard.wait()
            assert shard.stdout is not None
            shard.stdout.close()
