"""Tensors, arrays and numbers from outside a block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from interpose import LanguageModel
from interpose.errors import BadArgument, ControlFlow, DeferredError
from interpose.tracing import array_face
from models import tiny
from torch import nn

ROWS = [[5, 9, 33], [81, 2, 14]]
RAMP = np.arange(64, dtype=np.float32)


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel(str(tiny("gpt2")))


VALUES: dict[str, Any] = {
    "tensor": torch.from_numpy(RAMP.copy()),
    "array": RAMP,
    "parameter": nn.Parameter(torch.from_numpy(RAMP.copy())),
    "result of autograd": nn.Parameter(torch.from_numpy(RAMP.copy())) * 1,
    "view": torch.from_numpy(np.repeat(RAMP, 2))[::2],
    "expanded": torch.from_numpy(RAMP.copy()).expand(3, 64),
    "double": torch.from_numpy(RAMP.astype(np.float64)),
    "number": 2.5,
    "array number": np.float32(2.5),
    "tensor number": torch.tensor(2.5),
    "reversed array": RAMP[::-1],
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_every_kind_are_taken(model: Any, kind: str) -> None:
    value = VALUES[kind]
    with model.trace(ROWS):
        hidden = model.transformer.h[0].output[0]
        before = hidden[...].save()
        hidden[:] = hidden * 0 + value
        after = hidden.save()
        left = (value + before * 0).save() if not isinstance(value, np.ndarray) else after
    wanted = torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value).detach()
    assert torch.equal(after, torch.zeros(2, 3, 64) + wanted.float())
    assert torch.equal(left.float(), after)
    assert not after.requires_grad


def test_an_index_from_outside(model: Any) -> None:
    with model.trace(ROWS):
        logits = model.output
        ways = [logits[:, [0, 2]], logits[:, torch.tensor([0, 2])], logits[:, np.array([0, 2])]]
        ways += [logits[:, torch.tensor([True, False, True])], logits[:, 0:3:2], logits[:, range(0, 3, 2)]]
        kept = [way.save() for way in ways]
        one = logits[np.int64(1), torch.tensor(2)].save()
        whole = logits.save()
    assert all(torch.equal(way, whole[:, [0, 2]]) for way in kept)
    assert torch.equal(one, whole[1, 2])


def test_an_array_is_taken_as_it_is_at_each_line(model: Any) -> None:
    steps = np.ones(64, dtype=np.float32)
    with model.trace(ROWS):
        hidden = model.transformer.h[0].output[0]
        hidden[:] = 0
        hidden += steps
        steps[:] = 10
        hidden += steps
        hidden += steps
        last = hidden.save()
    assert (last == 21).all()


def test_a_tensor_changed_after_its_line_is_refused(model: Any) -> None:
    steps = torch.ones(64)
    with pytest.raises(BadArgument, match="changed"), model.trace(ROWS):
        model.transformer.h[0].output[0][:] = steps
        steps += 1
        model.output.save()


def test_a_real_tensor_takes_no_deferred_value(model: Any) -> None:
    table = torch.zeros(2, 3, 64)
    with model.trace(ROWS):
        hidden = model.transformer.h[0].output[0]
        with pytest.raises(BadArgument, match="real tensor"):
            table[0] = hidden[0]
        with pytest.raises(BadArgument, match="real tensor"):
            table.copy_(hidden)
    assert table.abs().max() == 0


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, b"x", 1j, np.array(["a"]), {1}], ids=lambda value: type(value).__name__
)
def test_what_is_no_value_is_refused_at_its_line(model: Any, value: Any) -> None:
    with model.trace(ROWS):
        hidden = model.transformer.h[0].output[0]
        with pytest.raises((BadArgument, DeferredError)):
            _ = hidden + value
        with pytest.raises((BadArgument, DeferredError)):
            hidden[0] = value


def test_a_value_of_another_block_says_what_to_do(model: Any) -> None:
    with model.trace(ROWS):
        lost = model.output
        model.output[...].save()
    with model.trace(ROWS), pytest.raises(DeferredError, match=r"\.save\(\)"):
        model.output[:] = lost


def test_without_torch_numpy_hands_its_operators_over(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interpose.tracing.torch_face.make", array_face.make)
    ones = np.ones(64, dtype="float32")
    with model.trace(ROWS):
        hidden = model.transformer.h[1].output[0]
        base = hidden.save()
        found = [
            each.save()
            for each in (
                RAMP * hidden,
                RAMP - hidden,
                np.float32(2) ** hidden,
                np.less(RAMP, hidden),
                np.exp(hidden),
                ones @ hidden[0].T,
            )
        ]
        assert hidden.device == "cpu"
        with pytest.raises(ControlFlow, match=r"write it with interpose\.torch"):
            np.spacing(hidden)
    plain = np.asarray(base)
    with model.trace(ROWS):
        mixed = (base[0, -1:] * model.transformer.h[1].output[0]).save()
    hand = [
        RAMP * plain,
        RAMP - plain,
        np.float32(2) ** plain,
        np.less(RAMP, plain),
        np.exp(plain),
        ones @ plain[0].T,
    ]
    for value, by_hand in zip(found, hand, strict=True):
        assert value.dtype == by_hand.dtype and np.allclose(value, by_hand, rtol=1e-5, atol=1e-5)
    assert np.allclose(mixed, plain[0, -1:] * plain, atol=1e-5)
