"""The workflows of the text the project was asked for, local and remote, against hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from twins import alive, close, run, same

GPT2 = "tiny-gpt2"
SMOL = "SmolLM2-135M-Instruct"


@pytest.fixture(params=[GPT2, SMOL])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def blocks(model: Any, name: str) -> Any:
    return model.transformer.h if name == GPT2 else model.model.layers


PATH = {GPT2: "transformer.h.{}", SMOL: "model.layers.{}"}


def test_activation_analysis(place: Any, stock: Callable[..., Any], name: str) -> None:
    model = place.open(name)
    prompt = "The capital of France is"
    with model.trace(prompt, **place.options):
        layer_outputs = [block.output[0].save() for block in blocks(model, name)]
        logits = model.output.save()
    twin = stock(name)
    expected = run(twin.model, twin.inputs(prompt))
    for index, layer in enumerate(layer_outputs):
        same(layer, expected[PATH[name].format(index)])
        assert layer.norm().item() > 0
    same(logits, expected[""])
    top = torch.softmax(logits[0, -1], dim=-1).topk(5)
    assert model.tokenizer.decode(top.indices[0]) == twin.tokenizer.decode(expected[""][0, -1].argmax())


def test_attention_patterns(place: Any, stock: Callable[..., Any]) -> None:
    model = place.open(GPT2)
    prompt = "The capital of France is"
    with model.trace(prompt, **place.options):
        patterns = [block.attn.attn_dropout.input.save() for block in model.transformer.h]
        first = model.transformer.h[1].attn.attn_dropout.input[0][0].save()
    twin = stock(GPT2, "eager")
    with torch.no_grad():
        expected = twin.model(**twin.inputs(prompt), output_attentions=True).attentions
    for pattern, wanted in zip(patterns, expected, strict=True):
        same(pattern, wanted)
        assert torch.allclose(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    same(first, expected[1][0, 0])


def test_zeroing_a_layer(place: Any, stock: Callable[..., Any]) -> None:
    model = place.open(GPT2)
    prompt = "The Eiffel Tower is in"
    with model.trace(prompt, **place.options):
        model.transformer.h[1].output[0][:] = 0
        logits = model.output.save()
    twin = stock(GPT2)
    clean = run(twin.model, twin.inputs(prompt))[""]
    expected = run(twin.model, twin.inputs(prompt), {"transformer.h.1": torch.zeros_like})[""]
    assert not torch.equal(clean, expected)
    same(logits, expected)


def test_patching(place: Any, stock: Callable[..., Any], name: str) -> None:
    model = place.open(name)
    twin = stock(name)
    clean, corrupted = "The capital of France is", "The capital of Poland is"
    rows = [twin.tokenizer(text)["input_ids"] for text in (clean, corrupted)]
    width = min(map(len, rows))
    with model.trace(rows[0][:width], **place.options):
        clean_hidden = blocks(model, name)[1].output[0].save()
    with model.trace(rows[1][:width], **place.options):
        blocks(model, name)[1].output[0][:, -1] = clean_hidden[:, -1]
        patched_logits = model.output.save()

    def ids(row: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row[:width]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    path = PATH[name].format(1)
    source = run(twin.model, ids(rows[0]))[path]

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        new = hidden.clone()
        new[:, -1] = source[:, -1]
        return new

    unpatched = run(twin.model, ids(rows[1]))[""]
    expected = run(twin.model, ids(rows[1]), {path: edit})[""]
    same(clean_hidden, source)
    assert not torch.equal(unpatched, expected)
    same(patched_logits, expected)


def test_sweep(place: Any, stock: Callable[..., Any]) -> None:
    model = place.open(GPT2)
    twin = stock(GPT2)
    clean, corrupted = "Mary went to Paris", "John went to Paris"
    with model.trace(clean, **place.options):
        clean_cache = [block.output[0].save() for block in model.transformer.h]

    def patch_layer_position(layer: int, position: int) -> Any:
        with model.trace(corrupted, **place.options):
            current = model.transformer.h[layer].output[0]
            current[:, position, :] = clean_cache[layer][:, position, :]
            return model.output.save()

    inputs = twin.inputs(corrupted)
    positions = min(inputs["input_ids"].shape[1], clean_cache[0].shape[1])
    plain = run(twin.model, inputs)[""]
    moved = 0
    for layer in range(3):
        for position in range(positions):
            source = clean_cache[layer]

            def edit(hidden: torch.Tensor, source: Any = source, position: int = position) -> torch.Tensor:
                new = hidden.clone()
                new[:, position, :] = source[:, position, :]
                return new

            expected = run(twin.model, inputs, {f"transformer.h.{layer}": edit})[""]
            moved += not torch.equal(plain, expected)
            same(patch_layer_position(layer, position), expected)
    assert moved > positions


def test_single_remote_trace(place: Any, stock: Callable[..., Any]) -> None:
    model = place.open(SMOL)
    with model.trace("The meaning of life is", **place.options) as tracer:
        layer = model.model.layers[20].output[0].save()
        model.model.layers[20].output[0][:, -1, :] *= 1.5
        logits = model.output.save()
    assert tracer is not None
    twin = stock(SMOL)
    inputs = twin.inputs("The meaning of life is")

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        new = hidden.clone()
        new[:, -1, :] *= 1.5
        return new

    same(layer, run(twin.model, inputs)["model.layers.20"])
    same(logits, run(twin.model, inputs, {"model.layers.20": edit})[""])


def test_values_across_prompts(place: Any, stock: Callable[..., Any], name: str) -> None:
    model = place.open(name)
    twin = stock(name)
    cat, dog = "The cat sat on the mat", "The dog ran through the park"
    rows = [twin.tokenizer(text)["input_ids"][:5] for text in (cat, dog)]
    with model.trace(**place.options) as tracer:
        with tracer.invoke(rows[0]):
            cat_hidden = blocks(model, name)[1].output[0].save()
        with tracer.invoke(rows[1]):
            blocks(model, name)[1].output[0][:] = cat_hidden
            dog_with_cat = model.output.save()
    ids = torch.tensor(rows)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    path = PATH[name].format(1)

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        new = hidden.clone()
        new[1] = hidden[0]
        return new

    expected = run(twin.model, inputs, {path: edit})
    assert not torch.equal(run(twin.model, inputs)[""][1], expected[""][1])
    same(cat_hidden, expected[path][:1])
    same(dog_with_cat, expected[""][1:])


def test_unequal_prompts_equal_each_alone(place: Any, stock: Callable[..., Any], name: str) -> None:
    model = place.open(name)
    twin = stock(name)
    prompts = ["Paris", "The capital of France is Paris, and the capital", "Once upon a time"]
    with model.trace(**place.options) as tracer:
        saved = []
        for prompt in prompts:
            with tracer.invoke(prompt):
                saved.append((blocks(model, name)[2].output[0].save(), model.output.save()))
        whole = tracer.invoke()
        with whole:
            everything = model.output.save()
            mask = tracer.attention_mask.save()
    for prompt, (hidden, logits) in zip(prompts, saved, strict=True):
        alone = run(twin.model, twin.inputs(prompt))
        close(hidden, alone[PATH[name].format(2)])
        close(logits, alone[""])
    width = max(logits.shape[1] for _, logits in saved)
    assert everything.shape[:2] == (3, width) == mask.shape
    assert mask.sum(1).tolist() == [logits.shape[1] for _, logits in saved]
    same(everything[1], saved[1][1][0])
    alive(everything[0, -1])
