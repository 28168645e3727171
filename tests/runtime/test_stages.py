"""Runs of one prompt in a session: what they have in common is computed once, and each gets what it gets alone."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpose import LanguageModel
from interpose.errors import IndexOutOfRange, OutOfMemory
from interpose.graph.manifest import Manifest
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.runtime import products
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.loading import load
from models import ARCHITECTURES, tiny
from sessions import called, part, session
from test_engine_isolation import Kept, close, common, engine, lengths, precise, random_job, run
from transformers import AutoModelForCausalLM

WHOLE = {"bloom", "mpt"}
"""Their blocks hand out attention's weights as well, which have no place in another batch: they run whole."""

ROW = (5, 9, 33, 7, 121, 14)


@pytest.fixture(autouse=True)
def no_forward_is_replaced() -> Iterator[None]:
    yield
    for arch in ("gpt2", "llama"):
        for module in engine(arch).loaded.model.modules():
            assert "forward" not in vars(module)
            assert not module._forward_hooks


@contextmanager
def counted(on: Engine) -> Iterator[Counter[int]]:
    """Rows that each block computes, counted at the first module called inside it."""
    rows: Counter[int] = Counter()
    blocks = {on.loaded.modules[_first(on, path)]: block for block, path in enumerate(on.manifest.blocks)}
    with called(blocks, lambda module, value: rows.update({blocks[module]: value.shape[0]})):
        yield rows


def _first(on: Engine, block: str) -> str:
    inside = {
        path: info.events["enter"][0]
        for path, info in on.manifest.modules.items()
        if path.startswith(f"{block}.") and info.events.get("enter")
    }
    return min(inside, key=lambda path: inside[path])


# -- each run gets what it gets alone ----------------------------------------------------------------------------


def one_session_as_alone(arch: str, seed: int) -> None:
    on, twin = engine(arch), precise(arch)
    rng = random.Random(seed)
    places = common(on.manifest, twin.manifest)
    prompts = [lengths(rng) for _ in range(2)]
    graphs = [
        random_job(seed + number, on.manifest, places, size=rng.choice([1, 2, 4, 8]), run=rng.choice(prompts))
        for number in range(2 + seed % 6)
    ]
    whole, begins = session(graphs)
    (together, _) = run(on, [whole, random_job(seed + 99, on.manifest, places)])
    for graph, begin in zip(graphs, begins, strict=True):
        close(part(together, begin, graph), run(on, [graph])[0], run(twin, [graph])[0])


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize("arch", ["gpt2", "llama", "bert"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_runs_of_a_session_get_what_each_gets_alone(arch: str, seed: int) -> None:
    one_session_as_alone(arch, seed)


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_on_every_architecture(arch: str) -> None:
    for seed in (3, 77, 2024):
        one_session_as_alone(arch, seed)


# -- and what they share is computed once ------------------------------------------------------------------------


def sweep(manifest: Manifest, rows: Sequence[Sequence[int]] = (ROW,)) -> list[Graph]:
    """A clean run, and one for each block that writes there at the last position."""
    blocks = manifest.blocks
    nested = isinstance(manifest.modules[blocks[0]].points["output"], tuple)
    asked = Run("trace", (Invoke(tuple(map(tuple, rows))),))
    early = Node(0, "read", point=Point(blocks[0], "output", (0,) if nested else ()), invoke=0)
    logits = Node(2, "read", point=Point("", "output", ("logits",)), invoke=0)
    saves = (Node(3, "save", (Ref(0),), invoke=0), Node(4, "save", (Ref(2),), invoke=0))

    def written(block: str) -> Node:
        point = Point(block, "output", (0,) if nested else ())
        return Node(1, "write", ((), (slice(None), -1), 0.75), point=point, invoke=0)

    clean = Graph((asked,), (early, replace(logits, id=1), Node(2, "save", (Ref(1),), invoke=0)))
    return [clean, *(Graph((asked,), (early, written(block), logits, *saves)) for block in blocks)]


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize("arch", sorted({*ARCHITECTURES} - WHOLE))
def test_a_sweep_over_blocks_computes_each_blocks_own_part(arch: str) -> None:
    on = Engine(load(tiny(arch)))
    blocks = on.manifest.blocks
    graphs = sweep(on.manifest)
    whole, begins = session(graphs)
    with counted(on) as rows:
        (together,) = run(on, [whole])
        rows.clear()  # the first time, beginning at each block is tried
        (together,) = run(on, [whole])
    for graph, begin in zip(graphs, begins, strict=True):
        close(part(together, begin, graph), run(on, [graph])[0])
    # A write at a block's output is seen by the blocks after it alone.
    assert [rows[block] for block in range(len(blocks))] == [1, 2, 3]


@pytest.mark.parametrize("arch", sorted(WHOLE))
def test_what_cannot_be_begun_in_the_middle_runs_whole(arch: str) -> None:
    on = engine(arch)
    assert not any(on._restart.works(block) for block in range(1, 4))
    with counted(on) as rows:
        run(on, [session(sweep(on.manifest))[0]])
    assert set(rows.values()) == {4}


def test_runs_that_only_read_share_one_row() -> None:
    on = engine("llama")
    graphs = sweep(on.manifest)[:1] * 5
    whole, begins = session(graphs)
    with counted(on) as rows:
        (together,) = run(on, [whole])
    assert set(rows.values()) == {1}
    (alone,) = run(on, graphs[:1])
    for begin in begins:
        close(part(together, begin, graphs[0]), alone)


@pytest.mark.usefixtures("eager_cuts")
def test_jobs_share_nothing_with_one_another() -> None:
    """Or the time a job takes would tell what another's prompt is."""
    on = engine("llama")
    with counted(on) as rows:
        run(on, sweep(on.manifest))
    assert set(rows.values()) == {4}


@pytest.mark.usefixtures("eager_cuts")
def test_exclusive_sessions_share_nothing() -> None:
    on = engine("llama")
    graphs = sweep(on.manifest)
    whole, begins = session(graphs)
    with counted(on) as rows:
        (together,) = run(on, [whole], exclusive=True)
    assert set(rows.values()) == {4}
    for graph, begin in zip(graphs, begins, strict=True):
        close(part(together, begin, graph), run(on, [graph], exclusive=True)[0], tolerance=0)


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize("tokens", [1, 12, 17])
def test_forwards_of_few_tokens_give_the_same(tokens: int) -> None:
    on, small = engine("llama"), Engine(load(tiny("llama")), tokens=tokens)
    whole, _ = session([*sweep(on.manifest), *sweep(on.manifest, [(7, 8), (4, 5, 6, 7, 8, 9, 10)])])
    with counted(small) as rows:
        (found,) = run(small, [whole])
    close(found, run(on, [whole])[0])
    assert max(rows) == 2


def test_a_session_that_finds_no_memory_takes_smaller_forwards() -> None:
    on = engine("llama")
    whole, _ = session(sweep(on.manifest) * 3)
    (expected,) = run(on, [whole])

    failed: list[weakref.ref[torch.Tensor]] = []

    def crowded(module: Any, args: Any, kwargs: Any) -> None:
        assert all(made() is None for made in failed), "what a failed forward made is still held"
        if args[0].shape[0] > 2:
            failed.append(weakref.ref(args[0]))
            raise torch.OutOfMemoryError("more than two rows")

    handle = on.loaded.modules[on.manifest.blocks[2]].register_forward_pre_hook(crowded, with_kwargs=True)
    try:
        (found,) = run(on, [whole])
        wide = sweep(on.manifest, [ROW, ROW, ROW])[1]
        errors = on.run([EngineJob(wide, {}, Kept())])
    finally:
        handle.remove()
    close(found, expected)
    assert failed
    assert isinstance(errors[0], OutOfMemory)


@pytest.mark.usefixtures("eager_cuts")
def test_a_run_that_fails_fails_its_job_alone() -> None:
    on = engine("gpt2")
    good = session(sweep(on.manifest))[0]
    *others, last = sweep(on.manifest)
    table = Node(6, "param", ("transformer.wte", "weight"))
    outside = Node(5, "argmax", (Ref(2),), {"dim": -1}, invoke=0)
    far = Node(7, "add", (Ref(5), 10**6), invoke=0)
    broken = replace(
        last, nodes=(*last.nodes, outside, table, far, Node(8, "embedding", (Ref(7), Ref(6)), invoke=0))
    )
    broken = replace(broken, nodes=(*broken.nodes, Node(9, "save", (Ref(8),), invoke=0)))
    bad = session([*others, broken])[0]
    sinks = [Kept(), Kept()]
    errors = on.run([EngineJob(job, {}, sink) for job, sink in zip((bad, good), sinks, strict=True)])
    assert isinstance(errors[0], IndexOutOfRange)
    assert errors[1] is None
    close(sinks[1], run(on, [good])[0])


@pytest.mark.usefixtures("eager_cuts")
def test_blocks_called_on_values_compute_while_they_are_passed_over() -> None:
    lm: Any = LanguageModel(str(tiny("llama")))
    layers = lm.layers

    def one(layer: int) -> tuple[Any, Any]:
        layers[layer].mlp.output[:, -1] *= -2
        hidden = layers[2].resid_post
        return hidden.save(), lm.lm_head(layers[0].mlp(layers[0].post_attention_layernorm(hidden))).save()

    with lm.session():
        found = []
        for layer in range(3):
            with lm.trace([list(ROW)]):
                found.append(one(layer))
    for layer, (hidden, through) in enumerate(found):
        with lm.trace([list(ROW)]):
            wanted = one(layer)
        for value, expected in zip((hidden, through), wanted, strict=True):
            # As docs/numbers.md says of float32: by norm at each position.
            assert ((value - expected).norm(dim=-1) <= 1e-5 * expected.norm(dim=-1)).all()
    assert not torch.equal(found[0][1], found[1][1])


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""On any CPU, however it adds up; a hook that acts twice is off by 1."""


def add_one(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 1


def add_to_the_first(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    output = output.clone()
    output[:, 0] += 3
    return output


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize(("hook", "written"), [(add_one, 0), (add_to_the_first, -1)])
def test_hooks_of_ones_own_act_once_and_where_they_do_alone(hook: Any, written: int) -> None:
    """Both ways to share were tried before they came."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    lm: Any = LanguageModel(model)

    def one(layer: int) -> tuple[Any, Any]:
        with lm.trace([[*ROW * 3]]):
            lm.layers[layer].mlp.output[:, written] = 0.75
            return lm.layers[2].output.save(), lm.logits[:, -1].save()

    def together() -> list[tuple[Any, Any]]:
        with lm.session():
            return [one(layer) for layer in range(3)]

    before = together()
    handle = model.model.layers[0].register_forward_hook(hook)
    found, wanted = together(), [one(layer) for layer in range(3)]
    handle.remove()
    for layer in range(3):
        torch.testing.assert_close(found[layer], wanted[layer], **CLOSE)
        torch.testing.assert_close(together()[layer], before[layer], **CLOSE)
    assert not torch.equal(found[0][0], before[0][0])


def test_a_model_of_few_positions_can_share() -> None:
    on = Engine(load(tiny("gpt2", n_positions=48)))
    graphs = sweep(on.manifest) * 20
    whole, begins = session(graphs)
    (together,) = run(on, [whole])
    assert on._restart.bare_tokens >= 0
    close(part(together, begins[2], graphs[2]), run(on, graphs[2:3])[0])


def test_hooks_of_ones_own_on_the_head_see_the_positions_they_see_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not last ones alone, nor rows of several runs' products."""
    monkeypatch.setattr(products, "LARGE_BYTES", 0)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    lm: Any = LanguageModel(model)

    def one(number: int) -> tuple[Any, Any]:
        with lm.trace([[*ROW, number]]):
            return lm.logits[:, -1].save(), lm.lm_head(lm.layers[1].resid_post[:, -3:]).save()

    def together() -> list[tuple[Any, Any]]:
        with lm.session():
            return [one(number) for number in range(3)]

    before = together()
    handle = model.lm_head.register_forward_hook(add_to_the_first)
    found, wanted = together(), [one(number) for number in range(3)]
    handle.remove()
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(together(), before, **CLOSE)
    assert not torch.equal(found[0][1], before[0][1])
