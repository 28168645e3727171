"""What reads as what while recording: outputs of blocks and models, stand-ins, shapes, what Python can't have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.errors import (
    BadArgument,
    ControlFlow,
    DeferredError,
    NotSaved,
    ShapeMismatch,
    ShapeUnknown,
    UnknownModule,
    UnknownOp,
    UnknownPoint,
)
from interpose.tracing.handles import Module
from models import tiny

ROWS = [[5, 9, 33, 7, 8], [81, 2, 14, 3, 4]]


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel(str(tiny("gpt2")))


def test_a_block_output_is_its_hidden_states(model: Any) -> None:
    block = model.transformer.h[1]
    with model.trace(ROWS):
        bare, first = block.output[...].save(), block.output[0].save()
        row, last = block.output[0][1].save(), block.output[:, -1].save()
        with pytest.raises(BadArgument, match=r"output\[0\]\[1\]"):
            block.output[1]
        with pytest.raises(BadArgument, match=r"output\[0\]\[-1\]"):
            block.output[-1] = 0
        with pytest.raises(BadArgument, match=r"output\[0\]"):
            tuple(block.output)
    assert bare.shape == (2, 5, 64)
    assert torch.equal(first, bare)
    assert torch.equal(row, bare[1])
    assert torch.equal(last, bare[:, -1])


def test_the_model_output_is_its_logits(model: Any) -> None:
    with model.trace(ROWS):
        output = model.output
        assert output.logits is output
        logits = model.output.logits.save()
        saved = output.save()
        with pytest.raises(UnknownPoint, match="past_key_values"):
            _ = model.output.past_key_values
    assert torch.equal(saved, logits)
    assert torch.equal(saved.logits, logits)


def test_attention_dropout_stands_for_the_pattern(model: Any) -> None:
    attn = model.transformer.h[0].attn
    with model.trace(ROWS):
        values = [attn.attn_dropout.input.save(), attn.attn_dropout.output.save(), attn.pattern.save()]
    assert values[0].shape == (2, 4, 5, 5)
    assert torch.allclose(values[0].sum(-1), torch.ones(2, 4, 5))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_a_child_called_output_comes_before_the_point() -> None:
    bert = LanguageModel(str(tiny("bert")))
    layer = bert.bert.encoder.layer[0]
    with bert.trace(ROWS):
        child = layer.output.dense.output.save()
        whole = layer.points["output"].save()
        attention = layer.attention.points["output"][0].save()
    assert child.shape == whole.shape == attention.shape == (2, 5, 64)
    assert not torch.equal(child, whole)


def test_calls_are_numbered(model: Any) -> None:
    block = model.transformer.h[0]
    with model.trace(ROWS):
        same = block.calls[0].output[...].save()
        plain = block.output[...].save()
        with pytest.raises(UnknownPoint, match="called 1 times"):
            _ = block.calls[1].output
    assert torch.equal(same, plain)


def test_shapes_are_known_while_recording(model: Any) -> None:
    with model.trace(ROWS):
        hidden = model.transformer.h[0].output[0]
        assert hidden.shape == torch.Size([2, 5, 64])
        assert (hidden.ndim, len(hidden), hidden.size(-1), hidden.numel()) == (3, 2, 64, 640)
        assert hidden.dtype == torch.float32
        assert isinstance(hidden, torch.Tensor)
        assert (hidden @ hidden.mT).shape == (2, 5, 5)
        assert hidden.double().mean(-1).dtype == torch.float64
        assert torch.cat([hidden, hidden], dim=1)[:, ::3].shape == (2, 4, 64)
        assert [row.shape for row in hidden] == [(5, 64)] * 2
        norms = [hidden[:, position].norm() for position in range(hidden.shape[1])]
        total = torch.stack(norms).save()
        with pytest.raises(ShapeUnknown):
            _ = hidden[hidden > 0].shape
        with pytest.raises(ShapeMismatch):
            _ = hidden @ hidden
    assert total.shape == (5,)


@pytest.mark.parametrize(
    "use",
    [
        bool,
        int,
        float,
        list,
        "{:.2f}".format,
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: 3 in x,
        math.sqrt,
    ],
    ids=["bool", "int", "float", "list", "format", "numpy", "tolist", "in", "math"],
)
def test_python_cannot_have_a_value_that_does_not_exist(model: Any, use: Any) -> None:
    with model.trace(ROWS):
        value = model.output[0, -1, 0]
        with pytest.raises((ControlFlow, BadArgument)):
            use(value)
        kept = value.save()
    assert isinstance(kept.item(), float)


def test_branching_names_what_to_do_instead(model: Any) -> None:
    with model.trace(ROWS), pytest.raises(ControlFlow, match=r"torch\.where"):
        if model.output.max() > 0:
            pass


def test_an_unsaved_value_says_so(model: Any) -> None:
    with model.trace(ROWS):
        lost = model.output[0]
        model.output.save()
    uses = (lambda: lost + 1, lambda: lost.save(), lambda: torch.softmax(lost, -1), lambda: lost[0])
    for use in (*uses, lambda: str(lost), lambda: f"{lost}", lambda: print(lost)):
        with pytest.raises(NotSaved, match=r"\.save\(\)"):
            use()
    assert "add .save()" in repr(lost)  # a debugger may look at it


def test_printing_a_deferred_value_shows_what_is_known(model: Any) -> None:
    with model.trace(ROWS):
        hidden = model.transformer.h[0].output[0]
        for shown in (repr(hidden), str(hidden), f"{hidden}"):
            assert "[2, 5, 64]" in shown
            assert "transformer.h.0" in shown


def test_unknown_names_are_helped(model: Any) -> None:
    with model.trace(ROWS):
        with pytest.raises(UnknownModule, match="attn"):
            _ = model.transformer.h[0].atn
        with pytest.raises(UnknownModule, match="3 modules"):
            _ = model.transformer.h[7]
        with pytest.raises(UnknownOp):
            _ = model.output.nonsense()
        with pytest.raises(UnknownPoint):
            model.transformer.h[0].attn.nothing = 1
    assert not hasattr(model.transformer, "nothing")


def test_operations_by_all_their_names_agree(model: Any) -> None:
    with model.trace(ROWS):
        logits = model.output
        ways = [
            logits.log_softmax(-1),
            torch.log_softmax(logits, -1),
            torch.nn.functional.log_softmax(logits, dim=-1),
        ]
        ways.append(torch.log(logits.softmax(-1)))
        ways.append(logits.softmax(-1).log())
        picked = [logits.select(-1, 3), torch.select(logits, 2, 3), logits[..., 3]]
        for value in (*ways, *picked):
            value.save()
        reflected = [(2 - logits).save(), (2 / logits.abs()).save(), (torch.ones(400) * logits).save()]
    assert all(torch.allclose(way, ways[0], atol=1e-5) for way in ways)
    assert all(torch.equal(one, picked[0]) for one in picked)
    assert all(value.shape == (2, 5, 400) for value in reflected)


def test_values_outside_a_block_are_refused(model: Any) -> None:
    with pytest.raises(DeferredError, match=r"model\.trace"):
        _ = model.transformer.h[0].output


def test_a_handle_of_a_module_that_is_gone_says_so(model: Any) -> None:
    gone = Module(model, "transformer.h.0.gone")
    with pytest.raises(UnknownModule, match="gone"), model.trace([5, 9, 33]):
        _ = gone.output
