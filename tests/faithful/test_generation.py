"""Generation: token for token what a decode loop written by hand gives, and what transformers' `generate` gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from decoding import decode
from interpose import LanguageModel
from interpose.errors import NotReached
from models import tiny
from transformers import AutoModelForCausalLM
from twins import alive, close, same

PROMPT = "The capital of France is"
BLOCK = {"tiny-gpt2": "transformer.h.1", "tiny-llama": "model.layers.1", "SmolLM2-135M-Instruct": "model.layers.9"}
NEW = 7


@pytest.fixture(params=["tiny-gpt2", "tiny-llama"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def block(model: Any, name: str) -> Any:
    module = model
    for part in BLOCK[name].split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def half(hidden: torch.Tensor) -> torch.Tensor:
    """An intervention that turns the newest token's hidden state around."""
    hidden[:, -1] *= -0.5
    return hidden


@pytest.fixture
def twin(stock: Callable[..., Any], name: str) -> Any:
    return stock(name)


@pytest.mark.parametrize("model_name", [*BLOCK])
def test_untouched_it_is_the_librarys_own(place: Any, stock: Callable[..., Any], model_name: str) -> None:
    model, twin = place.open(model_name), stock(model_name)
    with model.generate(PROMPT, max_new_tokens=NEW, **place.options) as tracer:
        tokens = tracer.result.save()
        output = model.generator.output.save()
    inputs = twin.inputs(PROMPT)
    expected = twin.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(tokens, expected)
    assert torch.equal(output, expected)
    assert torch.equal(decode(twin.model, inputs["input_ids"][0].tolist(), NEW).tokens, expected)


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"temperature": 2.5, "top_k": 5},
    {"top_p": 0.7},
    {"top_k": 20, "top_p": 0.8, "temperature": 1.5},
    {"repetition_penalty": 1.8, "top_k": 0},
    {"min_p": 0.02, "typical_p": 0.9},
    {"no_repeat_ngram_size": 2, "temperature": 0.1},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_sampling_is_the_librarys_own(
    place: Any, name: str, twin: Any, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model, inputs = place.open(name), twin.inputs(PROMPT)
    drawn = set()
    for seed in (0, 5):
        with model.generate(
            PROMPT, max_new_tokens=12, do_sample=True, seed=seed, **options, **place.options
        ) as tracer:
            tokens = tracer.result.save()
        torch.manual_seed(seed)
        expected = twin.model.generate(**inputs, max_new_tokens=12, do_sample=True, **options)
        assert torch.equal(tokens, expected)
        drawn.add(tuple(tokens[0].tolist()))
    assert len(drawn) == 2 or options.get("temperature", 1) < 1


CHOSEN: list[tuple[str, Any, list[int]]] = [
    ("int", 2, [2]),
    ("negative", -1, [NEW - 1]),
    ("slice", slice(1, 4), [1, 2, 3]),
    ("open slice", slice(3, None), [3, 4, 5, 6]),
    ("strided", slice(0, None, 3), [0, 3, 6]),
    ("list", [0, 4], [0, 4]),
    ("negative list", [1, -2], [1, NEW - 2]),
]


@pytest.mark.parametrize(("selection", "steps"), [case[1:] for case in CHOSEN], ids=[case[0] for case in CHOSEN])
def test_a_loop_over_steps(place: Any, name: str, twin: Any, selection: Any, steps: list[int]) -> None:
    model = place.open(name)
    with model.generate(PROMPT, max_new_tokens=NEW, **place.options) as tracer:
        logits, numbers = tracer.list(), []
        for step in tracer.iter[selection]:
            numbers.append(step)
            block(model, name).output[0][:, -1] *= -0.5
            logits.append(model.output)
        tokens = tracer.result.save()
    ids = twin.inputs(PROMPT)["input_ids"][0].tolist()
    expected = decode(twin.model, ids, NEW, {(step, BLOCK[name]): half for step in steps})
    assert numbers == steps
    assert steps == [NEW - 1] or not torch.equal(expected.tokens, decode(twin.model, ids, NEW).tokens)
    assert torch.equal(tokens, expected.tokens)
    for step, found in zip(steps, logits, strict=True):
        same(found, expected[step, ""])


@pytest.mark.parametrize(
    ("selection", "steps"),
    [(slice(1, 4), [1, 2, 3]), (slice(2, None), [2, 3, 4, 5, 6]), (3, [3]), (None, range(7))],
)
def test_a_body_for_steps(place: Any, name: str, twin: Any, selection: Any, steps: Any) -> None:
    model = place.open(name)
    with model.generate(PROMPT, max_new_tokens=NEW, **place.options) as tracer:
        with tracer.all() if selection is None else tracer.iter[selection]:
            block(model, name).output[0][:, -1] *= -0.5
            logits = model.output.save()
        tokens = tracer.result.save()
    ids = twin.inputs(PROMPT)["input_ids"][0].tolist()
    expected = decode(twin.model, ids, NEW, {(step, BLOCK[name]): half for step in steps})
    assert not torch.equal(expected.tokens, decode(twin.model, ids, NEW).tokens)
    assert torch.equal(tokens, expected.tokens)
    for step, found in zip(steps, logits if isinstance(logits, list) else [logits], strict=True):
        same(found, expected[step, ""])


def test_outside_of_steps_it_is_the_prompt(place: Any, name: str, twin: Any) -> None:
    model = place.open(name)
    with model.generate(PROMPT, max_new_tokens=NEW, **place.options) as tracer:
        before = block(model, name).output[0].save()
        block(model, name).output[0][:, -1] *= -0.5
        tokens = tracer.result.save()
    ids = twin.inputs(PROMPT)["input_ids"][0].tolist()
    expected = decode(twin.model, ids, NEW, {(0, BLOCK[name]): half})
    assert torch.equal(tokens, expected.tokens)
    same(before, decode(twin.model, ids, 1)[0, BLOCK[name]])


def test_a_value_of_one_step_changes_a_later_one(place: Any, name: str, twin: Any) -> None:
    model = place.open(name)
    with model.generate(PROMPT, max_new_tokens=NEW, **place.options) as tracer:
        with tracer.iter[2]:
            kept = block(model, name).output[0][:, -1]
        for _ in tracer.iter[[4]]:
            block(model, name).output[0][:, -1] = kept * 2
            later = model.output.save()
        tokens = tracer.result.save()
    ids = twin.inputs(PROMPT)["input_ids"][0].tolist()
    plain = decode(twin.model, ids, NEW)

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        hidden[:, -1] = plain[2, BLOCK[name]][:, -1] * 2
        return hidden

    expected = decode(twin.model, ids, NEW, {(4, BLOCK[name]): edit})
    assert not torch.equal(expected[4, ""], plain[4, ""])
    same(later, expected[4, ""])
    assert torch.equal(tokens, expected.tokens)


def test_attention_looks_back_further_each_step(place: Any, name: str, stock: Callable[..., Any]) -> None:
    model, twin = place.open(name), stock(name, "eager")
    with model.generate(PROMPT, max_new_tokens=4, **place.options) as tracer:
        attention = block(model, name).attn if name == "tiny-gpt2" else block(model, name).self_attn
        patterns = [attention.pattern.save() for _ in tracer.iter[:]]
        with tracer.all():
            again = attention.pattern.save()
    ids = twin.inputs(PROMPT)["input_ids"][0].tolist()
    state, feed = None, torch.tensor([ids])
    with torch.no_grad():
        for step, (pattern, repeated) in enumerate(zip(patterns, again, strict=True)):
            output = twin.model(input_ids=feed, past_key_values=state, use_cache=True, output_attentions=True)
            state, feed = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            assert pattern.shape == (1, 4, 1 if step else len(ids), len(ids) + step)
            same(pattern, output.attentions[1])
            assert torch.equal(repeated, pattern)


def test_prompts_of_different_lengths_equal_each_alone(place: Any, name: str, twin: Any) -> None:
    model = place.open(name)
    prompts = ["Paris", "The capital of France is Paris, and the", "Once upon a time"]
    with model.generate(max_new_tokens=NEW, eos_token_id=-1, **place.options) as tracer:
        saved = []
        for prompt in prompts:
            with tracer.invoke(prompt):
                hidden = [block(model, name).output[0].save() for _ in tracer.iter[:3]]
                for _ in tracer.iter[1:3]:
                    block(model, name).output[0][:, -1] *= -0.5
                saved.append((hidden, [model.output.save() for _ in tracer.iter[:]]))
        tokens = tracer.result.save()
    for row, prompt, (hidden, logits) in zip(tokens, prompts, saved, strict=True):
        ids = twin.inputs(prompt)["input_ids"][0].tolist()
        plain = decode(twin.model, ids, NEW)
        expected = decode(twin.model, ids, NEW, {(step, BLOCK[name]): half for step in (1, 2)})
        assert not torch.equal(plain[2, ""], expected[2, ""])
        assert row[-len(ids) - NEW :].tolist() == expected.tokens[0].tolist()
        close(hidden[0], plain[0, BLOCK[name]])
        for step, found in enumerate(logits):
            close(found, expected[step, ""], 2e-5)


def test_a_generation_called_in_a_trace(place: Any, name: str, twin: Any) -> None:
    model = place.open(name)
    with model.trace(**place.options) as tracer:
        with tracer.invoke(PROMPT):
            block(model, name).output[0][:, -1, :] *= -0.5
        output = model.generate(max_new_tokens=NEW)
    ids = twin.inputs(PROMPT)["input_ids"][0].tolist()
    assert torch.equal(output, decode(twin.model, ids, NEW, {(0, BLOCK[name]): half}).tokens)
    assert not torch.equal(output, decode(twin.model, ids, NEW).tokens)


# -- ending early ------------------------------------------------------------------------------------------------


def test_an_end_token_ends_it(place: Any, name: str, twin: Any) -> None:
    model, inputs = place.open(name), twin.inputs(PROMPT)
    length = inputs["input_ids"].shape[1]
    plain = decode(twin.model, inputs["input_ids"][0].tolist(), NEW)
    end = int(plain.tokens[0, length + 2])
    first = plain.tokens[0, length:].tolist().index(end)
    with model.generate(PROMPT, max_new_tokens=NEW, eos_token_id=end, **place.options) as tracer:
        each = [model.output.save() for _ in tracer.iter[:]]
        with tracer.all():
            gathered = model.output.save()
        tokens = tracer.result.save()
    expected = twin.model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=end)
    assert torch.equal(tokens, expected)
    assert len(gathered) == first + 1 < NEW
    for step, found in enumerate(gathered):
        same(found, plain[step, ""])
        same(each[step], plain[step, ""])
    for absent in each[first + 1 :]:
        with pytest.raises(NotReached, match="step"):
            _ = absent + 1
        with pytest.raises(NotReached, match="step"):
            absent.sum()


def test_a_stop_string_ends_it(place: Any, name: str, twin: Any) -> None:
    model, inputs = place.open(name), twin.inputs(PROMPT)
    plain = twin.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = twin.tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :])
    stop = next(text[at : at + 2] for at in range(4, len(text)) if text[at : at + 2].isascii())
    with model.generate(PROMPT, max_new_tokens=12, stop_strings=[stop], **place.options) as tracer:
        tokens = tracer.result.save()
    expected = twin.model.generate(
        **inputs, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=twin.tokenizer
    )
    assert torch.equal(tokens, expected)
    assert expected.shape[1] < plain.shape[1]


def test_a_row_that_has_ended_waits_for_the_others(place: Any, name: str, twin: Any) -> None:
    model = place.open(name)
    prompts = [PROMPT, "Once upon a time"]
    rows = [twin.inputs(prompt)["input_ids"][0].tolist() for prompt in prompts]
    alone = [decode(twin.model, row, NEW).tokens[0, len(row) :].tolist() for row in rows]
    end = next(token for token in alone[0][:-2] if token not in alone[1])
    with model.generate(prompts, max_new_tokens=NEW, eos_token_id=end, **place.options) as tracer:
        tokens = tracer.result.save()
    ended = alone[0][: alone[0].index(end) + 1]
    width = max(map(len, rows))
    assert tokens[0, width : width + len(ended)].tolist() == ended
    assert len(set(tokens[0, width + len(ended) :].tolist())) == 1
    assert tokens[1, width:].tolist() == alone[1]


def test_nobody_asks_so_later_steps_do_not_run(stock: Callable[..., Any]) -> None:
    model = LanguageModel(str(tiny("gpt2")))
    calls: list[int] = []
    handle = model._model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with model.generate(PROMPT, max_new_tokens=20) as tracer:
            for _ in tracer.iter[:3]:
                logits = model.output.save()
    finally:
        handle.remove()
    alive(logits)
    assert len(calls) == 3


# -- every kind of cache -----------------------------------------------------------------------------------------

OTHERS = {
    "gemma3": "model.layers.1",
    "mistral": "model.layers.1",
    "opt": "model.decoder.layers.1",
    "neox": "gpt_neox.layers.1",
    "qwen3_moe": "model.layers.1",
    "bloom": "transformer.h.1",
}


@cache
def pair(arch: str) -> tuple[Any, Any]:
    return LanguageModel(str(tiny(arch))), AutoModelForCausalLM.from_pretrained(tiny(arch)).eval()


@pytest.mark.parametrize("arch", OTHERS)
def test_architectures(arch: str) -> None:
    model, stock = pair(arch)
    ids = [5 + 17 * place % 300 for place in range(9)]
    module = model
    for part in OTHERS[arch].split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    with model.generate(ids, max_new_tokens=9, eos_token_id=-1) as tracer:
        for _ in tracer.iter[1:5]:
            module.output[0][:, -1] *= -0.5
        logits = [model.output.save() for _ in tracer.iter[:]]
        tokens = tracer.result.save()
    plain = decode(stock, ids, 9)
    expected = decode(stock, ids, 9, {(step, OTHERS[arch]): half for step in range(1, 5)})
    assert not torch.equal(plain.tokens, expected.tokens)
    assert torch.equal(tokens, expected.tokens)
    for step, found in enumerate(logits):
        close(found, expected[step, ""])
    with model.generate(ids, max_new_tokens=9) as tracer:
        untouched = tracer.result.save()
    assert torch.equal(untouched, stock.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False))


@pytest.mark.parametrize("arch", ["gemma3", "mistral"])
def test_a_window_that_slides(arch: str) -> None:
    model, _ = pair(arch)
    stock = AutoModelForCausalLM.from_pretrained(tiny(arch), attn_implementation="eager").eval()
    rows = [[5 + 17 * place % 300 for place in range(length)] for length in (4, 10, 14)]
    with model.generate(max_new_tokens=6, eos_token_id=-1) as tracer:
        saved = []
        for row in rows:
            with tracer.invoke(row):
                steps = [[layer.self_attn.pattern for layer in model.model.layers] for _ in tracer.iter[:]]
                assert [each[0].shape[-1] for each in steps[1:]] == [min(len(row) + n, 12) for n in range(1, 6)]
                saved.append([[pattern.save() for pattern in each] for each in steps])
    for row, steps in zip(rows, saved, strict=True):
        expected = stock.generate(
            torch.tensor([row]), max_new_tokens=6, do_sample=False, eos_token_id=-1, output_attentions=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        for found, wanted in zip(steps, expected.attentions, strict=True):
            for one, other in zip(found, wanted, strict=True):
                close(one, other, 2e-5)


def test_a_state_space_model() -> None:
    model, stock = pair("mamba")
    ids = [5 + 17 * place % 300 for place in range(9)]
    with model.generate(ids, max_new_tokens=6) as tracer:
        for _ in tracer.iter[1:4]:
            model.backbone.layers[1].output[:, -1] *= -0.5
        tokens = tracer.result.save()
    calls: list[int] = []

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        calls.append(1)
        return half(output.clone()) if 2 <= len(calls) <= 4 else None

    given = torch.tensor([ids])
    plain = stock.generate(given, max_new_tokens=6, do_sample=False)
    handle = stock.backbone.layers[1].register_forward_hook(hook)
    try:
        expected = stock.generate(given, max_new_tokens=6, do_sample=False)
    finally:
        handle.remove()
    assert not torch.equal(plain, expected)
    assert torch.equal(tokens, expected)
