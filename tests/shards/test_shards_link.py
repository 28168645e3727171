"""Forwards, backwards and errands over real sockets, to shards on threads and in processes."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest
import torch
from interpose.errors import InternalError, ReplicaLost, ShapeMismatch, Unauthorized
from interpose.runtime.split.route import HOME, Mail
from interpose_server.shards import channel as channels
from interpose_server.shards import frames
from interpose_server.shards import link as links
from interpose_server.shards.channel import Channel
from interpose_server.shards.greeting import HELLO_BYTES, Answering, Dialing
from interpose_server.shards.link import Link
from interpose_server.shards.standing import Standing
from interpose_server.shards.strangers import Strangers
from stations import WIDTH, Matrices, linked, visits, weight

X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(9))


def expected(hidden: torch.Tensor, *sites: int) -> torch.Tensor:
    for site in sites:
        hidden = torch.tanh(hidden @ weight(site))
    return hidden


def test_a_forward_goes_by_all_and_comes_home() -> None:
    with linked(3) as (link, _):
        landing = link.forward(1, X, visits(1, 2, 3, reply=True), [])
        assert landing.hidden is not None
        assert torch.equal(landing.hidden, expected(X, 1, 2, 3))
        assert sorted(landing.replies) == [1, 2, 3]
        assert torch.equal(landing.replies[2]["sum"], expected(X, 1, 2).sum())
        assert landing.replies[1]["args"] == (None,)
        again = link.forward(2, X, visits(2), []).hidden
        assert again is not None
        assert torch.equal(again, expected(X, 2))


def test_later_shards_are_not_called_where_nobody_needs_them() -> None:
    with linked(3) as (link, stations):
        asked = visits(1, 2, 3)
        asked[1].work["stop"] = True
        landing = link.forward(1, X, asked, [])
        assert landing.hidden is None
        assert [len(station.calls) for station in stations] == [1, 1, 0]
        assert link.forward(2, X, visits(1, 2, 3), []).hidden is not None
        until(
            lambda: not any(shard._halves for shard in standing_of(stations))
        )  # what nobody came for is forgotten


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def standing_of(stations: list[Matrices]) -> list[Standing]:
    return [station.shard for station in stations if station.shard is not None]


def test_mail_finds_its_site_and_what_is_for_those_behind_comes_home() -> None:
    with linked(3) as (link, _):
        asked = visits(1, 2, 3)
        asked[0].work["post"] = [3, HOME]
        asked[2].work["post"] = [1]
        sent = [Mail(2, ("straight",), {"v": torch.ones(WIDTH)})]
        landing = link.forward(1, X, asked, sent)
        first = expected(X, 1)
        third = expected(expected(first, 2) + 1, 3) + first * 2
        assert landing.hidden is not None
        torch.testing.assert_close(landing.hidden, third)
        assert [(letter.to, letter.address) for letter in landing.mail] == [(0, ("from", 1)), (1, ("from", 3))]
        assert torch.equal(landing.mail[0].value["v"], first * 2)


def test_letters_of_one_address_may_hold_any_tensors() -> None:
    with linked(2) as (link, _):
        sent = [Mail(1, ("a",), {"v": torch.full((WIDTH,), float(n))}) for n in range(3)]
        landing = link.forward(1, X, visits(1, 2), [*sent, Mail(HOME, ("a",), X), Mail(HOME, ("a",), X + 1)])
        assert landing.hidden is not None
        torch.testing.assert_close(landing.hidden, expected(expected(X, 1) + 3, 2))
        assert len(landing.mail) == 2


def test_gradients_come_back_by_hidden_states_and_by_mail() -> None:
    with linked(3) as (link, stations):
        hidden, extra = X.clone().requires_grad_(), torch.full((WIDTH,), 0.3, requires_grad=True)
        asked = visits(1, 2, 3, grad=True)
        asked[0].work["post"] = [3, HOME]
        landing = link.forward(7, hidden, asked, [Mail(3, ("late",), {"v": extra})])
        assert landing.hidden is not None
        home = landing.mail[0].value["v"]
        assert landing.hidden.requires_grad
        assert home.requires_grad
        up, side = torch.randn_like(X), torch.randn_like(X)

        first = expected(hidden, 1)
        third = expected(first, 2, 3) + extra + first * 2
        want = torch.autograd.grad([third, first * 2], [hidden, extra], [up, side])
        for _ in range(2):  # its graph is kept until it is dropped
            found, ebbed = link.backward(7, [up, side], {2: "which"}, [Mail(1, ("w",), 5)])
            for one, other in zip(found, want, strict=True):
                assert one is not None
                torch.testing.assert_close(one, other)  # added up in another order
            assert ebbed.replies[2]["asked"] == "which"
            assert ebbed.replies[1]["mail"] == [5]
        link.drop([7], [])
        until(lambda: not any(station.kept for station in stations))


def test_errors_arrive_as_their_class_and_the_rest_goes_on() -> None:
    with linked(2) as (link, _):
        asked = visits(1, 2)
        asked[1].work["fail"] = "shape"
        with pytest.raises(ShapeMismatch, match="don't fit") as info:
            link.forward(1, X, asked, [])
        assert (info.value.node, info.value.details) == (3, {"asked": 9})
        asked[1].work["fail"] = "memory"
        with pytest.raises(torch.OutOfMemoryError):
            link.forward(2, X, asked, [])
        asked[1].work["fail"] = "value"
        with pytest.raises(InternalError) as other:
            link.forward(3, X, asked, [])
        assert "secret" not in str(other.value)
        with pytest.raises(ShapeMismatch):
            link.errand(2, "shape", None)
        assert link.forward(4, X, visits(1, 2), []).hidden is not None


def test_many_forwards_at_once_from_many_threads() -> None:
    with linked(3) as (link, _), ThreadPoolExecutor(8) as pool:
        inputs = [torch.randn(3, 4, WIDTH) for _ in range(40)]
        found = list(pool.map(lambda one: link.forward(one[0], one[1], visits(1, 2, 3), []), enumerate(inputs)))
        for given, landing in zip(inputs, found, strict=True):
            assert landing.hidden is not None
            assert torch.equal(landing.hidden, expected(given, 1, 2, 3))


def test_an_errand_does_not_wait_for_a_forward() -> None:
    with linked(2) as (link, stations), ThreadPoolExecutor(1) as pool:
        stations[1].go_on.clear()
        forward = pool.submit(link.forward, 1, X, visits(1, 2), [])
        answer = link.errand(2, "ask", {"x": X})
        assert torch.equal(answer["request"]["x"], X)
        assert not forward.done()
        stations[1].go_on.set()
        assert forward.result(60).hidden is not None


def test_a_shard_that_is_gone_ends_all_who_wait_and_all_who_come() -> None:
    with linked(3) as (link, stations), ThreadPoolExecutor(2) as pool:
        stations[2].go_on.clear()
        waiting = [pool.submit(link.forward, number, X, visits(1, 2, 3), []) for number in range(2)]
        while not stations[2].calls:
            time.sleep(0.01)
        for shard in standing_of(stations[2:]):
            shard.close()
        for one in waiting:
            with pytest.raises(ReplicaLost):
                one.result(60)
        with pytest.raises(ReplicaLost):
            link.forward(9, X, visits(1), [])
        with pytest.raises(ReplicaLost):
            link.check()


def test_a_silent_shard_is_noticed_and_a_busy_one_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Ahead()
    monkeypatch.setattr(links, "time", clock)
    monkeypatch.setattr(channels, "time", clock)
    with linked(2, beat_s=0.1, silence_s=30.0) as (link, stations), ThreadPoolExecutor(1) as pool:
        stations[0].go_on.clear()
        forward = pool.submit(link.forward, 1, X, visits(1, 2), [])
        until(lambda: bool(stations[0].calls))
        for _ in range(3):
            clock.pass_by(20.0, link, 1, 2)
        link.check()
        until(lambda: link.health()[1].busy_s > 0.5)
        stations[0].go_on.set()
        assert forward.result(60).hidden is not None
        (shard,) = standing_of(stations[1:])
        shard._tasks = stalls = _Stalls()  # type: ignore[assignment]
        try:
            assert stalls.asked.wait(60)
            clock.pass_by(20.0, link, 1)
            link.check()
            clock.by += 20.0
            until(lambda: link.lost is not None)
        finally:
            stalls.over.set()
        assert link.lost is not None
        assert "shard 2 has given no sign of life" in link.lost.message


class _Ahead:
    """In place of a module's `time`: it is `by` seconds later than it is."""

    def __init__(self) -> None:
        self.by = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.by

    def pass_by(self, seconds: float, link: Link, *sites: int) -> None:
        """Let time pass, until these shards have been heard of since."""
        self.by += seconds
        now = self.monotonic()
        until(lambda: all(link._channels[site].heard_at >= now for site in sites))


class _Stalls:
    """In place of a queue: who asks for its length, as a sign of life does, waits."""

    def __init__(self) -> None:
        self.asked, self.over = threading.Event(), threading.Event()

    def qsize(self) -> int:
        self.asked.set()
        self.over.wait(60)
        return 0

    def put(self, task: object) -> None:
        pass

    def get(self) -> None:
        """On a busy machine what computes comes back for more only now: there is no more."""


# -- who may speak -----------------------------------------------------------------------------------------------


def test_both_sides_prove_the_secret() -> None:
    secret = b"s" * 32
    dialing, answering = Dialing(secret, 0, 1), Answering(secret, 1)
    answer = answering.hello(dialing.hello)
    assert answering.proved(dialing.answered(answer[:HELLO_BYTES], answer[HELLO_BYTES:])) == 0
    with pytest.raises(Unauthorized):
        Dialing(b"t" * 32, 0, 1).answered(answer[:HELLO_BYTES], answer[HELLO_BYTES:])
    with pytest.raises(Unauthorized):
        answering.proved(answer[HELLO_BYTES:])  # its own proof, sent back
    with pytest.raises(Unauthorized):
        Answering(secret, 2).hello(dialing.hello)
    with pytest.raises(ValueError, match="bytes"):
        Dialing(b"short", 0, 1)


def test_strangers_are_turned_away() -> None:
    with linked(1) as (link, stations):
        (shard,) = standing_of(stations)
        with pytest.raises(Unauthorized):
            Channel.dial(shard.address, b"x" * 32, 0, 1)
        with socket.create_connection(shard.address) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: here\r\nAccept: everything there is\r\n\r\n")
            with suppress(ConnectionResetError):
                assert sock.recv(100) == b""
        with pytest.raises((Unauthorized, ReplicaLost)):
            Link(b"y" * 32, {1: shard.address}, {})
        assert link.forward(1, X, visits(1), []).hidden is not None


def test_strangers_who_fill_the_room_make_room() -> None:
    with linked(1) as (_, stations), ExitStack() as crowd:
        (shard,) = standing_of(stations)
        for _ in range(200):
            crowd.enter_context(socket.create_connection(shard.address))
        channel = Channel.dial(shard.address, shard._secret, 7, 1)
        until(lambda: sum(thread.name == "greet" for thread in threading.enumerate()) <= 70)
        channel.close()


def test_a_greeting_in_drops_is_over_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with linked(1) as (_, stations):
        monkeypatch.setattr(channels, "GREETING_S", 0.5)
        (shard,) = standing_of(stations)
        with socket.create_connection(shard.address) as sock:
            drops = 0
            with suppress(OSError):
                while not select.select([sock], [], [], 0.1)[0]:
                    sock.send(b"i")
                    drops += 1
            assert drops < HELLO_BYTES - 10


def test_of_strangers_the_oldest_of_the_largest_crowd_goes() -> None:
    strangers, pairs = Strangers(3), [socket.socketpair() for _ in range(4)]
    for (sock, _), host in zip(pairs, ("one", "many", "many", "many"), strict=True):
        strangers.come(sock, host)
    assert pairs[1][1].recv(1) == b""
    assert [strangers.leave(sock) for sock, _ in pairs] == [True, False, True, True]
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_frames_are_bounded() -> None:
    for prefix in (
        struct.pack("!2sBxIQQ", b"XX", 1, 0, 0, 0),
        struct.pack("!2sBxIQQ", b"IS", 99, 0, 0, 0),
        struct.pack("!2sBxIQQ", b"IS", 1, frames.MAX_HEAD + 1, 0, 0),
        struct.pack("!2sBxIQQ", b"IS", 1, 0, 0, frames.MAX_BODY + 1),
    ):
        reader = frames.read()
        next(reader)[0][:] = prefix
        with pytest.raises(frames.InvalidPayload):
            next(reader)


def test_nothing_of_a_link_stays() -> None:
    before = set(threading.enumerate())
    with linked(2) as (link, _):
        link.forward(1, X, visits(1, 2), [])
    deadline = time.monotonic() + 60
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
