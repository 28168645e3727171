"""What jobs and connections cost in memory, by part of the server."""

from __future__ import annotations

import asyncio
import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cost import processes
from interpose import LanguageModel
from lab import PROMPT, TINY, tiny_server
from serving import Served
from table import Row
from timing import Effort
from transfer import save
from websockets.asyncio.client import ClientConnection, connect

SAVED = 256 << 20
QUEUED = 1000
CONNECTIONS = 1000


def measure(effort: Effort) -> Iterator[Row]:
    server = tiny_server()
    model = LanguageModel(TINY, host=server.host, api_key=server.key)
    yield from large_save(server, model)
    yield from queue(server, model)
    yield from connections(server)


def large_save(server: Served, model: Any) -> Iterator[Row]:
    """The peak of a fresh server while a few such jobs run one after another, less what one saves."""
    save(model, 1 << 20)
    with peaks(server) as found:
        for _ in range(3):
            save(model, SAVED)
    yield Row(
        f"a job that saves {SAVED >> 20} MB, beyond it", mb(sum(found.values()) - SAVED), "", "",
        f"the peaks, above before: {_listed(found)}; the client's tensor is not counted",
    )  # fmt: skip


def queue(server: Served, model: Any) -> Iterator[Row]:
    """Jobs that all wait while the worker stands still, then all run."""
    with peaks(server) as found:
        worker = processes(server.process.pid)["worker"]
        worker.suspend()
        try:
            jobs = [queued(model) for _ in range(QUEUED)]
        finally:
            worker.resume()
        for job in jobs:
            job.result()
    total = sum(found.values())
    yield Row(
        f"{QUEUED} jobs queued at once, then run", f"{mb(total)} at the peak", "",
        f"{total / QUEUED / 1e3:.0f} kB a job", f"above before: {_listed(found)}",
    )  # fmt: skip


def connections(server: Served) -> Iterator[Row]:
    """Idle websockets, opened by a thread of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    before = rss(server)
    after = asyncio.run(_connected(server))
    grown = {name: after[name] - before[name] for name in before}
    yield Row(
        f"{CONNECTIONS} idle websockets", mb(sum(grown.values())), "",
        f"{sum(grown.values()) / CONNECTIONS / 1e3:.1f} kB each", _listed(grown),
    )  # fmt: skip


async def _connected(server: Served) -> Mapping[str, int]:
    headers = {"Authorization": f"Bearer {server.key}"}
    url = server.host.replace("http", "ws", 1) + "/v1/stream"
    opened: list[ClientConnection] = []
    try:
        for _ in range(CONNECTIONS):
            one = await connect(url, additional_headers=headers, compression=None, proxy=None)
            await one.recv()
            opened.append(one)
        await asyncio.sleep(1)
        return rss(server)
    finally:
        await asyncio.gather(*(one.close() for one in opened))


def queued(model: Any) -> Any:
    with model.trace(PROMPT, remote=True, blocking=False) as tracer:
        model.transformer.h[2].output[0].save()
    return tracer.job


@contextmanager
def peaks(server: Served) -> Iterator[dict[str, int]]:
    """Filled, when the block is left, with the most bytes that each part took above what it took before."""
    before, found, over = rss(server), {}, threading.Event()
    most = dict(before)

    def watch() -> None:
        while not over.wait(0.005):
            for name, value in rss(server).items():
                most[name] = max(most[name], value)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found.update({name: most[name] - before[name] for name in before})


def rss(server: Served) -> dict[str, int]:
    """Resident bytes of each part."""
    return {name: part.memory_info().rss for name, part in processes(server.process.pid).items()}


def mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {mb(size)}" for name, size in parts.items())
