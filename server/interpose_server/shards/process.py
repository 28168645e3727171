"""A shard as a process of its own: `python -m interpose_server.shards.process --site 1 --source ... --blocks 0:8`.

Reads its part of the model, listens, and prints one line of JSON: {"site": 1, "host": ..., "port": ...}. It takes
the replica's secret from the environment and ends when home does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence

import torch
import transformers
from interpose.errors import ConfigError, InterposeError
from interpose.runtime.split.building import blocks_of
from interpose.runtime.split.guest import Exit

from .. import logs
from ..worker.status import USELESS_TO_RETRY
from .greeting import checked
from .loaded_shard import load_shard
from .standing import Standing

SECRET = "INTERPOSE_SHARD_SECRET"
"""The replica's secret, in hex: not an argument, which every user of the machine could read."""

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="interpose-shard")
    parser.add_argument("--site", type=int, required=True, help="its number, from 1")
    parser.add_argument("--source", required=True, help="a folder or a hub id")
    parser.add_argument("--blocks", required=True, help="its range of the model's blocks, as 0:8")
    parser.add_argument("--revision")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--host", default="127.0.0.1", help="where it listens")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for what it takes by itself")
    wanted = parser.parse_args(argv)
    logs.setup(f"shard {wanted.site}")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    try:
        secret = checked(bytes.fromhex(os.environ.pop(SECRET, "")))
        blocks = blocks_of(wanted.source, wanted.revision)
        first, _, end = wanted.blocks.partition(":")
        standing = stand(
            wanted.site,
            secret,
            wanted.source,
            blocks[int(first) : int(end)],
            blocks,
            host=wanted.host,
            port=wanted.port,
            device=wanted.device,
            dtype=wanted.dtype,
            revision=wanted.revision,
        )
    except (InterposeError, ValueError) as error:
        print(f"shard {wanted.site}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(USELESS_TO_RETRY if isinstance(error, (ConfigError, ValueError)) else 1) from None
    host, port = standing.address
    print(json.dumps({"site": wanted.site, "host": host, "port": port}), flush=True)
    standing.wait()
    # Threads under way would hold up an orderly exit, and nobody is left to hear of them.
    os._exit(0)


def stand(
    site: int,
    secret: bytes,
    source: str,
    own: Sequence[str],
    blocks: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    quantization: str | None = None,
    exit_: Exit | None = None,
) -> Standing:
    """Load a part of a model, and listen.

    Args:
        own, blocks: paths of its blocks, and of all.
        exit_: as of `LoadedShard`.

    Raises:
        ConfigError, ModelUnavailable: as `load_part` does.
        ValueError: no blocks, or no secret.
    """
    checked(secret)
    if not own:
        raise ValueError("a shard holds a block at least")
    part = load_shard(
        site, source, own, blocks, exit_, device=device, dtype=dtype, revision=revision, quantization=quantization
    )
    return Standing(site, secret, part, host, port, device=part.device)


if __name__ == "__main__":
    main()
