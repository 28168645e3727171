"""A model over several processes: `python benchmarks/shards.py [--quick]`, a table.

Forwards of a model in 2 and in 4 parts, one thread each, with several batches in flight; beside the same parts with
one forward at a time, which is what a plain device map does, and beside the whole model in one process of one
thread. A machine of two cores has work for two parts at most: the figures of 4 show what four parts cost there, and
not what four devices would give, which `paced.py` does. Run alone on a machine: parts that wait for a core wait for
one another.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"

import torch
from interpose.runtime.split.building import blocks_of
from interpose_server.shards.assembly import SplitModel, assemble
from interpose_server.shards.process import SECRET
from table import Row, markdown, ms
from timing import interleaved, ratio
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

BLOCKS, WIDTH, VOCABULARY = 12, 768, 1000
"""A small vocabulary, so that home's own part is as small beside the blocks as it is in a large model."""


def made(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=BLOCKS, n_embd=WIDTH, n_head=12, vocab_size=VOCABULARY, n_positions=512)
    config.bos_token_id = config.eos_token_id = 0
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@contextmanager
def split(source: Path, parts: int) -> Iterator[SplitModel]:
    """The model over so many processes of one thread each."""
    secret = secrets.token_bytes(32)
    blocks = blocks_of(source)
    size = len(blocks) // parts
    command = [sys.executable, "-m", "interpose_server.shards.process", "--source", str(source), "--device", "cpu"]
    shards = [
        subprocess.Popen(
            [*command, "--threads", "1", "--site", f"{site}", "--blocks", f"{(site - 1) * size}:{site * size}"],
            env={**os.environ, SECRET: secret.hex()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for site in range(1, parts + 1)
    ]
    try:
        addresses = {}
        for site, shard in enumerate(shards, 1):
            assert shard.stdout is not None
            told = json.loads(shard.stdout.readline())
            addresses[site] = (told["host"], told["port"])
        ranges = [blocks[at : at + size] for at in range(0, len(blocks), size)]
        home = assemble("bench", str(source), secret, addresses, ranges, device="cpu")
        try:
            yield home
        finally:
            home.link.close()
    finally:
        for shard in shards:
            shard.terminate()
            shard.wait()


@torch.no_grad()
def forward(model: nn.Module, batch: Tensor) -> Tensor:
    found: Tensor = model(input_ids=batch, use_cache=False).logits
    return found


def rate(model: nn.Module, batches: Sequence[Tensor], flight: int) -> float:
    """Forwards a second, so many of them at a time."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(flight, initializer=partial(torch.set_num_threads, 1)) as pool:
        for _ in pool.map(partial(forward, model), batches):
            pass
    return len(batches) / (time.perf_counter() - begun)


def rows(source: Path, whole: nn.Module, parts: int, shape: tuple[int, int], count: int, rounds: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, VOCABULARY, shape, generator=generator) for _ in range(count)]
    with split(source, parts) as home:
        model = home.loaded.model
        for batch in batches[:2]:
            assert torch.equal(forward(model, batch), forward(whole, batch))
        measures: list[Callable[[], float]] = [
            partial(rate, model, batches, parts + 1),
            partial(rate, model, batches, 1),
            partial(rate, whole, batches, 1),
        ]
        flying, single, alone = interleaved(rounds, *measures)
    what = f"{shape[0]} rows of {shape[1]} tokens, {parts} parts"
    mid = sorted(flying)[len(flying) // 2]

    def row(name: str, beside: list[float], note: str) -> Row:
        other = sorted(beside)[len(beside) // 2]
        return Row(
            f"{what}, {parts + 1} batches in flight",
            f"{mid:.2f}/s",
            f"{name}: {other:.2f}/s ({ms(1 / other)} each)",
            f"x{ratio(flying, beside):.2f}",
            note,
        )

    return [
        row("one forward at a time", single, "what a plain device map does"),
        row("the whole model, one thread", alone, ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        source = made(Path(folder))
        whole = GPT2LMHeadModel.from_pretrained(source).eval()
        shapes = [(2, 64)] if quick else [(1, 32), (4, 128)]
        for parts in (2,) if quick else (2, 4):
            for shape in shapes:
                found += rows(source, whole, parts, shape, 8 if quick else 24, 3 if quick else 5)
                print(markdown(found[-2:]), flush=True)
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
