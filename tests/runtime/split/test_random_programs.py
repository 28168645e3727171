"""Random programs on a split model: what the whole model gives, to its last bits, or the same error."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.errors import InterposeError
from test_graphs import language

SEEDS = 120


class Program:
    """One program, drawn from a seed: the same for every model."""

    def __init__(self, model: LanguageModel, seed: int) -> None:
        self.rng = random.Random(seed)
        self.model = model
        self.h = model.transformer.h
        self.saved: list[Any] = []

    def run(self) -> list[Any]:
        rng, model = self.rng, self.model
        row = [rng.randrange(5, 300) for _ in range(rng.choice([3, 5, 7]))]
        kind = rng.choice(["plain", "plain", "gradients", "gradients", "steps"])
        if kind == "steps":
            with model.generate(row, max_new_tokens=3) as t:
                with t.all():
                    self.some(t, [], 1)
                    self.saved.append(self.block().output[:, -1].save())
                self.saved.append(t.result.save())
            return self.saved
        with model.trace(row) as t:
            values: list[Any] = []
            self.some(t, values, 0)
            if kind == "gradients" and values:
                self.gradients(values[-1])
            self.saved.append(model.logits.save())
        return self.saved

    def block(self) -> Any:
        return self.h[self.rng.randrange(3)]

    def some(self, t: Any, values: list[Any], depth: int) -> None:
        """A few things done, with the values there are so far."""
        for _ in range(self.rng.randrange(2, 7)):
            choices = (
                [self.read]
                if not values
                else [self.read, self.read, self.mix, self.write, self.steer, self.call, self.loop]
            )
            if values and depth < 2:
                choices.append(self.condition)
            self.rng.choice(choices)(t, values, depth)
            if depth == 0 and values and self.rng.random() < 0.5:
                self.saved.append(values[-1].save())

    def read(self, t: Any, values: list[Any], depth: int) -> None:
        block = self.block()
        point = self.rng.randrange(3)
        values.append((block.output, block.mlp.output, block.attn.output[0])[point])

    def mix(self, t: Any, values: list[Any], depth: int) -> None:
        values.append(self.rng.choice(values) * 0.5 + self.rng.choice(values))

    def write(self, t: Any, values: list[Any], depth: int) -> None:
        block = self.block()
        block.output[:] = block.output * 0.5 + self.rng.choice(values) * 0.3

    def steer(self, t: Any, values: list[Any], depth: int) -> None:
        """Write into a block what a module, often one elsewhere, makes of the block's own value."""
        block = self.block()
        inner = self.rng.choice((block.input, block.attn.output[0], block.mlp.output))
        self.call(t, seen := [inner], depth)
        block.output[:] = block.output * 0.5 + seen[-1] * 0.3

    def call(self, t: Any, values: list[Any], depth: int) -> None:
        value, block = self.rng.choice(values), self.block()
        made = (self.model.transformer.ln_f, block.mlp, lambda x: x + block.mlp.c_proj.weight[0])
        values.append(self.rng.choice(made)(value))

    def loop(self, t: Any, values: list[Any], depth: int) -> None:
        own = self.rng.choice(values)
        values.append(t.loop(2, lambda _, x: self.model.transformer.ln_f(x) + own, self.rng.choice(values)))

    def condition(self, t: Any, values: list[Any], depth: int) -> None:
        wanted = self.rng.choice(values).sum() > self.rng.choice([0.0, -1e9, 1e9])

        def then() -> None:
            self.some(t, [*values], depth + 1)
            self.block().output[:, -1] += 0.1

        t.cond(wanted, then, lambda: None)

    def gradients(self, value: Any) -> None:
        watched = self.block().output, self.block().output
        for _ in range(self.rng.choice([1, 2])):
            token = self.rng.randrange(100)
            loss = self.model.logits[0, -1, token] if self.rng.random() < 0.6 else value.sum()
            with loss.backward():
                one, other = (point.grad for point in watched)
                if self.rng.random() < 0.4:
                    watched[0].grad = one * 2 if self.rng.random() < 0.5 else one + other
            self.saved.append((one - other).save())


def outcome(model: LanguageModel, seed: int) -> Sequence[Any] | InterposeError:
    try:
        return flat(Program(model, seed).run())
    except InterposeError as error:
        return error


def flat(nest: Any) -> list[Any]:
    if isinstance(nest, (list, tuple)):
        return [value for item in nest for value in flat(item)]
    return [None if nest is None else torch.as_tensor(nest).detach().clone()]


@pytest.mark.parametrize("parts", [2, 3])
def test_a_program_does_what_it_does_on_the_whole_model(parts: int) -> None:
    ran = 0
    for seed in range(1000 * parts, 1000 * parts + SEEDS):
        found, expected = outcome(language(parts), seed), outcome(language(0), seed)
        if isinstance(expected, InterposeError):
            assert type(found) is type(expected), (seed, found, expected)
        else:
            assert not isinstance(found, InterposeError), (seed, found)
            ran += 1
            same(seed, found, expected)
    assert ran > SEEDS // 2


def same(seed: int, found: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None), seed
        if other is not None:
            # Gradients that come to a value by several ways are summed in another order.
            bound = 1e-5 * max(float(other.double().abs().max()), 1e-3) if other.numel() else 0.0
            assert torch.allclose(one.double(), other.double(), rtol=1e-5, atol=bound, equal_nan=True), seed
