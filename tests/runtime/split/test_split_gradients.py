"""Gradients go back by the shards, and are the whole model's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cutting import Cut, block_ranges, cut
from interpose.errors import InternalError
from interpose.runtime.hooks import hooked
from interpose.runtime.split.route import HOME, Landing, Mail, Nest, Waves
from splitting import fed, split, whole
from torch import Tensor, nn

ARCHS = [
    "gpt2",
    "llama",
    "gemma3",
    "mixtral",
    "mamba",
    "mamba2",
    "bloom",
    "falcon",
    "neox",
    "bert",
    "vit",
    "clip_vision",
]


def embedding(model: Any) -> nn.Module:
    """What makes the hidden states of ids or pixels."""
    return next(module for module in model.modules() if isinstance(module, (nn.Embedding, nn.Conv2d)))


def loss_and_gradient(model: Any, inputs: dict[str, Any], backwards: int = 1) -> list[Tensor]:
    """The loss of a forward, and its gradient at what the embedding made, one a backward."""
    found: list[Tensor] = []

    def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    handle = embedding(model).register_forward_hook(leave)
    try:
        output = next(iter(model(**inputs).values()))
    finally:
        handle.remove()
    loss = output.float().square().mean() + output[:, -1].float().sum()
    values = [loss.detach()]
    for index in range(backwards):
        (gradient,) = torch.autograd.grad(loss, found[:1], retain_graph=index + 1 < backwards)
        values.append(gradient)
    return values


def idle(parts: Cut) -> None:
    """Nothing of any forward is left on a shard."""
    gc.collect()
    for site, stop in parts.route._stops.items():
        parts.route._threads[site].run(lambda: None)
        assert not stop._entries and not stop.station._kept  # type: ignore[attr-defined]
    assert not parts.route._ways


@pytest.mark.parametrize("arch", ARCHS)
def test_of_a_loss_at_the_embedding(arch: str) -> None:
    model, inputs = whole(arch), fed(arch)
    expected = loss_and_gradient(model, inputs)
    with split(model, 3 if arch not in ("vit", "clip_vision") else 2) as parts:
        for _ in range(2):
            found = loss_and_gradient(parts.home, inputs)
            assert all(map(torch.equal, expected, found))
        assert expected[1].abs().sum() > 0
        idle(parts)


def test_again_by_the_same_graph() -> None:
    model, inputs = whole("gemma3"), fed("gemma3")
    with split(model, 2) as parts:
        first, second = loss_and_gradient(parts.home, inputs, backwards=2)[1:]
        assert torch.equal(first, second)
        assert torch.equal(first, loss_and_gradient(model, inputs)[1])
        idle(parts)


def test_of_every_hidden_state() -> None:
    model, inputs = whole("llama"), fed("llama")

    def gradients(model: Any) -> list[Tensor]:
        embeds = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        output = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], output_hidden_states=True)
        loss = sum(state.square().mean() * (index + 1) for index, state in enumerate(output.hidden_states))
        return [*torch.autograd.grad(loss, [embeds, *output.hidden_states[1:]])]

    with split(model, 3) as parts:
        # A state is used by its block's two branches and the loss: at a border the loss's share is added last.
        torch.testing.assert_close(gradients(parts.home), gradients(model), rtol=1e-5, atol=1e-5)
        idle(parts)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, hidden: Tensor, shift: Tensor) -> Tensor:
        return torch.tanh(hidden * self.scale) + shift * hidden


class Shifts(nn.Module):
    """What every block is given beside its hidden states requires gradients too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Shifted() for _ in range(4)])

    def forward(self, hidden: Tensor) -> Tensor:
        shift = (hidden + 0).sin()
        for layer in self.layers:
            hidden = layer(hidden, shift)
        return hidden


def test_of_arguments_that_all_blocks_share() -> None:
    model, hidden = Shifts(), torch.randn(2, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(model(hidden).sum(), hidden)
    with split(model, 3) as parts:
        parts.home(hidden.detach())
        (found,) = torch.autograd.grad(parts.home(hidden).sum(), hidden)
        torch.testing.assert_close(found, expected)
        idle(parts)


class Overwriting(Shifts):
    """Blocks write over what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Doubling() for _ in range(4)])


class Doubling(Shifted):
    def forward(self, hidden: Tensor, shift: Tensor) -> Tensor:
        hidden += shift * self.scale
        return hidden


def test_blocks_that_write_over_what_they_are_given() -> None:
    model, hidden = Overwriting(), torch.randn(2, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(model(hidden * 1).sum(), hidden)
    with split(model, 2) as parts:
        parts.home(hidden.detach().clone())
        (found,) = torch.autograd.grad(parts.home(hidden * 1).sum(), hidden)
        torch.testing.assert_close(found, expected)
        idle(parts)


class Watching:
    """A guest that cuts the graph at what a block returns, and sends home a value and its gradient."""

    def __init__(self, path: str, block: nn.Module) -> None:
        self._path, self._block = path, block
        self._gradients: list[Tensor] = []
        self._watched: Tensor | None = None

    attention = False

    def visit_hook(self, value: Tensor) -> Tensor:
        self._watched = value if value.requires_grad else value.detach().requires_grad_()
        self._watched.register_hook(self._gradients.append)  # type: ignore[no-untyped-call]
        return self._watched

    def visit(
        self, work: Nest, mail: Sequence[Mail], run: Callable[[], Tensor]
    ) -> tuple[Tensor | None, Nest, Sequence[Mail]]:
        if work is None:
            return run(), None, ()
        with hooked({self._path: self._block}, {self._block: self._path}, _At(self)):
            hidden = run()
        assert self._watched is not None
        out = None if work == "last" else hidden
        return out, "seen", [Mail(HOME, ("value",), {"v": (self._watched * 2).sum()})]

    def wave(self, work: Nest, mail: Sequence[Mail], run: Callable[[], None]) -> tuple[Nest, Sequence[Mail]]:
        self._gradients.clear()
        run()
        assert self._watched is not None
        self._watched.grad = None
        return None, [Mail(HOME, ("gradient",), gradient) for gradient in self._gradients]

    def errand(self, name: str, request: Nest) -> Nest:
        return [name, request]


class _At:
    attention = False

    def __init__(self, guest: Watching) -> None:
        self._guest = guest

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        return self._guest.visit_hook(value) if event == "exit" else value

    def astray(self, module: str) -> None: ...


class Home:
    """A carrier with work for one site."""

    attention = False

    def __init__(self, site: int, work: Nest) -> None:
        self._site, self._work = site, work
        self.mail: list[Mail] = []
        self.ebb: list[Mail] = []

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        return value

    def astray(self, module: str) -> None: ...

    def load(self, site: int) -> tuple[Nest, Sequence[Mail]]:
        return (self._work if site == self._site else None), ()

    def reach(self) -> int:
        return 99

    def landed(self, landing: Landing) -> None:
        self.mail += landing.mail
        if landing.hidden is None:
            raise ZeroDivisionError

    @property
    def waves(self) -> Waves:
        return self

    def wave(self, site: int) -> tuple[Nest, Sequence[Mail]]:
        return (self._work if site == self._site else None), ()

    def ebbed(self, landing: Landing) -> None:
        self.ebb += landing.mail


def watched(model: Any) -> Cut:
    shards = block_ranges(model, 3)

    def guest(site: int, part: nn.Module) -> Watching:
        path = shards[site - 1][-1]
        return Watching(path, part.get_submodule(path))

    return cut(model, shards, guest)


def test_of_a_value_watched_on_a_shard() -> None:
    model, inputs = whole("gpt2"), fed("gpt2")
    at = model.transformer.h[1]
    seen: list[Tensor] = []
    handle = at.register_forward_hook(
        lambda module, args, output: seen.append(output.detach().requires_grad_()) or seen[-1]  # type: ignore[func-returns-value]
    )
    loss = model(**inputs).logits.square().mean() + (seen[0] * 2).sum()
    handle.remove()
    (expected,) = torch.autograd.grad(loss, seen)
    parts = watched(model)
    parts.home(**inputs)
    home = Home(2, {"watch": True})
    with hooked({}, {}, home):
        logits = parts.home(**inputs).logits
    value = next(letter.value["v"] for letter in home.mail if letter.address == ("value",))
    assert value.requires_grad and logits.requires_grad
    total = logits.square().mean() + value
    assert torch.equal(total, loss)
    for _ in range(2):
        total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(home.ebb[-1].value, expected, rtol=1e-6, atol=1e-7)
    assert len(home.ebb) == 2
    assert parts.route.errand(2, "hello", 1) == ["hello", 1]
    del total, logits, value
    home.mail.clear()
    idle(parts)
    parts.route.close()


def test_a_shard_may_be_the_last() -> None:
    model, inputs = whole("gpt2"), fed("gpt2")
    parts = watched(model)
    parts.home(**inputs)
    calls: list[int] = []
    parts.parts[2].get_submodule("transformer.h.2").register_forward_hook(lambda *_: calls.append(1))
    home = Home(2, "last")
    with pytest.raises(ZeroDivisionError), hooked({}, {}, home):
        parts.home(**inputs)
    assert not calls and [letter.address for letter in home.mail] == [("value",)]
    home.mail.clear()
    idle(parts)
    parts.route.close()


def test_a_graph_that_is_gone_says_so() -> None:
    with split(whole("gpt2"), 2) as parts, pytest.raises(InternalError, match="keeps no graph"):
        parts.route._stops[1].station.wave(7, [], None, ())
