"""A visit that fails leaves nothing on any shard, and whoever comes next gets right numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cutting import Cut
from interpose.errors import InternalError
from interpose.runtime import caches
from interpose.runtime.split.guest import Graphs
from interpose.runtime.split.shard import Shard
from splitting import assert_same, fed, split, whole
from test_engine_isolation import BLOCK, graph, read, run, save
from test_graphs import equal, shards
from test_graphs import whole as unsplit
from torch import Tensor, nn
from transformers import DynamicCache


@contextmanager
def breaking(block: nn.Module) -> Iterator[None]:
    """A block that fails once it has done all of its work, its cache's part included."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = block.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def left(parts: Cut) -> list[Any]:
    """What each shard keeps: caches with their lengths, graphs of forwards."""
    found = []
    for site, stop in parts.route._stops.items():
        parts.route._threads[site].run(lambda: None)
        shard: Any = stop.station
        own = shard._caches
        assert own._caches.keys() == own._foreign.keys() == own._told.keys()
        lengths = {number: cache.get_seq_length(site) for number, cache in own._caches.items()}
        found.append((lengths, sorted(shard._kept), sorted(stop._entries)))
    return found


def step(model: Any, cache: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("broken", [0, 2])
def test_caches_and_graphs(grad: bool, broken: int) -> None:
    model, inputs, ids = whole("llama"), fed("llama"), torch.arange(5, 17).view(2, 6)
    with split(model, 3) as parts, torch.set_grad_enabled(grad):
        plain, ours, other = (DynamicCache(config=model.config) for _ in range(3))
        assert torch.equal(step(parts.home, ours, ids), step(model, plain, ids))
        parts.home(**inputs, use_cache=False)
        before = left(parts)
        block = next(iter(parts.route._stops[broken + 1].station._blocks.values()))  # type: ignore[attr-defined]
        with breaking(block), pytest.raises(ZeroDivisionError):
            step(parts.home, other, ids)
        assert left(parts) == before
        with pytest.raises(InternalError, match="a forward has failed with this cache"):
            step(parts.home, other, ids[:, :1])
        assert torch.equal(step(parts.home, ours, ids[:, :1]), step(model, plain, ids[:, :1]))
        assert_same(model(**inputs, use_cache=False), parts.home(**inputs, use_cache=False))


@torch.no_grad()
def test_a_cache_that_was_in_use_is_gone_and_so_are_those_it_was_joined_with() -> None:
    """Its rows were to leave and others to join; the first shard had done so and gone on, the second hadn't."""
    model, ids = whole("gpt2"), torch.arange(5, 17).view(2, 6)
    with split(model, 2) as parts:
        one, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
        step(parts.home, one, ids)
        step(parts.home, other, ids[:, :4])
        before = left(parts)
        assert [lengths for lengths, _, _ in before] == [{1: 6, 2: 4}] * 2
        caches.keep(one, [1], 0)
        caches.join(one, other)
        with breaking(parts.parts[1].get_submodule("transformer.h.2")), pytest.raises(ZeroDivisionError):
            step(parts.home, one, ids[[0, 1, 0], :1])
        assert [lengths for lengths, _, _ in left(parts)] == [{}, {}]
        for cache in (one, other):
            with pytest.raises(InternalError, match="a forward has failed"):
                step(parts.home, cache, ids[:, :1])


def test_jobs_and_their_mail() -> None:
    """Two jobs fail together, and each then runs apart: shards know after a failure what they knew before it."""
    graphs = [
        graph(read(0, BLOCK.format(0)), read(1, BLOCK.format(2)), save(2, 0), save(3, 1), rows=[[7, 21, 90]]),
        graph(read(0, BLOCK.format(1)), save(1, 0), rows=[[33, 150]]),
    ]
    expected = [run(unsplit("gpt2"), [one])[0] for one in graphs]
    engine = shards("gpt2", 2)
    assert engine.loaded.split is not None
    states: list[tuple[Any, Any]] = []
    visit, call = Graphs.visit, Shard._call

    def known(guest: Graphs) -> Any:
        return set(guest._parts), {number: len(mail) for number, mail in guest._early.items()}

    def noted(self: Graphs, *args: Any) -> Any:
        before = known(self)
        try:
            return visit(self, *args)
        except BaseException:
            states.append((before, known(self)))
            raise

    def fails(self: Shard, block: Any, hidden: Tensor, resolve: Any) -> Tensor:
        if self.site == 2 and hidden.shape[0] > 1:
            raise ZeroDivisionError
        return call(self, block, hidden, resolve)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graphs, "visit", noted)
        patch.setattr(Shard, "_call", fails)
        found = run(engine, graphs)
    assert states
    assert all(before == after for before, after in states)
    for one, other in zip(found, expected, strict=True):
        equal(one, other)
    for stop in engine.loaded.split.route._stops.values():  # type: ignore[attr-defined]
        assert not stop.station.guest._parts and not stop.station.guest._early
