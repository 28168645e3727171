"""Shards that ask home and one another in the middle of a forward: over sockets, all at once, and when one dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from interpose.errors import InternalError, ReplicaLost, ShapeMismatch
from interpose.runtime.split.route import HOME, Nest, Visit
from interpose_server.shards.link import Link
from stations import WIDTH, Matrices, linked, visits

X = torch.ones(2, 3, WIDTH)
LANES = 8
ROUNDS = 15


def asks(*sites: int, question: str = "add", grad: bool = False) -> list[Visit]:
    """A forward by all three shards, each of which asks some sites."""
    return visits(1, 2, 3, grad=grad, ask=[[site, question] for site in sites])


def adds(name: str, request: Nest) -> Nest:
    """What home does."""
    if name == "shape":
        raise ShapeMismatch("they don't fit", node=3, op="add")
    return {"request": {"x": request["x"] + 1}, "site": HOME}


def test_all_lanes_ask_home_and_one_another_at_once() -> None:
    with linked(3) as (link, stations), ThreadPoolExecutor(LANES) as pool:
        link.answer(adds)
        alone = link.forward(1, X, asks(HOME, 1, 2, 3), []).hidden
        assert alone is not None

        def lane(own: int) -> None:
            for turn in range(ROUNDS):
                number = 1000 * own + turn
                hidden = X.clone().requires_grad_()
                landing = link.forward(number, hidden, asks(HOME, 1, 2, 3, grad=turn % 2 == 0), [])
                assert landing.hidden is not None
                assert torch.equal(landing.hidden.detach(), alone)
                if turn % 2 == 0:
                    work = {site: {"ask": [[HOME, "add"], [1, "add"], [3, "add"]]} for site in (1, 2, 3)}
                    found, _ = link.backward(number, [torch.ones_like(X)], work, [])
                    assert found[0] is not None
                    link.drop([number])

        for done in [pool.submit(lane, own) for own in range(1, LANES + 1)]:
            done.result(60)
        assert all(station.asked for station in stations)


def test_what_fails_at_home_is_raised_on_the_shard_and_the_rest_goes_on() -> None:
    with linked(3) as (link, _):
        with pytest.raises(InternalError):  # nobody has said yet what home does
            link.forward(1, X, asks(HOME), [])
        link.answer(adds)
        with pytest.raises(ShapeMismatch, match="don't fit") as info:
            link.forward(2, X, asks(HOME, question="shape"), [])
        assert info.value.node == 3
        with pytest.raises(ShapeMismatch):
            link.forward(3, X, asks(2, question="shape"), [])
        assert link.forward(4, X, asks(HOME, 2), []).hidden is not None


def test_an_errand_asks_nobody() -> None:
    with linked(3) as (link, _):
        link.answer(adds)
        with pytest.raises(InternalError, match="only while"):
            link.errand(2, "wonder", {"x": X})
        with pytest.raises(InternalError, match="only while"):
            link.forward(1, X, asks(2, question="wonder"), [])


class Slow:
    """A home that doesn't answer until it is let."""

    def __init__(self) -> None:
        self.asked, self.go_on = threading.Event(), threading.Event()

    def __call__(self, name: str, request: Nest) -> Nest:
        self.asked.set()
        assert self.go_on.wait(60)
        return adds(name, request)


def ended(link: Link, stations: list[Matrices], end: Callable[[], Any]) -> None:
    """Whoever waits, of an errand that is under way when something ends."""
    slow = Slow()
    link.answer(slow)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(link.forward, number, X, asks(HOME, 1), []) for number in range(3)]
        assert slow.asked.wait(60)
        end()
        for one in waiting:
            with pytest.raises(ReplicaLost):
                one.result(60)
        slow.go_on.set()
    for station in stations:
        assert station.shard is not None
        assert station.shard.ended.wait(60)


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.is_alive()}


@pytest.mark.parametrize("who", ["a shard that asks", "another shard", "home"])
def test_nobody_is_left_waiting_when_one_dies_during_an_errand(who: str) -> None:
    before = threads()
    with linked(3) as (link, stations):
        first, *_, last = (station.shard for station in stations)
        assert first is not None
        assert last is not None
        ended(
            link, stations, {"a shard that asks": first.close, "another shard": last.close, "home": link.close}[who]
        )
    deadline = time.monotonic() + 60
    while (left := threads() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, "nobody computes any more, or waits for an answer"
