"""A worker's process: `python -m interpose_server.worker --model NAME --source PATH`."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers
import uvloop
from interpose.errors import ConfigError, InterposeError
from interpose.runtime.engine import Engine
from interpose.runtime.loading import Loaded, load

from .. import blob_keys, logs
from ..blobs import LocalBlobs
from ..broker.connect import Broker, connect
from ..broker.models import ModelState
from ..settings import Settings
from .budget import budget, describe, told
from .loop import Worker
from .measure import measure
from .scheduler import Budget
from .status import USELESS_TO_RETRY

log = logging.getLogger(__name__)

FOREVER_S = 10 * 365 * 86_400.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="interpose-worker")
    parser.add_argument("--model", required=True, help="the name it is served under")
    parser.add_argument("--source", required=True, help="a folder or a hub id")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--name", default=f"{os.uname().nodename}-{os.getpid()}", help="of this worker")
    wanted = parser.parse_args(argv)
    logs.setup(f"worker {wanted.model}")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Before torch allocates: fresh memory in huge pages costs a third of what it does page by page.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    settings = Settings()
    if settings.worker_threads:
        torch.set_num_threads(settings.worker_threads)
    try:
        uvloop.run(_main(wanted, settings))
    except ConfigError as error:
        print(f"{wanted.model}: {error.message}", file=sys.stderr, flush=True)
        raise SystemExit(USELESS_TO_RETRY) from None
    except InterposeError as error:
        print(f"{wanted.model}: {error.message}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


async def _main(wanted: argparse.Namespace, settings: Settings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    broker = connect(settings)
    blobs = LocalBlobs(settings.blob_dir, settings.blob_bytes)
    name: str = wanted.model
    try:
        # A worker of this name that died holds leases on jobs nobody runs.
        await broker.queue.reap(wanted.name)
        await broker.models.announce(name, wanted.name, ModelState.LOADING)
        loading = asyncio.create_task(_load(wanted, broker, blobs, settings))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            await broker.models.announce(name, wanted.name, ModelState.STOPPED)
            # The thread that loads can't be told to stop, and an orderly exit would wait for it.
            os._exit(0)
        engine, allowed = loading.result()
        device = engine.loaded.device
        worker = Worker(
            name, wanted.name, engine, broker, blobs, settings, lambda tensor: tensor.to(device), _check,
            budget=allowed, prepare=engine.prepare,
        )  # fmt: skip
        await worker.run(stop)
        stopping.cancel()
        await broker.models.announce(name, wanted.name, ModelState.STOPPED)
    finally:
        await broker.close()


async def _load(
    wanted: argparse.Namespace, broker: Broker, blobs: LocalBlobs, settings: Settings
) -> tuple[Engine, Budget]:
    """Load, measure, and tell the gateways. Raises ConfigError, ModelUnavailable."""
    start = time.monotonic()
    _say(f"{wanted.model}: loading from {wanted.source}")
    beat = asyncio.create_task(_beat(broker, wanted.model))
    try:
        loaded: Loaded = await asyncio.to_thread(
            load, wanted.source, name=wanted.model, device=wanted.device, dtype=wanted.dtype
        )
        measured = await asyncio.to_thread(measure, loaded, settings.measure_s)
    except Exception:
        await broker.models.announce(wanted.model, wanted.name, ModelState.FAILED)
        raise
    finally:
        beat.cancel()
    allowed = budget(measured, settings, shared=loaded.manifest.row_independent)
    engine = Engine(loaded, allowed.most)
    manifest = replace(loaded.manifest, limits=settings.limits.as_dict())
    tokenizer = ""
    if loaded.tokenizer_bytes is not None:
        tokenizer = hashlib.sha256(loaded.tokenizer_bytes).hexdigest()
        blobs.put(blob_keys.tokenizer(tokenizer), [loaded.tokenizer_bytes], FOREVER_S)
    await broker.models.publish(wanted.model, wanted.name, manifest, tokenizer, told(allowed, measured))
    parts = f"{manifest.architecture}, {manifest.dtype}, {len(manifest.blocks)} blocks, on {loaded.device}"
    alone = "" if manifest.row_independent else f"; serves jobs one by one: {manifest.row_note}"
    _say(f"{wanted.model}: ready after {time.monotonic() - start:.1f} s ({parts}){alone}")
    _say(f"{wanted.model}: {describe(allowed, measured)}")
    return engine, allowed


async def _beat(broker: Broker, model: str) -> None:
    while True:
        await asyncio.sleep(1)
        await broker.models.beat(model)


def _check() -> None:
    """Raises if the GPU was left broken, which only a new process can mend: its jobs are then tried again."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
