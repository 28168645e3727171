"""The gateway's process: `python -m interpose_server.gateway [--fd N | --host H --port P]`."""

from __future__ import annotations

import argparse
import asyncio
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop
from fastapi import FastAPI
from interpose.errors import ConfigError

from . import logs
from .app import create_app
from .blobs import open_blobs
from .broker.connect import connect
from .parts import Parts
from .settings import Settings
from .sockets import listen, url_of
from .worker.status import USELESS_TO_RETRY

MAX_MESSAGE = 64 << 10
"""A client only ever sends short messages on its stream."""

FILES = 1 << 16
"""That the process may have open, sockets included."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="interpose-gateway")
    parser.add_argument("--fd", type=int, help="a listening socket inherited from the parent")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    wanted = parser.parse_args(argv)
    logs.setup("gateway")
    bound = socket.socket(fileno=wanted.fd) if wanted.fd is not None else listen(wanted.host, wanted.port)
    try:
        settings = Settings.read()
    except ConfigError as error:
        print(f"the gateway: {error.message}", file=sys.stderr, flush=True)
        raise SystemExit(USELESS_TO_RETRY) from None
    uvloop.run(serve(settings, bound))


def allow_many_files() -> None:
    """A connection takes a descriptor, and many systems allow a process few of them until it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM: the certificate with those that lead to its root, and its key."""

    certificate: Path
    key: Path | None = None


async def alone(settings: Settings, host: str, port: int, tls: Tls | None = None) -> None:
    """`interpose gateway`: serve on an address, over a broker that others share.

    Raises:
        ConfigError: it can't listen there, or Redis can't be used.
    """
    bound = listen(host, port)
    broker = connect(settings)
    try:
        await broker.reach()
        if not await broker.accounts.any():
            say("there are no keys yet, so nobody can use it; `interpose keys create` makes one")
    finally:
        await broker.close()
    if settings.blobs == "file":
        say(f"uploads and results are in {settings.blob_dir}; every gateway and worker has to see that folder")
    say(f"the gateway is at {url_of(bound, 'https' if tls else 'http')}")
    await serve(settings, bound, tls)


async def serve(settings: Settings, bound: socket.socket, tls: Tls | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is being answered.

    Raises:
        ConfigError: the certificate or the blob store can't be used as they are set.
    """
    allow_many_files()
    broker = connect(settings)
    try:
        blobs = open_blobs(settings)
        await blobs.run(blobs.recount)
        app = create_app(settings, broker, blobs)
        await Server(_config(app, tls), Parts.in_app(app).stopping, settings.drain_s).serve(sockets=[bound])
    finally:
        await broker.close()


def _config(app: FastAPI, tls: Tls | None) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE,
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"the certificate or its key can't be used: {error.strerror or error}") from error
    return config


class Server(uvicorn.Server):
    """Stops in two steps: first it tells who asks /readyz, and serves on until nobody sends requests here; then it
    closes all streams, and their clients connect again.

    Args:
        drain_s: how long the first step takes; a second signal ends it.
    """

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event, drain_s: float) -> None:
        super().__init__(config)
        self._loop = asyncio.get_running_loop()
        self._stopping = stopping
        self._drain_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stopping.is_set() or not self._drain_s:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
        else:
            self._stopping.set()
            self._loop.call_soon_threadsafe(self._loop.call_later, self._drain_s, self._end)

    def _end(self) -> None:
        self.should_exit = True


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
