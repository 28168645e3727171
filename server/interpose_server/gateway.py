"""The gateway's process: `python -m interpose_server.gateway [--fd N | --host H --port P]`."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence

import uvicorn
import uvloop
from interpose.errors import ConfigError

from . import logs
from .app import create_app
from .blobs import open_blobs
from .broker.connect import connect
from .settings import Settings
from .worker.status import USELESS_TO_RETRY

MAX_MESSAGE = 64 << 10
"""A client only ever sends short messages on its stream."""


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


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    bound.listen(2048)
    return bound


async def serve(settings: Settings, bound: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is being answered."""
    broker = connect(settings)
    blobs = open_blobs(settings)
    await blobs.run(blobs.recount)
    config = uvicorn.Config(
        create_app(settings, broker, blobs),
        http="httptools",
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE,
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    try:
        await uvicorn.Server(config).serve(sockets=[bound])
    finally:
        await broker.close()


if __name__ == "__main__":
    main()
