"""Every standard name on every architecture, against hooks and arithmetic written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
from by_hand import BLOCK, HANDS, TAPS
from interpose import LanguageModel
from interpose.errors import UnknownPoint
from interpose.graph import named as names
from models import ARCHITECTURES, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from twins import close, same

ROW = [7, 21, 90, 33, 150, 61, 12]
OTHER = [[9, 14, 80, 22], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
AT = 3
"""The position that is changed."""

COMPUTED = {"head_out"}
OWN_ATTENTION = (*by_hand.SOFTMAX, "falcon")
"""Families outside the library's attention interface."""
ATTENTIONS = {"bloom": "self_attention", "mpt": "attn", "falcon": "self_attention"}


@cache
def ours(arch: str) -> LanguageModel:
    torch.set_num_threads(1)
    return LanguageModel(str(tiny(arch)))


@cache
def stock(folder: Path, arch: str, eager: bool) -> Any:
    kind = AutoModelForMaskedLM if arch == "bert" else AutoModelForCausalLM
    options = {"attn_implementation": "eager"} if eager else {}
    # As served: weights that ask for gradients put some of Mamba's kernels on another path.
    return kind.from_pretrained(folder, **options).eval().requires_grad_(False)


def inputs(arch: str, row: Sequence[int]) -> dict[str, Any]:
    ids = torch.tensor([row])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # With a cache, which one forward doesn't need, Mamba takes another path through its kernels.
    return {**given, "use_cache": False} if arch == "mamba" else given


def offered(arch: str, block: int = BLOCK) -> list[tuple[str, bool]]:
    """Names, and whether they belong to a block."""
    manifest = ours(arch).manifest
    return [(name, True) for name in manifest.named[manifest.blocks[block]]] + [
        (name, False) for name in manifest.named[""]
    ]


def handle(model: Any, in_block: bool, block: int = BLOCK) -> Any:
    return model.layers[block] if in_block else model


def attention(model: nn.Module, path: str) -> nn.Module:
    """The module that calls the attention function: of the block's the one with projections of its own."""
    found = [m for n, m in model.get_submodule(path).named_modules() if n in ("self_attn", "attn", "attention")]
    inner = dict(model.get_submodule(path).named_modules()).get("attention.self")
    return inner if inner is not None else found[0]


def scale(arch: str, name: str) -> float:
    """Granite adds its sublayers' results times a factor of its config."""
    return 0.3 if arch == "granite" and name in ("attn_out", "mlp_out") else 1.0


def caught(arch: str, name: str, model: Any, edit: by_hand.Edit | None) -> Any:
    """A context in which a forward of `model` has its value caught, or changed."""
    blocks, inside, outside = HANDS[arch]
    path = f"{blocks}.{BLOCK}"
    if name in TAPS and arch in OWN_ATTENTION:
        return by_hand.called(model.get_submodule(f"{path}.{ATTENTIONS[arch]}"), name, arch, edit)
    if name in TAPS:
        return by_hand.tapped(attention(model, path), name, edit)
    if name in outside:
        return by_hand.spotted(model, outside[name].module, outside[name], edit)
    if name == "head_out":
        return by_hand.split_by_head(model.get_submodule(f"{path}.{inside['z'].module}"), inside["z"].cut, edit)
    if name == "router_logits" and edit is not None:
        return by_hand.rerouted(model.get_submodule(f"{path}.mlp.gate"), edit)
    if edit is not None and scale(arch, name) != 1.0:
        edit = by_hand.scaled(edit, scale(arch, name))
    return by_hand.spotted(model, f"{path}.{inside[name].module}".rstrip("."), inside[name], edit)


@torch.no_grad()
def hand(arch: str, name: str, edit: by_hand.Edit | None = None, row: Sequence[int] = ROW) -> tuple[Tensor, Tensor]:
    """A value and the logits, by hand; `edit` changes the value in place."""
    model = stock(tiny(arch), arch, name in TAPS and arch not in OWN_ATTENTION)
    if name == "logits":
        value = model(**inputs(arch, row)).logits
        if edit is not None:
            edit(value)
        return value, value
    with caught(arch, name, model, edit) as values:
        logits = model(**inputs(arch, row)).logits
    factor = scale(arch, name)
    return values[0] if factor == 1.0 else values[0] * factor, logits


def change(name: str) -> Callable[[Any], None]:
    """What is done to a value, alike for real tensors and deferred ones: not a factor alone, which norms undo."""

    def edit(value: Any) -> None:
        if name == "expert_ids":
            value[:, AT] = value[:, AT].flip(-1)
        elif name == "router_logits":
            value[:, AT] *= -1.5
        elif name in TAPS:
            value[:, :, AT, :2] *= 1.5
        else:
            value[:, AT, ..., : value.shape[-1] // 2] *= 1.5

    return edit


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_name_is_there_or_refused_with_a_reason(arch: str) -> None:
    model = ours(arch)
    _, inside, outside = HANDS[arch]
    there = {name for name, _ in offered(arch)}
    expected = {*inside, *outside, "logits"}
    expected |= {"head_out"} if "z" in inside else set()
    expected |= set(TAPS) if "z" in inside else set()
    expected -= {"q_rot", "k_rot"} if arch in by_hand.SOFTMAX else set()
    assert there == expected
    for name in {*names.BLOCK, *names.MODEL} - there:
        with pytest.raises(UnknownPoint, match=rf"has no {name}: \w+"), model.trace(ROW):
            getattr(handle(model, name in names.BLOCK), name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_reading(arch: str) -> None:
    model = ours(arch)
    for looking in (False, True):
        found = {}
        with model.trace(ROW):
            for name, in_block in offered(arch):
                if (name in TAPS) == looking:
                    value = getattr(handle(model, in_block), name)
                    found[name] = tuple(value.shape), value.save()
        for name, (shape, value) in found.items():
            expected, _ = hand(arch, name)
            assert shape == tuple(expected.shape), name
            (close if name in COMPUTED else same)(value, expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_writing(arch: str) -> None:
    model = ours(arch)
    for name, in_block in offered(arch):
        expected, logits = hand(arch, name, change(name))
        untouched = hand(arch, name)[1]
        assert not torch.equal(logits, untouched), name
        with model.trace(ROW):
            change(name)(getattr(handle(model, in_block), name))
            value = getattr(handle(model, in_block), name).save()
            moved = model.logits.save()
        agree = close if name in COMPUTED or scale(arch, name) != 1.0 else same
        agree(moved, logits)
        agree(value, expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sharing_a_forward(arch: str) -> None:
    """Prompts of other lengths beside it, one of them changed everywhere: the values are those it has alone."""
    model = ours(arch)
    found = {}
    with model.trace() as tracer:
        with tracer.invoke(OTHER[0]):
            for name, in_block in offered(arch):
                change(name)(getattr(handle(model, in_block), name)) if name not in TAPS else None
        with tracer.invoke(ROW):
            for name, in_block in offered(arch):
                if name not in TAPS:
                    found[name] = getattr(handle(model, in_block), name).save()
        with tracer.invoke(OTHER[1]):
            pass
    for name, value in found.items():
        (same if name == "expert_ids" else close)(value, hand(arch, name)[0])
