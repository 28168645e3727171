"""Which standard names each architecture has, and what their values are beside other prompts."""

from __future__ import annotations

from pathlib import Path

import by_hand
import pytest
import torch
from at_points import OWN_ATTENTION, ROW, inputs, offered, ours, stock
from by_hand import HANDS, TAPS
from interpose.errors import UnknownPoint
from interpose.graph import named as names
from matrix import scale, unmasked
from models import ARCHITECTURES, tiny
from twins import close, same

OTHER = [[9, 14, 80, 22], [40, 41, 42, 43, 44, 45, 46, 47, 48]]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_name_is_there_or_refused_with_a_reason(arch: str) -> None:
    model = ours(arch)
    _, inside, outside = HANDS[arch]
    there = {at.name for at in offered(arch)}
    expected = {*inside, *outside, "logits"}
    expected |= {"head_out"} if "z" in inside else set()
    expected |= set(TAPS) if "z" in inside else set()
    expected -= {"q_rot", "k_rot"} if arch in by_hand.SOFTMAX else set()
    assert there == expected
    for name in {*names.BLOCK, *names.MODEL} - there:
        with pytest.raises(UnknownPoint, match=rf"has no {name}: \w+"), model.trace(ROW):
            getattr(model.layers[1] if name in names.BLOCK else model, name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_prompts_of_other_lengths_beside_it(arch: str) -> None:
    """One of them changed everywhere: the values are those the prompt has alone."""
    model = ours(arch)
    for looking in (False, True):
        points = [at for at in offered(arch) if (at.name in TAPS) is looking]
        with model.trace() as tracer:
            with tracer.invoke(OTHER[0]):
                for at in points:
                    scale(at)(at.read(model))
            with tracer.invoke(ROW):
                found = [at.read(model).save() for at in points]
            with tracer.invoke(OTHER[1]):
                pass
        for at, value in zip(points, found, strict=True):
            (same if at.name == "expert_ids" else close)(unmasked(value), unmasked(at.hand()[0]))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_exclusive_is_the_plain_forward(arch: str) -> None:
    """With all its defaults, such as a cache nobody reads; several rows, looked into or not."""
    model, rows = ours(arch), [ROW, OTHER[1][: len(ROW)]]
    there = [at.name for at in offered(arch)]
    for looking in {False, "pattern" in there}:
        given = {name: value for name, value in inputs(arch, rows).items() if name != "use_cache"}
        expected = stock(tiny(arch), arch, looking and arch not in OWN_ATTENTION)(**given).logits
        with model.trace(rows, batching="exclusive"):
            if looking and arch not in OWN_ATTENTION:
                model.layers[1].pattern.save()
            logits = model.logits.save()
        same(logits, expected)


GROUPS = {
    "experts": {"mixtral", "qwen2_moe", "qwen3_moe"},
    "ungated": {"gpt2", "neox", "opt", "phi", "bloom", "falcon", "bert", "mpt"},
}
"""Words of the table in the docs."""


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_in_the_docs(arch: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "named-points.md").read_text()
    table = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    there = {at.name for at in offered(arch)}
    for cell, _, _, where in table:
        kind, _, listed = where.replace("all but", "but").partition(" ")
        families = set().union(*(GROUPS.get(word, {word}) for word in listed.split(", ")))
        expected = kind == "all" or (arch in families) == (kind == "only")
        for name in cell.replace("`", "").split(", "):
            assert (name in there) == expected, name
