"""What is hooked, and which call of a module is which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from interpose import LanguageModel, Model
from models import tiny
from torch import nn


class Deep(nn.Module):
    """Called within itself."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        return self(x, depth - 1) * 2 if depth else self.last(x)


class Again(nn.Module):
    """One layer three times in a row, and one that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.deep = nn.Linear(4, 4), Deep()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.deep(self.layer(self.layer(self.layer(x))))


def test_calls_are_counted_as_they_begin() -> None:
    net, x = Again(), torch.randn(2, 4)
    model = Model(net)
    with model.trace(x):
        rows = [model.layer.calls[call].output.save() for call in range(3)]
        depths = [model.deep.calls[call].output.save() for call in range(3)]
    once = net.layer(x)
    twice = net.layer(once)
    thrice = net.layer(twice)
    for got, expected in zip(rows, (once, twice, thrice), strict=True):
        assert torch.equal(got, expected)
    inner = net.deep.last(thrice)
    for got, expected in zip(depths, (inner * 4, inner * 2, inner), strict=True):
        assert torch.equal(got, expected)
    assert model.manifest.modules["deep"].reentered
    assert not model.manifest.modules["layer"].reentered


@contextmanager
def hooks_seen(block: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """While the block runs: how many hooks before and after it there are."""
    seen: list[tuple[int, int]] = []
    forward = block.forward

    def noted(*args: object, **kwargs: object) -> object:
        seen.append((len(block._forward_pre_hooks), len(block._forward_hooks)))
        return forward(*args, **kwargs)

    block.forward = noted
    try:
        yield seen
    finally:
        del block.forward
        assert not block._forward_pre_hooks and not block._forward_hooks


@pytest.mark.parametrize(("what", "hooks"), [("output", (0, 1)), ("input", (1, 1)), ("nothing", (0, 0))])
def test_what_is_returned_takes_one_hook_and_nothing_stays(what: str, hooks: tuple[int, int]) -> None:
    model = LanguageModel(str(tiny("gpt2")))
    with hooks_seen(model._model.transformer.h[1]) as seen, model.trace([5, 9, 33]):
        if what != "nothing":
            getattr(model.transformer.h[1], what).save()
        model.transformer.h[2].output.save()
    assert seen == [hooks]
