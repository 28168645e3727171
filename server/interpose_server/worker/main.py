"""A worker's process: `python -m interpose_server.worker --model NAME --source PATH`."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence

import uvloop
from interpose.errors import ConfigError, InterposeError

from .. import logs
from ..broker.failures import PASSING, reason_of
from ..broker.states import ModelState
from ..models.spec import ModelSpec
from ..settings import Settings
from .hosting import Host, prepare_process
from .status import USELESS_TO_RETRY

PATIENCE_S = 7 * 86_400.0
"""How long loading may take: whoever watches the terminal ends it before."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="interpose-worker")
    parser.add_argument("--model", required=True, help="the name it is served under")
    parser.add_argument("--source", required=True, help="a folder or a hub id")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--adapter", action="append", default=[], help="NAME=SOURCE; may be repeated")
    parser.add_argument("--name", default=own_name(), help="of this worker")
    wanted = parser.parse_args(argv)
    adapters = dict(text.split("=", 1) for text in wanted.adapter)
    spec = ModelSpec(
        name=wanted.model, source=wanted.source, dtype=wanted.dtype, adapters=adapters, load_s=PATIENCE_S
    )
    try:
        settings = Settings.read()
    except ConfigError as error:
        print(f"{spec.name}: {error.message}", file=sys.stderr, flush=True)
        raise SystemExit(USELESS_TO_RETRY) from None
    run(spec, wanted.name, settings, wanted.device)


def own_name() -> str:
    return f"{os.uname().nodename}-{os.getpid()}"


def run(spec: ModelSpec, name: str, settings: Settings, device: str | None) -> None:
    """Load a model and run its jobs until SIGTERM or SIGINT.

    Raises:
        SystemExit: it can't; why is on stderr.
    """
    logs.setup(f"worker {spec.name}")
    prepare_process(settings)
    try:
        uvloop.run(_main(spec, name, settings, device))
    except InterposeError as error:
        print(f"{spec.name}: {error.message}", file=sys.stderr, flush=True)
        useless = isinstance(error, ConfigError) or reason_of(error) not in PASSING
        raise SystemExit(USELESS_TO_RETRY if useless else 1) from None


async def _main(spec: ModelSpec, name: str, settings: Settings, device: str | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    host = Host(spec, name, settings, device)
    try:
        loading = asyncio.create_task(host.load())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            await host.announce(ModelState.STOPPED)
            # The thread that loads can't be told to stop, and an orderly exit would wait for it.
            os._exit(0)
        await loading
        await host.run(stop)
        stopping.cancel()
    finally:
        await host.close()
