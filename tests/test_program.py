"""What a block recorded, saved, loaded, and run again on other prompts, layers, parameters and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpose import LanguageModel
from interpose.errors import BadArgument, GraphError, ShapeMismatch, UnknownModule
from interpose.program import Program
from models import tiny

ROWS, OTHER = [5, 9, 33], [81, 2, 14, 7, 60]


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel(str(tiny("gpt2")))


@pytest.fixture(scope="module")
def steering(model: Any) -> Program:
    """Adds a scaled vector to block 1 and saves what comes of it."""
    vector = torch.linspace(-1, 1, 64)
    with model.trace(ROWS) as t:
        scale = t.param("scale", 1.5)
        hidden = model.transformer.h[1].output
        hidden[:, -1] += scale * vector
        last = model.output[:, -1].save()
        t.name("best token", model.output[:, -1].argmax(-1))
    assert last.shape == (1, 400)
    return t.graph


def by_hand(model: Any, ids: list[int], layer: int, scale: float) -> torch.Tensor:
    def steer(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, -1] += scale * torch.linspace(-1, 1, 64)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model._model.transformer.h[layer].register_forward_hook(steer)
    try:
        with torch.no_grad():
            return model._model(torch.tensor([ids])).logits[:, -1]
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("ids", "layer", "scale"), [(ROWS, 1, 1.5), (OTHER, 1, 1.5), (ROWS, 2, -4.0), (OTHER, 0, 20.0)]
)
def test_it_runs_again_as_written_by_hand(
    model: Any, steering: Program, tmp_path: Path, ids: list[int], layer: int, scale: float
) -> None:
    loaded = Program.load(steering.save(tmp_path / "steer.json"))
    found = loaded.run(model, ids, layers={1: layer}, scale=scale)
    expected = by_hand(model, ids, layer, scale)
    assert not torch.allclose(expected, by_hand(model, ids, layer, 0.0), atol=1e-3)
    assert set(found) == {"last", "best token"}
    assert torch.equal(found["last"], expected)
    assert torch.equal(found["best token"], expected.argmax(-1))


def test_a_file_is_the_program(steering: Program, tmp_path: Path) -> None:
    path = steering.save(tmp_path / "steer.json")
    assert {item.name for item in tmp_path.iterdir()} == {"steer.json", "steer.safetensors"}
    loaded = Program.load(path)
    assert loaded.hash == steering.hash == json.loads(path.read_text())["hash"]
    assert str(loaded) == str(steering)
    assert (loaded.graph, loaded.names, loaded.origin) == (steering.graph, steering.names, steering.origin)
    from safetensors.torch import load_file

    assert sorted(tensor.numel() for tensor in load_file(path.with_suffix(".safetensors")).values()) == [1, 64]
    assert str(Path(__file__).parent) not in path.read_text()


def test_it_reads_as_lines(steering: Program) -> None:
    lines = str(steering).splitlines()
    assert lines[0].startswith(f"program {steering.hash[:12]} of tiny-gpt2 (float32)")
    assert lines[1:3] == ["run 0: trace", "  invoke 0: token ids (3 tokens)"]
    text = "\n".join(lines)
    assert "param('scale', float32[])" in text
    assert "transformer.h.1.output.getitem" in text or "transformer.h.1.output[:, -1] = " in text
    assert "\nlast = save(" in text
    assert "\nbest token = save(" in text
    assert "# test_program.py:" in text


def test_it_is_what_was_recorded_so_far(model: Any) -> None:
    with model.trace(ROWS) as t:
        early = model.transformer.h[0].output.save()
        before = t.graph
        late = model.output.save()
    assert list(before.names.values()) == ["early"]
    assert list(t.graph.names.values()) == ["early", "late"]
    assert torch.equal(before.run(model)["early"], early)
    assert torch.equal(t.graph.run(model)["late"], late)


def test_saves_without_a_variable_are_numbered(model: Any) -> None:
    with model.trace(ROWS) as t:
        kept = [block.output.save() for block in model.transformer.h]
        for _ in range(2):
            twice = model.output.save()
    found = t.graph.run(model)
    assert list(found) == ["0", "1", "2", "3", "4"]
    assert torch.equal(found["1"], kept[1])
    assert torch.equal(found["4"], twice)


def test_prompts_are_told_apart(model: Any) -> None:
    with model.trace() as t:
        with t.invoke("The capital of France is"):
            first = model.output[:, -1].save()
        with t.invoke("The capital of Italy is"):
            second = model.output[:, -1].save()
    program = t.graph
    assert [invoke.text for invoke in program.prompts] == [
        ("The capital of France is",),
        ("The capital of Italy is",),
    ]
    found = program.run(model, prompts=["The capital of Italy is", "The capital of France is"])
    assert torch.allclose(found["first"], second, atol=1e-5)
    assert torch.allclose(found["second"], first, atol=1e-5)
    with pytest.raises(BadArgument, match="2 prompts: give them all"):
        program.run(model, "one")


def test_sessions_and_generations_are_programs(model: Any, tmp_path: Path) -> None:
    with model.session() as session:
        with model.trace(ROWS):
            hidden = model.transformer.h[0].output.mean(1)
        with model.generate(OTHER, max_new_tokens=3) as t:
            with t.all():
                model.transformer.h[1].output[:, -1] += hidden
            ids = t.result.save()
    program = Program.load(session.graph.save(tmp_path / "both.json"))
    assert not (tmp_path / "both.safetensors").exists()
    assert torch.equal(program.run(model)["ids"], ids)
    assert [run.kind for run in program.graph.runs] == ["trace", "generate"]


def test_it_carries_the_edits_it_ran_with(model: Any) -> None:
    with model.edit() as edited:
        model_block = edited.transformer.h[0]
        model_block.output[:] *= torch.tensor(0.5)
    with edited.trace(ROWS) as t:
        out = edited.output.save()
    assert torch.equal(t.graph.run(model)["out"], out)
    with pytest.raises(BadArgument, match="without edits"):
        t.graph.run(edited)


def test_parameters_are_numbers_positions_and_tensors(model: Any) -> None:
    with model.trace(ROWS) as t:
        at = t.param("at", 0)
        vector = t.param("vector", torch.zeros(64))
        model.transformer.h[0].output[0, at] += vector
        h = model.transformer.h[0].output.save()
    found = t.graph.run(model, at=2, vector=np.ones(64, np.float32))
    assert torch.equal(found["h"][0, :2], h[0, :2])
    assert torch.allclose(found["h"][0, 2], h[0, 2] + 1)
    for wrong, reason in [({"at": 1.5}, "int64"), ({"to": 1}, "no parameter 'to'"), ({"at": "x"}, "a number")]:
        with pytest.raises(BadArgument, match=reason):
            t.graph.run(model, **wrong)
    with pytest.raises(GraphError):
        t.graph.run(model, at=3)
    with pytest.raises(ShapeMismatch, match="doesn't fit"):
        t.graph.run(model, vector=torch.zeros(63))


@pytest.mark.parametrize("name", ["prompt", "layers", "a b", "", 3])
def test_a_parameter_has_a_name_of_its_own(model: Any, name: Any) -> None:
    with pytest.raises(BadArgument, match="name"), model.trace(ROWS) as t:
        t.param(name, 1.0)


def test_it_is_carried_to_another_model(model: Any, steering: Program) -> None:
    other = LanguageModel(str(tiny("llama")))
    with other.trace(ROWS):
        other.model.layers[2].output[0][:, -1] += 3.0 * torch.linspace(-1, 1, 64)
        expected = other.output[:, -1].save()
    found = steering.run(other, ROWS, layers={1: 2}, scale=3.0)
    assert torch.equal(found["last"], expected)


def test_text_is_read_by_the_other_models_tokenizer(model: Any) -> None:
    with model.trace("The capital of France is") as t:
        out = model.output.save()
    other = LanguageModel(str(tiny("llama")))
    with other.trace("The capital of France is"):
        expected = other.output.save()
    assert t.graph.run(other)["out"].shape == expected.shape
    assert out.shape[1] != expected.shape[1] or torch.equal(t.graph.run(other)["out"], expected)


def test_what_does_not_fit_is_refused_with_reasons(model: Any) -> None:
    with model.trace(ROWS) as t:
        model.transformer.h[0].attn.output[0].save()
        model.transformer.h[1].mlp.c_fc.output.save()
    with pytest.raises(UnknownModule, match="doesn't fit tiny-llama") as caught:
        t.graph.run(LanguageModel(str(tiny("llama"))), ROWS)
    assert len(caught.value.details["reasons"]) == 2
    for layers, reason in [({2: 0}, "touches 0, 1"), ({0: 9}, "layers 0 to 2"), ({0: -1}, "layers 0 to 2")]:
        with pytest.raises(BadArgument, match=reason):
            t.graph.run(model, layers=layers)


def test_layers_out_of_order_are_refused(model: Any) -> None:
    with model.trace(ROWS) as t:
        early = model.transformer.h[0].output * 1
        model.transformer.h[1].output = early
        model.output.save()
    with pytest.raises(GraphError, match="doesn't fit"):
        t.graph.run(model, layers={0: 2, 1: 0})


def test_it_keeps_tensors_as_they_were(model: Any) -> None:
    vector = torch.ones(64)
    with model.trace(ROWS) as t:
        model.transformer.h[0].output[:, -1] += vector
        out = model.output.save()
    program = t.graph
    vector.zero_()
    assert torch.equal(program.run(model)["out"], out)
    with pytest.raises(BadArgument, match="changed"):
        _ = t.graph
