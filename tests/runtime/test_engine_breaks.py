"""Other jobs run between any two forwards of a job: both get what they get alone, and nothing of it is seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from interpose.errors import BadArgument, InternalError, JobTimeout
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref, TensorSpec
from interpose.runtime import generation
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.feeding import examples
from interpose.runtime.forward import Forward
from interpose.runtime.independence import Buffers
from interpose.runtime.layouts import dtype_name
from interpose.runtime.loading import load, wrap
from interpose.runtime.refusals import Refused, refusing
from models import tiny
from recording import Kept
from test_engine_isolation import random_job
from test_generation_batches import engine, random_generation
from test_independence import scaled


@dataclass
class Between:
    """Runs jobs at given breaks, on the engine whose break it is."""

    on: Engine
    at: dict[int, Sequence[Graph]]
    breaks: int = 0
    ended: list[EngineJob] = field(default_factory=list)

    def due(self) -> bool:
        return self.breaks + 1 in self.at

    def pause(self, *, joinable: bool) -> None:
        assert not joinable
        self.breaks += 1
        for graph in self.at.get(self.breaks, ()):
            job = EngineJob(graph, {}, Kept())
            assert self.on.run([job]) == [None]
            self.ended.append(job)


def alone(on: Engine, graph: Graph, **options: Any) -> dict[int, Any]:
    sink = Kept()
    assert on.run([EngineJob(graph, {}, sink, **options)]) == [None]
    return sink.values


def same(found: dict[int, Any], expected: dict[int, Any]) -> None:
    """Bitwise."""
    assert found.keys() == expected.keys()
    flat = [torch.utils._pytree.tree_leaves(values) for values in (found, expected)]
    for one, other in zip(*flat, strict=True):
        if isinstance(other, torch.Tensor):
            assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
        else:
            assert one == other


def session(seed: int, runs: int) -> Graph:
    """Runs that each write what the one before made, so that none can share a forward with another."""
    rng = random.Random(seed)
    nodes: list[Node] = []
    for run in range(runs):
        if run:
            nodes.append(
                Node(
                    len(nodes),
                    "write",
                    ((), (slice(None), -1), Ref(nodes[-2].id)),
                    point=BLOCKS[0],
                    invoke=0,
                    run=run,
                )
            )
        nodes.append(Node(len(nodes), "read", point=BLOCKS[1], invoke=0, run=run))
        nodes.append(Node(len(nodes), "getitem", (Ref(nodes[-1].id), (slice(None), -1)), invoke=0, run=run))
        nodes.append(Node(len(nodes), "save", (Ref(nodes[-1].id),), invoke=0, run=run))
    rows = [tuple(rng.randrange(5, 300) for _ in range(rng.randint(2, 9))) for _ in range(runs)]
    return Graph(tuple(Run("trace", (Invoke((row,)),)) for row in rows), tuple(nodes))


BLOCKS = [Point("model.layers.0", "output"), Point("model.layers.1", "output")]


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_session_with_others_between_its_forwards(seed: int, exclusive: bool) -> None:
    on = engine("llama")
    graph = session(seed, 6)
    others = {1 + number: [random_job(100 * seed + number, on.manifest)] for number in range(6)}
    others[3] = [*others[3], random_generation("llama", seed), session(seed + 1, 2)]
    sink, between = Kept(), Between(on, others)
    assert on.run([EngineJob(graph, {}, sink, exclusive=exclusive)], between) == [None]
    assert between.breaks == 6 and len(between.ended) == 8
    same(sink.values, alone(on, graph, exclusive=exclusive))
    for job in between.ended:
        same(job.sink.values, alone(on, job.graph))


def grown(row: Sequence[int], steps: int, **options: Any) -> Graph:
    """A generation whose logits are saved at its last step, with its tokens."""
    nodes = (
        Node(0, "read", point=Point("", "output", ("logits",), step=steps - 1), invoke=0),
        Node(1, "save", (Ref(0),), invoke=0),
        Node(2, "tokens"),
        Node(3, "save", (Ref(2),)),
    )
    options = {"max_new_tokens": steps, "eos_token_id": -1, **options}
    return Graph((Run("generate", (Invoke((tuple(row),)),), options),), nodes)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3", "mamba"])
def test_a_generation_with_others_between_its_steps(arch: str, exclusive: bool) -> None:
    on = engine(arch)
    graph = grown(range(5, 25), 8, do_sample=True, seed=3)
    others = {number: [random_job(number, on.manifest), random_generation(arch, number)] for number in (1, 2, 6)}
    sink, between = Kept(), Between(on, others)
    assert on.run([EngineJob(graph, {}, sink, exclusive=exclusive)], between) == [None]
    assert between.breaks == 7 and len(between.ended) == 6
    same(sink.values, alone(on, graph, exclusive=exclusive))


def test_independent_runs_have_breaks_between_their_portions() -> None:
    on = Engine(load(tiny("llama")), tokens=10)
    nodes: list[Node] = []
    for run in range(7):
        nodes.append(Node(2 * run, "read", point=BLOCKS[1], invoke=0, run=run))
        nodes.append(Node(2 * run + 1, "save", (Ref(2 * run),), invoke=0, run=run))
    graph = Graph(tuple(Run("trace", (Invoke(((7 + run, 8, 9, 10, 11),)),)) for run in range(7)), tuple(nodes))
    sink, between = Kept(), Between(on, {2: [session(1, 2)], 3: [random_job(1, on.manifest)]})
    assert on.run([EngineJob(graph, {}, sink)], between) == [None]
    assert between.breaks == 4, "two rows of five tokens at a time"
    same(sink.values, alone(on, graph))


def test_what_a_model_remembers_from_step_to_step_outlives_a_break() -> None:
    """Where the images of a prompt moved the positions after them, this one keeps in an attribute."""
    on = Engine(load(tiny("qwen2_vl")))
    (piece,) = examples(on.loaded.model, on.loaded.feeding, [24], [2])
    attached = {name: tensor.contiguous() for name, tensor in piece.tensors.items()}
    specs = {name: TensorSpec(tuple(tensor.shape), dtype_name(tensor)) for name, tensor in attached.items()}
    graph = grown(piece.rows[0], 6)
    invoke = Invoke(graph.runs[0].invokes[0].rows, {name: name for name in attached})
    graph = replace(graph, runs=(replace(graph.runs[0], invokes=(invoke,)),), attachments=specs)
    found, expected = Kept(), Kept()
    between = Between(on, {number: [grown((7, 8), 3)] for number in range(2, 6)})
    assert on.run([EngineJob(graph, attached, found)], between) == [None]
    assert on.run([EngineJob(graph, attached, expected)]) == [None]
    assert len(between.ended) == 4
    same(found.values, expected.values)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_rescaled_by_the_longest_row_so_far_outlive_a_break(kind: str) -> None:
    on = Engine(wrap(scaled(kind), kind))
    assert not on.manifest.row_independent
    graph, short = grown(range(5, 45), 6), grown((7, 8), 2)
    sink, between = Kept(), Between(on, {number: [short] for number in range(2, 6)})
    assert on.run([EngineJob(graph, {}, sink)], between) == [None]
    same(sink.values, alone(on, graph))
    for job in between.ended:
        same(job.sink.values, alone(on, short))


def test_buffers_are_copied_for_a_break_only_when_somebody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    on = engine("llama")
    made: list[object] = []
    real = Buffers.__init__
    monkeypatch.setattr(Buffers, "__init__", lambda self, model: (made.append(self), real(self, model))[1])
    between = Between(on, {2: [session(1, 1)]})
    assert on.run([EngineJob(session(1, 4), {}, Kept())], between) == [None]
    assert len(made) == 1


# -- whose fault it is -----------------------------------------------------------------------------------------


def pixels(sha: str = "x") -> tuple[Graph, dict[str, torch.Tensor]]:
    tensor = torch.randn(1, 3, 24, 24)
    run = Run("trace", (Invoke(((),), {"pixel_values": sha}),))
    nodes = (
        Node(0, "read", point=Point("", "output", ("last_hidden_state",)), invoke=0),
        Node(1, "save", (Ref(0),)),
    )
    return Graph((run,), nodes, {sha: TensorSpec((1, 3, 24, 24), "float32")}), {sha: tensor}


def breaking(error: Exception) -> Callable[..., Any]:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fails


def outcome(on: Engine) -> Any:
    graph, attached = pixels()
    (error,) = on.run([EngineJob(graph, attached, Kept())])
    return error


def test_a_model_that_refuses_given_inputs_is_the_jobs_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    on = Engine(load(tiny("vit")))
    assert outcome(on) is None
    monkeypatch.setattr(on.loaded.model, "forward", breaking(ValueError("this image is too odd")))
    error = outcome(on)
    assert isinstance(error, BadArgument) and "this image is too odd" in error.message


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, IndexError, TypeError])
def test_our_own_fault_on_given_inputs_is_ours(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    on = Engine(load(tiny("vit")))
    with monkeypatch.context() as patch:
        patch.setattr("interpose.runtime.staging.place", breaking(kind("ours")))
        assert isinstance(outcome(on), InternalError)
    with monkeypatch.context() as patch:
        patch.setattr(Forward, "_serve", breaking(kind("in a hook")))
        assert isinstance(outcome(on), InternalError)
    assert outcome(on) is None


def test_no_memory_is_no_refusal() -> None:
    with pytest.raises(torch.OutOfMemoryError), refusing():
        raise torch.OutOfMemoryError("none left")
    with pytest.raises(Refused), refusing():
        raise RuntimeError("sizes")
    assert generation.refusing is refusing


class Full(Kept):
    """A sink that has no room for the first value that it is given."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._errors = [error]

    def save(self, node: int, value: Any) -> None:
        if self._errors:
            raise self._errors.pop()
        super().save(node, value)


@pytest.mark.parametrize("error", [JobTimeout("late"), torch.OutOfMemoryError("full")], ids=["time", "memory"])
def test_a_value_for_which_there_was_no_room_is_saved_by_the_next_attempt(error: Exception) -> None:
    on, graph = engine("gpt2"), random_job(3, engine("gpt2").manifest)
    sink = Full(error)
    job = EngineJob(graph, {}, sink)
    ends = on.run([job, EngineJob(graph, {}, Kept())])
    if ends[0] is not None:  # as a worker does with one whose time others have taken
        assert ends[0] is error
        ends = on.run([job])
    assert ends[0] is None
    same(sink.values, alone(on, graph))
