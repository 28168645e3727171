"""Shards without a model, for what tests of the link need: matrices that multiply, errors on request."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from interpose.errors import ShapeMismatch
from interpose.runtime.split.route import BlockCall, Mail, Visit
from interpose.runtime.split.station import tracked, way
from interpose_server.shards.link import Link
from interpose_server.shards.standing import Standing
from torch import Tensor

WIDTH = 6


def weight(site: int) -> Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(site))


class Matrices:
    """hidden -> tanh(hidden @ weight) + what mail brings; its work says what else."""

    def __init__(self, site: int) -> None:
        self.site = site
        self.kept: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self.caches: set[int] = set()
        self.calls: list[int] = []
        self.asked = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self.shard: Standing | None = None

    def visit(
        self, number: int, hidden: Tensor, visit: Visit, mail: Sequence[Mail]
    ) -> tuple[Tensor | None, Any, Sequence[Mail]]:
        self.calls.append(number)
        assert self.go_on.wait(60)
        work = visit.work or {}
        _raise(work.get("fail"))
        self._ask(work)
        with torch.set_grad_enabled(visit.grad):
            result = torch.tanh(hidden @ weight(self.site))
            for letter in mail:
                result = result + letter.value["v"]
            new = [Mail(to, ("from", self.site), {"v": result * 2}) for to in work.get("post", ())]
        if visit.grad:
            self.kept[number] = tracked(hidden, mail), tracked(result, new)
        reply = {"sum": result.sum(), "args": visit.calls[0].args} if work.get("reply") else None
        return (None if work.get("stop") else result), reply, new

    def wave(
        self, number: int, gradients: Sequence[Tensor | None], work: Any, mail: Sequence[Mail]
    ) -> tuple[Sequence[Tensor | None], Any, Sequence[Mail]]:
        self._ask(work or {})
        given, returned = self.kept[number]
        pairs = [(tensor, grad) for tensor, grad in zip(returned, gradients, strict=True) if grad is not None]
        outs, grads = [tensor for tensor, _ in pairs], [grad for _, grad in pairs]
        found = torch.autograd.grad(outs, given, grads, retain_graph=True, allow_unused=True)
        return found, {"asked": work, "mail": [letter.value for letter in mail]}, []

    def _ask(self, work: Any) -> None:
        """In the middle of a forward or a backward."""
        for site, name in work.get("ask", ()) if isinstance(work, dict) else ():
            sent = torch.full((WIDTH,), float(self.site))
            answer = way()(site, name, {"x": sent})
            assert answer["site"] == site
            assert torch.equal(answer["request"]["x"], sent + (site == 0))
            self.asked += 1

    def errand(self, name: str, request: Any) -> Any:
        _raise(name)
        if name == "wonder":
            way()(0, "add", request)
        return {"site": self.site, "name": name, "request": request}

    def drop(self, numbers: Collection[int], caches: Collection[int]) -> None:
        for number in numbers:
            self.kept.pop(number, None)
        self.caches -= set(caches)


def _raise(kind: str | None) -> None:
    if kind == "shape":
        raise ShapeMismatch("they don't fit", node=3, op="add", details={"asked": 9})
    if kind == "memory":
        raise torch.OutOfMemoryError("16 GiB more")
    if kind == "value":
        raise ValueError("/root/secret.py isn't there")


def visits(*sites: int, grad: bool = False, **work: Any) -> list[Visit]:
    return [Visit(site, (BlockCall(f"h.{site}", (None,), {}),), dict(work), grad=grad) for site in sites]


@contextmanager
def linked(count: int = 3, **options: Any) -> Iterator[tuple[Link, list[Matrices]]]:
    """A link to shards on threads of this process."""
    secret = secrets.token_bytes(32)
    stations = [Matrices(site) for site in range(1, count + 1)]
    standing = [Standing(station.site, secret, station) for station in stations]
    for station, shard in zip(stations, standing, strict=True):
        station.shard = shard
    try:
        addresses = {shard.site: shard.address for shard in standing}
        link = Link(secret, addresses, {f"h.{site}": site for site in addresses}, **options)
        try:
            yield link, stations
        finally:
            for station in stations:
                station.go_on.set()
            link.close()
        for shard in standing:
            assert shard.ended.wait(60), "a shard ends when home does"
    finally:
        for shard in standing:
            shard.close()
