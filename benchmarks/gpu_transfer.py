"""All hidden states of a prompt on their way off the device, beside the links they go over."""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_compute import Dropped
from gpu_link import Link, link
from gpu_model import Bench
from interpose import LanguageModel
from interpose.runtime.engine import EngineJob
from interpose.wire.trees import flatten
from interpose_server.worker.leaving import leave
from recording import recorded
from table import Row, mb_s, ms
from timing import added, ratio


def all_states(bench: Bench, tracer: Any) -> None:
    for layer in bench.model.model.layers:
        layer.output[0].save()


def to_link(bench: Bench) -> Iterator[Row]:
    """All layers' hidden states of a prompt, to host memory and to another process, beside the links' own speed."""
    tokens, size = bench.wanted.tokens, bench.size
    ids = bench.ids(1, tokens)
    graph = recorded(bench.model.trace(bench.prompt(0, tokens)), partial(all_states, bench))
    values = [torch.zeros(tokens, bench.wanted.width, dtype=bench.plain.dtype, device=bench.plain.device)] * len(
        bench.layers
    )
    host = [torch.empty_like(value, device="cpu") for value in values]
    if bench.plain.device.type == "cuda":
        host = [one.pin_memory() for one in host]

    def pinned() -> None:
        for one, value in zip(host, values, strict=True):
            one.copy_(value, non_blocking=True)

    def pageable() -> None:
        for value in values:
            value.cpu()

    with link() as line:
        sent = memoryview(bytearray(size))
        works = [partial(away, bench, graph, line), partial(bench.forward, ids, logits_to_keep=1)]
        ours, plain, fast, slow, raw = bench.times(*works, pinned, pageable, partial(raw_tcp, line, sent))
    more = [a - b for a, b in zip(ours, plain, strict=True)]
    note = f"{size / 1e6:.0f} MB, all layers of {tokens} tokens, leaving as on a server, sent by a thread"
    yield Row(
        "a forward whose every layer reaches another process", ms(median(ours)),
        f"the bare forward, {ms(median(plain))}", f"{ms(added(ours, plain))} added", note,
    )  # fmt: skip
    for name, beside in (
        ("device to pinned memory", fast),
        ("device to pageable memory", slow),
        ("raw TCP on this machine", raw),
    ):
        yield Row(
            "its bytes in the time it adds", mb_s(size, median(more)), f"{name}, {mb_s(size, median(beside))}",
            f"{ratio(beside, more):.2f} of its rate", "sending overlaps the forward",
        )  # fmt: skip


def raw_tcp(line: Link, data: memoryview) -> None:
    line.announce(data.nbytes)
    line.send(data)
    line.arrived()


def away(bench: Bench, graph: Any, line: Link) -> None:
    """One run whose saves a thread encodes and sends while later layers run."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()

    class Sending(Dropped):
        def save(self, node: int, value: Any) -> None:
            _, tensors = flatten(value)
            for tensor in tensors:
                waiting.put(leave(tensor))

    def send() -> None:
        line.announce(bench.size)
        while (value := waiting.get()) is not None:
            line.send(value.data())
        line.arrived()

    # What goes wrong ends the script; a thread that waits for the rest must not keep it.
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    (error,) = bench.engine.run([EngineJob(graph, {}, Sending())])
    assert error is None, error
    waiting.put(None)
    thread.join()


def serve(bench: Bench) -> Iterator[Row]:
    """All layers of a prompt at a client of a real server."""
    try:
        import interpose_server.embedded  # noqa: F401
        from gpu_serve import served
    except ImportError as error:
        print(f"serve: skipped, the server needs a package that isn't here ({error.name})", flush=True)
        return
    tokens, size = bench.wanted.tokens, bench.size
    ids, prompt = bench.ids(1, tokens), bench.prompt(0, tokens)
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        folder = Path(scratch, "random")
        bench.plain.save_pretrained(folder)
        with served(folder, bench.wanted) as (host, key), link() as line:
            remote = LanguageModel("random", host=host, api_key=key)
            raw = partial(raw_tcp, line, memoryview(bytearray(size)))
            works = partial(all_remote, remote, prompt, True), partial(all_remote, remote, prompt, False)
            ours, small, plain, tcp = bench.times(*works, partial(bench.forward, ids), raw)
    for name, beside in (("the bare forward", plain), ("the same trace saving 1 row", small), ("raw TCP", tcp)):
        yield Row(
            f"all {len(bench.layers)} layers at the client", ms(median(ours)), f"{name}, {ms(median(beside))}",
            f"{ms(added(ours, beside))} more", f"{size / 1e6:.0f} MB, a prompt of {tokens} tokens; aim 200 ms",
        )  # fmt: skip


def all_remote(remote: Any, prompt: list[int], whole: bool) -> None:
    with remote.trace(prompt, remote=True):
        for layer in remote.model.layers:
            hidden = layer.output[0]
            (hidden if whole else hidden[0, -1]).save()
