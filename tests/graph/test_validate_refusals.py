"""What validation refuses: nodes nobody would write, or that would act in other places than they say."""

from __future__ import annotations

from typing import Any

import pytest
from graphs import LIMITS, gpt2
from interpose.errors import BadArgument, InterposeError, InvalidGraph, LimitExceeded, UnknownPoint, WrongOrder
from interpose.graph.limits import Limits
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.validate import validate
from interpose.graph.values import Ref, TensorSpec

EARLY, LATE = Point("transformer.h.0", "output"), Point("transformer.h.2", "output")
SHA = "0" * 64


def check(*nodes: Node, run: Run | None = None, limits: Limits = LIMITS, attached: Any = None) -> None:
    graph = Graph((run or Run("trace", (Invoke(((1, 2, 3),)),)),), nodes, attached or {})
    validate(graph, gpt2(), limits)


READ = Node(0, "read", point=EARLY, invoke=0)
STRAYS = [
    ("tell", ((), None, Ref(0))),
    ("save", (Ref(0),)),
    ("update", (Ref(0), (), ..., 1)),
    ("param", ("lm_head", "weight")),
    ("call", ("transformer.ln_f", Ref(0))),
    ("attention_mask", ()),
    ("add", (Ref(0), 1)),
]


@pytest.mark.parametrize(("op", "args"), STRAYS)
def test_only_reads_and_writes_touch_points(op: str, args: tuple[Any, ...]) -> None:
    check(READ, Node(1, op, args, invoke=0))
    with pytest.raises(InvalidGraph):
        check(READ, Node(1, op, args, point=EARLY, invoke=0))


REFUSED: dict[str, tuple[type[InterposeError], Node]] = {
    "a later value": (WrongOrder, Node(1, "write", ((), None, Ref(0)), point=EARLY, invoke=0)),
    "no such body": (InvalidGraph, Node(1, "save", (Ref(0),), when=0)),
    "no such invoke": (InvalidGraph, Node(1, "read", point=LATE, invoke=1)),
    "no such run": (InvalidGraph, Node(1, "read", point=LATE, run=1)),
    "a step of a trace": (BadArgument, Node(1, "read", point=Point("", "output", ("logits",), step=1), invoke=0)),
    "a second call": (UnknownPoint, Node(1, "read", point=Point("transformer.h.0", "output", call=1), invoke=0)),
    "no tensor there": (
        UnknownPoint,
        Node(1, "read", point=Point("transformer.h.0.attn", "output", (1,)), invoke=0),
    ),
    **{
        f"a call {name!r}": (UnknownPoint, Node(1, "read", point=Point("transformer.h.1.mlp.act", name), invoke=0))
        for name in (
            "tanh_9.output",
            "tanh_0.__class__",
            "system_0.output",
            "tanh_0.output.output",
            "_0.inputs",
            ".",
        )
    },
    "no view": (InvalidGraph, Node(1, "write", ((("mul", 2),), ..., 1.0), point=LATE, invoke=0)),
    "too many views": (InvalidGraph, Node(1, "write", ((("mT",),) * 33, ..., 1.0), point=LATE, invoke=0)),
    "a nest": (
        BadArgument,
        Node(1, "write", ((), None, Ref(0)), point=Point("transformer.h.2", "inputs"), invoke=0),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    error, node = REFUSED[what]
    with pytest.raises(error) as caught:
        check(Node(0, "read", point=LATE, invoke=0), node)
    assert caught.value.node == 1


@pytest.mark.parametrize(
    "run",
    [
        Run("trace", (Invoke(((1, 2, 3),), tensors={"pixel_values": SHA}),)),
        Run("trace", (Invoke(((1, 2, 3),)),), {"max_new_tokens": 5}),
        Run("trace", (Invoke(()),)),
        Run("trace", (Invoke(((1,), ())),)),
        Run("trace", (Invoke(((400,),)),)),
        Run("trace", (Invoke(((1,) * 129,)),)),
    ],
    ids=["other inputs", "options of a generation", "no rows", "no tokens", "outside the vocabulary", "too long"],
)
def test_refused_runs(run: Run) -> None:
    with pytest.raises(InterposeError):
        check(run=run)


def test_bounds_come_from_shapes_alone() -> None:
    huge = {SHA: TensorSpec((2**30, 2**20), "float64")}
    with pytest.raises(LimitExceeded) as caught:
        check(Node(0, "attachment", (SHA,)), Node(1, "save", (Ref(0),)), attached=huge)
    assert caught.value.details["limit"] == "attachment_bytes"
    with pytest.raises(LimitExceeded) as caught:
        check(Node(0, "zeros", (2**20, 2**20)), Node(1, "save", (Ref(0),)))
    assert caught.value.details["allowed"] < caught.value.details["asked"]
    with pytest.raises(LimitExceeded) as caught:
        wide = Node(0, "zeros", (20_000, 20_000))
        check(wide, *(Node(n, "matmul", (Ref(0), Ref(0))) for n in range(1, 9)), limits=Limits(memory_bytes=2**60))
    assert caught.value.details["limit"] == "flops"
