"""Jobs whose cost or harm shows only while they run: sizes that depend on data, bad ids, nan at the sampler."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from interpose.errors import BadArgument, IndexOutOfRange, InterposeError, LimitExceeded, OpFailed
from interpose.graph.limits import Limits
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.loading import load
from interpose.runtime.nests import tensors
from models import tiny

MB = 1 << 20
ROWS = (Invoke(((1, 2, 3),)),)


@cache
def engine() -> Engine:
    return Engine(load(tiny("gpt2")))


class Sink:
    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.told: list[str] = []

    def save(self, node: int, value: Any) -> None:
        self.values[node] = value

    def log(self, node: int, text: str) -> None:
        self.told.append(text)

    def cancelled(self) -> bool:
        return False


def run(*nodes: Node, runs: tuple[Run, ...] = (Run("trace", ROWS),), mb: int = 64) -> tuple[Any, Sink]:
    sink = Sink()
    limits = Limits(memory_bytes=mb * MB)
    (error,) = engine().run([EngineJob(Graph(runs, nodes), {}, sink, limits)])
    return error, sink


def refused(error: InterposeError | None, kind: type[InterposeError], limit: str = "") -> None:
    assert isinstance(error, kind), error
    assert not limit or error.details["limit"] == limit


GROWN = [Node(0, "ones", (2 * MB,)), Node(1, "gt", (Ref(0), 0)), Node(2, "masked_select", (Ref(0), Ref(1)))]
"""8 MB whose size no shape tells."""


def test_many_values_of_unknown_size_are_counted_together() -> None:
    many = [Node(at, "neg", (Ref(2),)) for at in range(3, 15)]
    last = [Node(15, "cat", ([Ref(node.id) for node in many],)), Node(16, "sum", (Ref(15),))]
    refused(run(*GROWN, *many, *last, Node(17, "save", (Ref(16),)))[0], LimitExceeded, "memory_bytes")
    assert run(*GROWN, Node(3, "neg", (Ref(2),)), Node(4, "neg", (Ref(3),)), Node(5, "save", (Ref(4),)))[0] is None


def test_what_a_loop_gathers_is_counted() -> None:
    loop = [Node(3, "loop", (50, ())), Node(4, "neg", (Ref(2),), when=3)]
    end = [Node(5, "end_loop", (Ref(3), (), None, (Ref(4),))), Node(6, "getitem", (Ref(5), 0))]
    refused(run(*GROWN, *loop, *end, Node(7, "save", (Ref(6),)))[0], LimitExceeded, "memory_bytes")


def test_a_loop_gathers_parts_and_not_what_they_were_part_of() -> None:
    loop = [Node(0, "loop", (20, ())), Node(1, "ones", (MB,), when=0), Node(2, "getitem", (Ref(1), 0), when=0)]
    end = [Node(3, "end_loop", (Ref(0), (), None, (Ref(2),))), Node(4, "getitem", (Ref(3), 0))]
    error, sink = run(*loop, *end, Node(5, "save", (Ref(4),)))
    assert error is None and torch.equal(sink.values[5], torch.ones(20))


def test_saves_hold_no_more_than_they_show() -> None:
    _, sink = run(Node(0, "ones", (MB,)), Node(1, "getitem", (Ref(0), 5)), Node(2, "save", (Ref(1),)))
    ((_, saved),) = tensors(sink.values[2])
    assert saved.untyped_storage().nbytes() < 100


def _called(path: str, *made: Node) -> InterposeError | None:
    call = Node(len(made), "call", (path, Ref(len(made) - 1)))
    error: InterposeError | None = run(*made, call, Node(call.id + 1, "save", (Ref(call.id),)))[0]
    return error


def test_ids_are_checked_before_an_embedding_sees_them() -> None:
    for bad in (10**6, -1):
        refused(
            _called("transformer.wte", Node(0, "full", ((2,), bad)), Node(1, "long", (Ref(0),))), IndexOutOfRange
        )
    good = Node(0, "full", ((2,), 5)), Node(1, "long", (Ref(0),))
    assert _called("transformer.wte", *good) is None
    refused(_called("transformer", *good), BadArgument)
    refused(_called("transformer.wte", Node(0, "ones", (2,))), BadArgument)


def test_a_block_is_called_on_no_more_positions_than_a_forward_has() -> None:
    long = Node(0, "ones", (1, 1000, 64))
    refused(_called("transformer.h.0.attn", long), LimitExceeded, "positions")
    assert _called("transformer.h.0", Node(0, "ones", (1, 100, 64))) is None


def test_log_lines_of_huge_nests_are_short() -> None:
    _, sink = run(Node(0, "ones", (4096, 60)), Node(1, "unbind", (Ref(0),)), Node(2, "tell", (Ref(1),)))
    assert len(sink.told) == 1 and len(sink.told[0]) < 10_000


def _sampled(value: float) -> Graph:
    nodes = (Node(0, "write", ((), ..., value), point=Point("", "output", ("logits",)), invoke=0),)
    tokens = Node(1, "tokens"), Node(2, "save", (Ref(1),))
    return Graph((Run("generate", ROWS, {"do_sample": True, "seed": 1, "max_new_tokens": 3}),), (*nodes, *tokens))


def test_nan_at_the_sampler_fails_its_own_job_alone() -> None:
    sinks = [Sink() for _ in range(3)]
    values = (float("nan"), 0.5, float("-inf"))
    jobs = [EngineJob(_sampled(value), {}, sink) for value, sink in zip(values, sinks, strict=True)]
    first, other, last = engine().run(jobs)
    assert isinstance(first, OpFailed) and other is None and isinstance(last, OpFailed)
    assert sinks[1].values and not sinks[0].values


def test_options_the_library_refuses_are_the_users_fault() -> None:
    tokens = Node(0, "tokens"), Node(1, "save", (Ref(0),))
    for options in ({"do_sample": True, "typical_p": 0.0}, {"eos_token_id": []}, {"eos_token_id": 1 << 70}):
        bad = Run("generate", ROWS, {**options, "max_new_tokens": 3})
        refused(run(*tokens, runs=(bad,))[0], BadArgument)
