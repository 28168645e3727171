"""What the link leaves of pipelining: `python benchmarks/paced.py`, a table.

Parts of a model as `shards.py` has them, but each computes nothing and takes a fixed time, as a device of its own
would; so a machine of few cores shows what several devices would gain from batches in flight. Hidden states of a
real size travel over real sockets between real processes.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from interpose.runtime.split.route import BlockCall, Mail, Visit
from interpose_server.shards.link import Link
from interpose_server.shards.process import SECRET
from interpose_server.shards.standing import Standing
from table import Row, markdown
from timing import interleaved, ratio
from torch import Tensor

VISIT_S = 0.05
HIDDEN = (4, 128, 4096)
"""8 MB in float32: four rows of 128 tokens of a model as wide as an 8B one."""
ROUNDS = 3


class Paced:
    """A station that waits, as one waits for a device."""

    def visit(
        self, number: int, hidden: Tensor, visit: Visit, mail: Sequence[Mail]
    ) -> tuple[Tensor, None, list[Mail]]:
        time.sleep(VISIT_S)
        return hidden, None, []

    def wave(self, *_: object) -> tuple[list[Tensor | None], None, list[Mail]]:
        raise NotImplementedError

    def errand(self, name: str, request: object) -> None:
        """Nobody asks."""

    def drop(self, numbers: object, caches: object) -> None:
        """Nothing is kept."""


def serve(site: int) -> None:
    """The process of one part."""
    standing = Standing(site, bytes.fromhex(os.environ[SECRET]), Paced())
    print(json.dumps(standing.address), flush=True)
    standing.wait()
    os._exit(0)


def measure(parts: int) -> Row:
    secret = secrets.token_bytes(32)
    env = {**os.environ, SECRET: secret.hex()}
    command = [sys.executable, __file__]
    shards = [
        subprocess.Popen([*command, str(site)], env=env, stdout=subprocess.PIPE, text=True)
        for site in range(1, parts + 1)
    ]
    addresses = {}
    for site, shard in enumerate(shards, 1):
        assert shard.stdout is not None
        host, port = json.loads(shard.stdout.readline())
        addresses[site] = (host, port)
    link = Link(secret, addresses, {})
    asked = [Visit(site, (BlockCall("block", (None,), {}),)) for site in addresses]
    hidden, numbers, count = torch.randn(HIDDEN), itertools.count(1), 4 * (parts + 1)

    def rate(flight: int) -> float:
        """Forwards a second, so many at a time."""
        begun = time.perf_counter()
        with ThreadPoolExecutor(flight) as pool:
            list(pool.map(lambda _: link.forward(next(numbers), hidden, asked, []), range(count)))
        return count / (time.perf_counter() - begun)

    flying, single = interleaved(ROUNDS, partial(rate, parts + 1), partial(rate, 1))
    link.close()
    for shard in shards:
        shard.wait(20)
    best, other = sorted(flying)[ROUNDS // 2], sorted(single)[ROUNDS // 2]
    return Row(
        f"{parts} parts of {VISIT_S * 1e3:.0f} ms each, {parts + 1} batches in flight",
        f"{best:.1f}/s",
        f"one forward at a time: {other:.1f}/s",
        f"x{ratio(flying, single):.2f}",
        f"{best * VISIT_S:.0%} of a part's pace; 8 MB a hop",
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(int(sys.argv[1]))
    print(markdown([measure(parts) for parts in (2, 4)]))
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
