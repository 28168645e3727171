"""Gradients, local and remote, against torch's autograd with hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from interpose.errors import BadArgument, NotReached
from torch import Tensor, nn
from twins import close

PROMPT = "The quick brown fox jumps over"
GPT2 = "tiny-gpt2"
SMOL = "SmolLM2-135M-Instruct"
PATH = {GPT2: "transformer.h.{}", SMOL: "model.layers.{}"}
TARGET = 77
RELATIVE = 1e-4

Edit = Callable[[Tensor], Tensor]


@pytest.fixture(params=[GPT2, SMOL])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def blocks(model: Any, name: str) -> Any:
    return model.transformer.h if name == GPT2 else model.model.layers


class Tape:
    """A forward with autograd on: every watched module's output is a leaf cut into the graph or a tensor in it."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], edits: Mapping[str, Edit]) -> None:
        self.seen: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(path).register_forward_hook(self._hook(path, edit)) for path, edit in edits.items()
        ]
        try:
            self.logits: Tensor = model(**inputs).logits
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str, edit: Edit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            self.seen[path] = first
            new = edit(first)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    def gradients(self, loss: Tensor, *paths: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [self.seen[path] for path in paths], retain_graph=True)


def same(hidden: Tensor) -> Tensor:
    return hidden


@pytest.fixture(autouse=True)
def nothing_is_left(place: Any) -> Any:
    """Afterwards parameters have no gradients and ask for none."""
    yield
    if place.options:
        return
    for module in (GPT2, SMOL):
        loaded = place.open(module)._access._local
        for param in loaded.loaded.model.parameters() if loaded else ():
            assert param.grad is None
            assert not param.requires_grad


def test_after_the_block(place: Any, stock: Callable[..., Any], name: str) -> None:
    """The text the project was asked for, workflow 5."""
    model, twin = place.open(name), stock(name)
    with model.trace(PROMPT, **place.options):
        hidden = blocks(model, name)[1].output[0].save()
        hidden.retain_grad()
        logits = model.output
        loss = -logits[0, -1, TARGET]
        loss.backward()
    tape = Tape(twin.model, twin.inputs(PROMPT), {PATH[name].format(1): same})
    (expected,) = tape.gradients(-tape.logits[0, -1, TARGET], PATH[name].format(1))
    close(hidden.grad, expected, RELATIVE)
    close(hidden.value, tape.seen[PATH[name].format(1)].detach())
    assert not hidden.requires_grad
    assert hidden.grad.grad_fn is None


def test_inside_the_block(place: Any, stock: Callable[..., Any], name: str) -> None:
    model, twin = place.open(name), stock(name)
    with model.trace(PROMPT, **place.options):
        early, late = (blocks(model, name)[index].output[0] for index in (0, 2))
        loss = model.output[0, -1].log_softmax(-1)[TARGET]
        with loss.backward():
            one, two = early.grad.save(), late.grad.save()
            part, norm = late.grad[:, -1].save(), (early.grad * early).sum(-1).save()
        kept = loss.save()
    first, last = PATH[name].format(0), PATH[name].format(2)
    tape = Tape(twin.model, twin.inputs(PROMPT), {first: same, last: same})
    wanted = tape.logits[0, -1].log_softmax(-1)[TARGET]
    expected = tape.gradients(wanted, first, last)
    close(one, expected[0], RELATIVE)
    close(two, expected[1], RELATIVE)
    close(part, expected[1][:, -1], RELATIVE)
    close(norm, (expected[0] * tape.seen[first].detach()).sum(-1), RELATIVE)
    assert torch.allclose(kept, wanted.detach(), rtol=1e-4, atol=1e-5 * float(wanted.detach().abs().max()))


def test_a_replaced_gradient_is_what_goes_on(place: Any, stock: Callable[..., Any], name: str) -> None:
    model, twin = place.open(name), stock(name)
    with model.trace(PROMPT, **place.options):
        early, late = (blocks(model, name)[index].output[0] for index in (0, 2))
        loss = model.output[0, -1, TARGET]
        with loss.backward():
            before = late.grad.save()
            late.grad = late.grad * 2
            late.grad[:, 0] = 0
            after = late.grad.save()
            upstream = early.grad.save()
    first, last = PATH[name].format(0), PATH[name].format(2)
    tape = Tape(twin.model, twin.inputs(PROMPT), {first: same, last: same})
    plain = tape.gradients(tape.logits[0, -1, TARGET], first, last)
    changed = plain[1] * 2
    changed[:, 0] = 0
    (expected,) = torch.autograd.grad(tape.seen[last], tape.seen[first], changed)
    assert not torch.allclose(expected, plain[0], rtol=0.1)
    close(before, plain[1], RELATIVE)
    close(after, changed, RELATIVE)
    close(upstream, expected, RELATIVE)


def test_a_gradient_changed_in_place(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(GPT2), stock(GPT2)
    with model.trace(PROMPT, **place.options):
        early, late = model.transformer.h[0].output[0], model.transformer.h[2].output[0]
        with model.output[0, -1, TARGET].backward():
            late.grad *= -3
            late.grad[:, -1, :5] += 1
            upstream = early.grad.save()
    tape = Tape(twin.model, twin.inputs(PROMPT), {"transformer.h.0": same, "transformer.h.2": same})
    _, changed = tape.gradients(tape.logits[0, -1, TARGET], "transformer.h.0", "transformer.h.2")
    changed = changed * -3
    changed[:, -1, :5] += 1
    (expected,) = torch.autograd.grad(tape.seen["transformer.h.2"], tape.seen["transformer.h.0"], changed)
    close(upstream, expected, RELATIVE)


def test_several_backwards(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(GPT2), stock(GPT2)
    with model.trace(PROMPT, **place.options):
        hidden = model.transformer.h[1].output[0]
        found = []
        for token in (3, 77, 200):
            with model.output[0, -1, token].backward():
                found.append(hidden.grad.save())
    tape = Tape(twin.model, twin.inputs(PROMPT), {"transformer.h.1": same})
    for token, gradient in zip((3, 77, 200), found, strict=True):
        close(gradient, tape.gradients(tape.logits[0, -1, token], "transformer.h.1")[0], RELATIVE)
    assert not torch.allclose(found[0], found[1])


def test_retained_gradients_add_up(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(GPT2), stock(GPT2)
    with model.trace(PROMPT, **place.options):
        hidden = model.transformer.h[1].output[0].save()
        unsaved = model.transformer.h[1].output[0][:, -1]
        hidden.retain_grad()
        model.output[0, -1, 3].backward()
        unsaved.retain_grad()
        (model.output[0, -1, 77] * 2).backward()
    tape = Tape(twin.model, twin.inputs(PROMPT), {"transformer.h.1": same})
    one, two = (tape.gradients(tape.logits[0, -1, token], "transformer.h.1")[0] for token in (3, 77))
    assert not torch.allclose(one + two * 2, two * 2, rtol=0.1)
    close(hidden.grad, one + two * 2, RELATIVE)
    close(unsaved.grad, two[:, -1] * 2, RELATIVE)


def test_of_a_computed_value(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(GPT2), stock(GPT2)
    with model.trace(PROMPT, **place.options):
        hidden = model.transformer.h[1].output[0]
        squared = hidden.pow(2)
        means = squared[:, 1:].mean(-1)
        loss = means.sum() * 3
        with loss.backward():
            of_hidden, of_squared, of_means = hidden.grad.save(), squared.grad.save(), means.grad.save()
    tape = Tape(twin.model, twin.inputs(PROMPT), {"transformer.h.1": same})
    seen = tape.seen["transformer.h.1"]
    square = seen.pow(2)
    mean = square[:, 1:].mean(-1)
    expected = torch.autograd.grad(mean.sum() * 3, [seen, square, mean])
    for found, wanted in zip((of_hidden, of_squared, of_means), expected, strict=True):
        close(found, wanted, RELATIVE)


def test_a_part_asks_and_gets_its_part(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(GPT2), stock(GPT2)
    with model.trace(PROMPT, **place.options):
        part = model.transformer.h[1].output[0][:, 2:4, :7].save()
        part.retain_grad()
        model.output[0, -1, TARGET].backward()
    tape = Tape(twin.model, twin.inputs(PROMPT), {"transformer.h.1": same})
    (expected,) = tape.gradients(tape.logits[0, -1, TARGET], "transformer.h.1")
    close(part.grad, expected[:, 2:4, :7], RELATIVE)


def test_a_write_before_and_after(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(GPT2), stock(GPT2)
    with model.trace(PROMPT, **place.options):
        model.transformer.h[0].output[0][:, -1] *= 2
        hidden = model.transformer.h[1].output[0]
        hidden[:, 1] = 0
        later = model.transformer.h[2].output[0]
        later[:, -1, 3:] *= 0.5
        with model.output[0, -1, TARGET].backward():
            one, two = hidden.grad.save(), later.grad.save()

    def double(value: Tensor) -> Tensor:
        return torch.cat([value[:, :-1], value[:, -1:] * 2], 1)

    kept: dict[str, Tensor] = {}

    def keep(path: str, edit: Edit) -> Edit:
        def change(value: Tensor) -> Tensor:
            kept[path] = edit(value)
            return kept[path]

        return change

    def erase(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, 1] = 0
        return value

    def halve(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, -1, 3:] *= 0.5
        return value

    edits = {"transformer.h.0": double}
    for path, edit in (("transformer.h.1", erase), ("transformer.h.2", halve)):
        edits[path] = keep(path, edit)
    tape = Tape(twin.model, twin.inputs(PROMPT), edits)
    loss = tape.logits[0, -1, TARGET]
    expected = torch.autograd.grad(loss, list(kept.values()))
    plain = Tape(twin.model, twin.inputs(PROMPT), {"transformer.h.1": same})
    (clean,) = plain.gradients(plain.logits[0, -1, TARGET], "transformer.h.1")
    assert not torch.allclose(clean, expected[0], rtol=0.01)
    close(one, expected[0], RELATIVE)
    close(two, expected[1], RELATIVE)


def test_of_attention_patterns(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(GPT2), stock(GPT2, "eager")
    with model.trace(PROMPT, **place.options):
        pattern = model.transformer.h[1].attn.attn_dropout.input.save()
        pattern.retain_grad()
        model.output[0, -1, TARGET].backward()
    inputs = twin.inputs(PROMPT)
    output = twin.model(**inputs, output_attentions=True)
    attention = output.attentions[1]
    (expected,) = torch.autograd.grad(output.logits[0, -1, TARGET], attention)
    close(pattern.value, attention.detach())
    close(pattern.grad, expected, RELATIVE)


def test_prompts_of_different_lengths(place: Any, stock: Callable[..., Any], name: str) -> None:
    model, twin = place.open(name), stock(name)
    prompts = ["Paris", PROMPT, "Once upon a time"]
    with model.trace(**place.options) as tracer:
        losses, saved = [], []
        for number, prompt in enumerate(prompts):
            with tracer.invoke(prompt):
                hidden = blocks(model, name)[1].output[0].save()
                hidden.retain_grad()
                saved.append(hidden)
                losses.append(model.output[0, -1, TARGET] * (number + 1))
        torch.stack(losses).sum().backward()
    path = PATH[name].format(1)
    for number, (prompt, hidden) in enumerate(zip(prompts, saved, strict=True)):
        tape = Tape(twin.model, twin.inputs(prompt), {path: same})
        (expected,) = tape.gradients(tape.logits[0, -1, TARGET] * (number + 1), path)
        close(hidden.grad, expected, RELATIVE)


def test_one_prompts_loss_through_anothers_value(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(GPT2), stock(GPT2)
    rows = [[5, 9, 33, 7], [8, 81, 2, 14]]
    with model.trace(**place.options) as tracer:
        with tracer.invoke(rows[0]):
            source = model.transformer.h[1].output[0].save()
            source.retain_grad()
        with tracer.invoke(rows[1]):
            model.transformer.h[1].output[0][:, 1] = source[:, 2]
            loss = model.output[0, -1, TARGET]
        loss.backward()
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.ones(2, 4, dtype=torch.long)}

    def patch(hidden: Tensor) -> Tensor:
        return torch.cat([hidden[:1], torch.cat([hidden[1:, :1], hidden[:1, 2:3], hidden[1:, 2:]], 1)])

    tape = Tape(twin.model, inputs, {"transformer.h.1": patch})
    (expected,) = tape.gradients(tape.logits[1, -1, TARGET], "transformer.h.1")
    close(source.grad, expected[:1], RELATIVE)
    assert expected[0, 2].abs().max() > 0


def test_through_a_session(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(GPT2), stock(GPT2)
    rows = [[5, 9, 33, 7], [8, 81, 2, 14]]
    with model.session(**place.options):
        with model.trace(rows[0]):
            early = model.transformer.h[0].output[0]
            source = model.transformer.h[2].output[0]
        with model.trace(rows[1]):
            target = model.transformer.h[1].output[0]
            target[:, 1] = source[:, 2]
            loss = model.output[0, -1, TARGET]
            with loss.backward():
                found, second = early.grad.save(), target.grad.save()
    one, two = ({"input_ids": torch.tensor([row])} for row in rows)
    first = Tape(twin.model, one, {"transformer.h.0": same, "transformer.h.2": same})
    kept: list[Tensor] = []

    def patch(hidden: Tensor) -> Tensor:
        source = first.seen["transformer.h.2"]
        kept.append(torch.cat([hidden[:, :1], source[:, 2:3], hidden[:, 2:]], 1))
        return kept[0]

    tape = Tape(twin.model, two, {"transformer.h.1": patch})
    expected = torch.autograd.grad(tape.logits[0, -1, TARGET], [first.seen["transformer.h.0"], kept[0]])
    close(found, expected[0], RELATIVE)
    close(second, expected[1], RELATIVE)


def test_attribution_patching(place: Any, stock: Callable[..., Any], name: str) -> None:
    """Clean values in one run, gradients in another, and their product: all on the server."""
    model, twin = place.open(name), stock(name)
    clean, corrupted = (
        [row % 400 for row in twin.tokenizer(text)["input_ids"][:5]] for text in (PROMPT, "The dog")
    )
    corrupted = (corrupted * 5)[:5]
    with model.session(**place.options) as session:
        scores = session.list()
        with model.trace(clean):
            values = [block.output[0] for block in blocks(model, name)][:3]
        with model.trace(corrupted):
            here = [block.output[0] for block in blocks(model, name)][:3]
            with model.output[0, -1, TARGET].backward():
                scores.extend(((one - two) * two.grad).sum(-1) for one, two in zip(values, here, strict=True))
    paths = [PATH[name].format(index) for index in range(3)]
    with torch.no_grad():
        one = Tape(twin.model, {"input_ids": torch.tensor([clean])}, dict.fromkeys(paths, same)).seen
    tape = Tape(twin.model, {"input_ids": torch.tensor([corrupted])}, dict.fromkeys(paths, same))
    gradients = tape.gradients(tape.logits[0, -1, TARGET], *paths)
    for path, gradient, found in zip(paths, gradients, scores, strict=True):
        close(found, ((one[path] - tape.seen[path].detach()) * gradient).sum(-1), 5 * RELATIVE)


def test_a_loss_made_of_a_gradient(place: Any, stock: Callable[..., Any]) -> None:
    """The gradient is a constant then: `torch.autograd.grad` without create_graph."""
    model, twin = place.open(GPT2), stock(GPT2)
    with model.trace(PROMPT, **place.options):
        hidden = model.transformer.h[1].output[0]
        with model.output[0, -1, TARGET].backward():
            first = hidden.grad.save()
        with (hidden * first).pow(2).sum().backward():
            second = hidden.grad.save()
    tape = Tape(twin.model, twin.inputs(PROMPT), {"transformer.h.1": same})
    (one,) = tape.gradients(tape.logits[0, -1, TARGET], "transformer.h.1")
    (two,) = tape.gradients((tape.seen["transformer.h.1"] * one).pow(2).sum(), "transformer.h.1")
    close(first, one, RELATIVE)
    close(second, two, RELATIVE)


# -- gradients that don't exist ----------------------------------------------------------------------------------


def unrelated(model: Any, tracer: Any) -> None:
    with tracer.invoke([5, 6, 7]):
        hidden = model.transformer.h[1].output[0]
    with tracer.invoke([8, 9]), model.output[0, -1, 3].backward():
        hidden.grad.save()


def replaced(model: Any, tracer: Any) -> None:
    with tracer.invoke([5, 6, 7]):
        hidden = model.transformer.h[0].output[0]
        model.transformer.h[1].output = torch.ones(1, 3, 64)
        with model.output[0, -1, 3].backward():
            hidden.grad.save()


def constant(model: Any, tracer: Any) -> None:
    with tracer.invoke([5, 6, 7]):
        hidden = model.transformer.h[0].output[0]
        with model.lm_head.weight[0].sum().backward():
            hidden.grad.save()


def detached(model: Any, tracer: Any) -> None:
    with tracer.invoke([5, 6, 7]):
        hidden = model.transformer.h[0].output[0]
        with hidden.detach().sum().backward():
            hidden.grad.save()


def later(model: Any, tracer: Any) -> None:
    with tracer.invoke([5, 6, 7]):
        hidden = model.transformer.h[2].output[0]
        with model.transformer.h[0].output[0].sum().backward():
            hidden.grad.save()


def elsewhere(model: Any, tracer: Any) -> None:
    with tracer.invoke([5, 6, 7]):
        part = model.transformer.h[1].output[0] * 2
        with model.output[0, -1, 3].backward():
            part.grad.save()


@pytest.mark.parametrize("program", [unrelated, replaced, constant, detached, later, elsewhere])
def test_what_has_no_gradient_is_an_error(place: Any, program: Any) -> None:
    model = place.open(GPT2)
    with (
        pytest.raises((NotReached, BadArgument), match="gradient") as caught,
        model.trace(**place.options) as tracer,
    ):
        program(model, tracer)
    assert caught.value.source is not None
    assert caught.value.source.file == __file__


def test_a_generation_takes_none(place: Any) -> None:
    model = place.open(GPT2)
    with pytest.raises(BadArgument, match="trace"), model.generate([5, 6], **place.options):
        model.output[0, -1, 3].backward()
