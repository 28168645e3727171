"""Runs of one prompt in a session: what they have in common is computed once, and each gets what it gets alone."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpose import LanguageModel
from interpose.errors import GraphError, IndexOutOfRange, OutOfMemory
from interpose.graph.manifest import Manifest
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.validate import Checker
from interpose.graph.values import Ref
from interpose.runtime import stages
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.loading import load
from interpose.runtime.plan import compile_graph
from interpose.runtime.restart import Restart
from models import ARCHITECTURES, tiny
from test_engine_isolation import Kept, close, common, engine, lengths, points, precise, random_job, run, save
from torch import nn
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


def session(graphs: Sequence[Graph]) -> tuple[Graph, list[int]]:
    """One job of all runs, and where the nodes of each begin."""
    nodes: list[Node] = []
    begins = []
    for number, graph in enumerate(graphs):
        begin = len(nodes)
        begins.append(begin)
        nodes += [
            replace(node, id=begin + node.id, run=number, args=_moved(node.args, begin)) for node in graph.nodes
        ]
    return Graph(tuple(graph.runs[0] for graph in graphs), tuple(nodes)), begins


def _moved(value: Any, by: int) -> Any:
    if isinstance(value, Ref):
        return Ref(value.id + by)
    return tuple(_moved(item, by) for item in value) if isinstance(value, tuple) else value


def part(whole: Kept, begin: int, graph: Graph) -> Kept:
    """What one graph of a session saved, under its own numbers."""
    found = Kept()
    found.values = {
        node - begin: value for node, value in whole.values.items() if begin <= node < begin + len(graph.nodes)
    }
    return found


@contextmanager
def counted(on: Engine) -> Iterator[Counter[int]]:
    """Rows that each block computes, counted at the first module called inside it."""
    rows: Counter[int] = Counter()
    blocks = {on.loaded.modules[_first(on, path)]: block for block, path in enumerate(on.manifest.blocks)}
    with called(blocks, lambda module, value: rows.update({blocks[module]: value.shape[0]})):
        yield rows


@contextmanager
def called(modules: Iterable[nn.Module], tell: Callable[[nn.Module, torch.Tensor], None]) -> Iterator[None]:
    """Tells of what modules are given, through their classes: on a model with others' hooks nothing is shared."""
    wanted = {*modules}
    before = {kind: kind.forward for kind in map(type, wanted)}

    def counting(forward: Any) -> Any:
        def instead(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self in wanted:
                tell(self, (args or tuple(kwargs.values()))[0])
            return forward(self, *args, **kwargs)

        return instead

    with pytest.MonkeyPatch.context() as patch:
        for kind, forward in before.items():
            patch.setattr(kind, "forward", counting(forward))
        yield


def _first(on: Engine, block: str) -> str:
    inside = {
        path: info.events["enter"][0]
        for path, info in on.manifest.modules.items()
        if path.startswith(f"{block}.") and info.events.get("enter")
    }
    return min(inside, key=lambda path: inside[path])


# -- each run gets what it gets alone ----------------------------------------------------------------------------


@pytest.fixture
def eager_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards cost what their tokens cost, as those of large batches do: each block is worth beginning at."""
    monkeypatch.setattr(Restart, "bare_tokens", 0.0)
    monkeypatch.setattr(stages, "WORTH", 0)


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
        torch.testing.assert_close(hidden, wanted[0])
        torch.testing.assert_close(through, wanted[1])
    assert not torch.equal(found[0][1], found[1][1])


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
        torch.testing.assert_close(found[layer], wanted[layer])
        torch.testing.assert_close(together()[layer], before[layer])
    assert not torch.equal(found[0][0], before[0][0])


# -- first tokens in common --------------------------------------------------------------------------------------

SLIDING = {"mistral", "gemma2", "gemma3"}
BEHIND = sorted({*ARCHITECTURES} - SLIDING - {"bert", "mamba"})
"""Architectures whose cache keeps every position."""


@contextmanager
def tokens(on: Engine) -> Iterator[list[tuple[int, ...]]]:
    """[rows, positions] of what the embedding is given."""
    shapes: list[tuple[int, ...]] = []
    module = on.loaded.modules[on.manifest.roles["embed"]]
    with called([module], lambda _, ids: shapes.append(tuple(ids.shape))):
        yield shapes


def late_job(seed: int, on: Engine, places: Sequence[Point], row: Sequence[int], clear: int) -> Graph:
    """A random job that writes behind a row's first tokens alone, and reads anything."""
    rng = random.Random(seed)
    checker, nodes = Checker(on.manifest, [Run("trace", (Invoke((tuple(row),)),))], {}), []

    def add(op: str, *args: Any, point: Point | None = None) -> int | None:
        node = Node(len(nodes), op, args, point=point, invoke=0)
        try:
            checker.add(node)
        except GraphError:
            return None
        nodes.append(node)
        return node.id

    for _ in range(rng.choice([1, 3, 6])):
        point, position = rng.choice(places), rng.randrange(clear, len(row))
        if rng.random() < 0.5:
            index = (slice(None), rng.choice([position, position - len(row), slice(position, None)]))
            add("write", (), index, rng.choice([0.25, -1.5]), point=point)
        read = add("read", point=rng.choice(places))
        if read is not None:
            add("save", Ref(read))
    logits = add("read", point=Point("", "output", ("logits",)))
    last = add("getitem", Ref(logits), (slice(None), -1))
    add("save", Ref(last))
    return Graph((Run("trace", (Invoke((tuple(row),)),)),), tuple(nodes))


def divisible(on: Engine) -> list[Point]:
    """Points whose values can be put together of two parts of their positions."""

    def whole(point: Point) -> bool:
        job = Graph((Run("trace", (Invoke(((1, 2, 3),)),)),), (Node(0, "read", point=point, invoke=0), save(1, 0)))
        return on._prefix.clear(compile_graph(job), 0) > 0

    return [point for point in points(on.manifest) if whole(point)]


def behind_as_alone(arch: str, seed: int) -> None:
    on = engine(arch)
    rng = random.Random(seed)
    common_tokens = [rng.randrange(5, 300) for _ in range(rng.choice([3, 4, 9]))]
    clear = len(common_tokens)
    rows = [[*common_tokens, *(rng.randrange(5, 300) for _ in range(rng.choice([1, 2, 5])))] for _ in range(3)]
    places = divisible(on)
    graphs = [late_job(seed + number, on, places, rng.choice(rows), clear) for number in range(2 + seed % 7)]
    whole, begins = session(graphs)
    other, _ = session([late_job(seed + 50 + number, on, places, rows[0], clear) for number in range(3)])
    together, _ = run(on, [whole, other])
    for graph, begin in zip(graphs, begins, strict=True):
        close(part(together, begin, graph), run(on, [graph])[0], tolerance=3e-5)


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_runs_behind_common_tokens_get_what_each_gets_alone(arch: str, seed: int) -> None:
    behind_as_alone(arch, seed)


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize("arch", BEHIND)
def test_behind_common_tokens_on_every_architecture(arch: str) -> None:
    for seed in (1, 40, 900):
        behind_as_alone(arch, seed)


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize("arch", BEHIND)
def test_common_tokens_are_computed_once(arch: str) -> None:
    on = engine(arch)
    nested = isinstance(on.manifest.modules[on.manifest.blocks[0]].points["output"], tuple)
    point = Point(on.manifest.blocks[0], "output", (0,) if nested else ())
    first = tuple(range(5, 45))

    def steered(number: int) -> Graph:
        """It writes at the last position of a prompt of its own, and reads a position that all have in common."""
        asked = Run("trace", (Invoke(((*first, 50 + number, 7),)),))
        nodes = (
            Node(0, "write", ((), (slice(None), -1), 0.5 + number), point=point, invoke=0),
            Node(1, "read", point=replace(point, module=on.manifest.blocks[-1]), invoke=0),
            save(2, 1),
            Node(3, "read", point=Point("", "output", ("logits",)), invoke=0),
            Node(4, "getitem", (Ref(3), (slice(None), -1)), invoke=0),
            save(5, 4),
        )
        return Graph((asked,), nodes)

    graphs = [steered(number) for number in range(6)]
    whole, begins = session(graphs)
    run(on, [whole])
    with tokens(on) as shapes:
        (together,) = run(on, [whole])
    assert shapes == [(1, 42), (6, 2)]
    found = [part(together, begin, graph) for begin, graph in zip(begins, graphs, strict=True)]
    for kept, graph in zip(found, graphs, strict=True):
        close(kept, run(on, [graph])[0])
        assert kept.values[2][0].shape[1] == 42
    assert not torch.equal(found[0].values[5][0], found[1].values[5][0])


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize(
    "index",
    [..., (slice(None), 0), (slice(None), slice(None, -1)), (slice(None), slice(None, None, 20)), (0,)],
)
def test_who_writes_among_the_first_tokens_runs_whole(index: Any) -> None:
    on = engine("llama")
    row = tuple(range(5, 45))

    def written(value: float) -> Graph:
        nodes = (
            Node(0, "write", ((), index, value), point=Point(on.manifest.blocks[0], "output"), invoke=0),
            Node(1, "read", point=Point("", "output", ("logits",)), invoke=0),
            Node(2, "getitem", (Ref(1), (slice(None), -1)), invoke=0),
            save(3, 2),
        )
        return Graph((Run("trace", (Invoke((row,)),)),), nodes)

    graphs = [written(value) for value in (0.5, 1.5, -2.0)]
    whole, begins = session(graphs)
    (together,) = run(on, [whole])
    for graph, begin in zip(graphs, begins, strict=True):
        close(part(together, begin, graph), run(on, [graph])[0])
    with tokens(on) as shapes:
        run(on, [whole])
    assert all(width == len(row) for _, width in shapes)


@pytest.mark.usefixtures("eager_cuts")
def test_runs_of_the_same_rows_in_other_invokes_share_them() -> None:
    on = engine("llama")
    first = tuple(range(5, 45))
    point = Point(on.manifest.blocks[-1], "output")

    def reads(*invokes: Invoke) -> Graph:
        last = len(invokes) - 1
        return Graph((Run("trace", invokes),), (Node(0, "read", point=point, invoke=last), save(1, 0)))

    def steered(number: int) -> Graph:
        asked = Run("trace", (Invoke(tuple((*first, 50 + number + row, 7) for row in range(2))),))
        write = Node(0, "write", ((), (slice(None), -1), 0.5), point=replace(point, module=on.manifest.blocks[0]))
        return Graph((asked,), (replace(write, invoke=0), Node(1, "read", point=point, invoke=0), save(2, 1)))

    rows = (*first, 3, 4), (*first, 8, 9)
    both, apart = reads(Invoke(rows)), reads(Invoke(rows[:1]), Invoke(rows[1:]))
    graphs = [apart, both, *map(steered, range(3))]
    whole, begins = session(graphs)
    with tokens(on) as shapes:
        (together,) = run(on, [whole])
    assert (6, 2) in shapes
    for graph, begin in zip(graphs, begins, strict=True):
        close(part(together, begin, graph), run(on, [graph])[0])


def test_a_model_of_few_positions_can_share() -> None:
    on = Engine(load(tiny("gpt2", n_positions=48)))
    graphs = sweep(on.manifest) * 20
    whole, begins = session(graphs)
    (together,) = run(on, [whole])
    assert on._restart.bare_tokens >= 0
    close(part(together, begins[2], graphs[2]), run(on, graphs[2:3])[0])


@pytest.mark.parametrize("arch", sorted({*ARCHITECTURES} - {*BEHIND}))
def test_models_that_look_ahead_or_forget_begin_at_the_first_token(arch: str) -> None:
    assert not engine(arch)._prefix.works
