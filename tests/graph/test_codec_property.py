"""The plain form: what is written is read back, and what is damaged is valid or refused with a code."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import msgpack
import pytest
from graphs import LIMITS, damaged, gpt2, graph
from hypothesis import given, settings
from hypothesis import strategies as st
from interpose.errors import BY_CODE, InterposeError, InvalidGraph, LimitExceeded
from interpose.graph.codec import decode_graph, encode_graph
from interpose.graph.limits import Limits
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.validate import validate
from interpose.wire.submission import Submission, decode_submission, encode_submission

SEEDS = st.integers(0, 2**32)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_graphs_survive_both_encodings(seed: int) -> None:
    made = graph(seed)
    validate(made, gpt2(), LIMITS)
    plain = encode_graph(made)
    assert repr(decode_graph(plain, LIMITS)) == repr(made)
    assert repr(decode_graph(msgpack.unpackb(msgpack.packb(plain)), LIMITS)) == repr(made)
    assert repr(decode_graph(json.loads(json.dumps(plain, allow_nan=False)), LIMITS)) == repr(made)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_the_order_of_fields_means_nothing(seed: int) -> None:
    def turned(plain: Any) -> Any:
        if isinstance(plain, dict):
            return {name: turned(plain[name]) for name in reversed(plain)}
        return [turned(item) for item in plain] if isinstance(plain, list) else plain

    made = graph(seed)
    again = decode_graph(turned(encode_graph(made)), LIMITS)
    assert json.dumps(encode_graph(again), sort_keys=True) == json.dumps(encode_graph(made), sort_keys=True)


def judged(plain: Any) -> Graph | None:
    """The graph, if it is one and can run; else the refusal has a code, can be sent, and came at once."""
    start = time.process_time()
    try:
        found = decode_graph(plain, LIMITS)
        validate(found, gpt2(), LIMITS)
        return found
    except InterposeError as error:
        refused(error)
        return None
    finally:
        assert time.process_time() - start < 2


def refused(error: InterposeError) -> None:
    assert BY_CODE[error.code] is type(error)
    assert error.code not in ("error", "internal_error", "graph_error")
    wire = json.dumps(error.to_wire(), ensure_ascii=False, allow_nan=False).encode()
    assert len(wire) < 20_000


@settings(max_examples=400, deadline=None)
@given(SEEDS)
def test_damaged_graphs_are_valid_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    plain = damaged(encode_graph(graph(seed % 50)), rng, rng.randint(1, 3))
    found = judged(plain)
    if found is not None:
        again = encode_graph(found)
        msgpack.packb(again)
        assert encode_graph(decode_graph(again, LIMITS)) == again


@settings(max_examples=300, deadline=None)
@given(SEEDS)
def test_damaged_bytes_are_valid_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(encode_submission(Submission("0" * 32, "tiny", graph(seed % 50))))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at : at + rng.randint(1, 9)]
            case _:
                data[at:at] = rng.randbytes(rng.randint(1, 5))
        if not data:
            break
    try:
        job = decode_submission(bytes(data), LIMITS)
        validate(job.graph, gpt2(), LIMITS)
    except InterposeError as error:
        refused(error)


def plain_graph(**changes: Any) -> dict[str, Any]:
    return {**encode_graph(Graph((Run("trace", (Invoke(((1, 2),)),)),), ())), **changes}


LIMITED = {
    "nodes": {"nodes": [{"id": 0, "op": object()}] * 401},
    "runs": {"runs": [{"kind": object()}] * 5},
    "invokes": {"runs": [{"invokes": [{"rows": object()}] * 17}]},
    "rows": {"runs": [{"invokes": [{"rows": [object()] * 65}]}]},
    "tokens": {"runs": [{"invokes": [{"rows": [[object()] * 2049]}]}]},
    "attachments": {"attachments": {n: object() for n in range(65)}},
}


@pytest.mark.parametrize("limit", LIMITED)
def test_limits_come_before_anything_is_built(limit: str) -> None:
    with pytest.raises(LimitExceeded) as caught:
        decode_graph(plain_graph(**LIMITED[limit]), LIMITS)
    assert caught.value.details["limit"] == limit


@pytest.mark.parametrize(("limit", "most"), [("tokens", 3600), ("rows", 12), ("invokes", 3)])
def test_limits_are_those_of_the_whole_job(limit: str, most: int) -> None:
    run = {"invokes": [{"rows": [[1] * 300] * 4}] * 3}
    limits = Limits(**{limit: most})
    decode_graph(plain_graph(runs=[run]), limits)
    with pytest.raises(LimitExceeded) as caught:
        decode_graph(plain_graph(runs=[run] * 2), limits)
    assert caught.value.details["limit"] == limit


def test_padding_counts_as_tokens() -> None:
    rows = [[1] * 100] + [[1]] * 50
    with pytest.raises(LimitExceeded):
        decode_graph(plain_graph(runs=[{"invokes": [{"rows": rows}]}]), Limits(tokens=5000))


def test_one_place_has_one_name() -> None:
    """Negative keys would be second names, under which one job's write could undo another's."""
    node = Node(0, "read", point=Point("transformer.h.0.attn", "output", (-2,)), invoke=0)
    plain = plain_graph(nodes=encode_graph(Graph((), (node,)))["nodes"])
    with pytest.raises(InvalidGraph):
        decode_graph(plain)
