"""After the block a saved value is a tensor like any other."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from interpose import LanguageModel
from models import tiny
from torch import nn

ROWS = [[5, 9, 33], [81, 2, 14]]


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel(str(tiny("gpt2")))


@pytest.fixture
def saved(model: Any) -> Any:
    with model.trace(ROWS):
        return model.transformer.h[0].output[0].save()


def test_it_is_a_tensor(saved: Any) -> None:
    assert isinstance(saved, torch.Tensor)
    assert saved.shape == (2, 3, 64)
    assert saved.device.type == "cpu"
    assert not saved.requires_grad
    assert saved.is_leaf
    assert type(saved + 1) is torch.Tensor
    assert type(saved[0]) is torch.Tensor
    assert float(saved[0, 0, 0]) == saved.value[0, 0, 0].item() == saved.tolist()[0][0][0]
    assert len(list(saved)) == 2


def test_it_converts(saved: Any) -> None:
    plain = saved.value
    assert np.array_equal(np.asarray(saved), plain.numpy())
    assert np.array_equal(saved.numpy(), plain.numpy())
    assert torch.equal(torch.stack([saved, saved])[1], plain)
    assert torch.equal(torch.tensor(saved.tolist()), plain)
    with pytest.warns(UserWarning, match="copy construct"):
        assert torch.equal(torch.tensor(saved), plain)
    assert torch.equal(torch.as_tensor(saved), plain)
    assert torch.equal(saved.to(torch.float64).float(), plain)
    assert torch.equal(saved.detach().clone().cpu().contiguous(), plain)


def test_it_prints_as_a_tensor(saved: Any) -> None:
    assert repr(saved) == repr(saved.value)
    assert f"{saved.sum():.3f}" == f"{saved.value.sum():.3f}"
    assert f"{saved}" == f"{saved.value}"
    assert str(saved[0, 0, 0]) == str(saved.value[0, 0, 0])


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_copies_are_plain_tensors(saved: Any, how: str) -> None:
    if how == "pickle":
        found = pickle.loads(pickle.dumps(saved))  # noqa: S301
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save({"x": saved}, buffer)
        buffer.seek(0)
        found = torch.load(buffer, weights_only=True)["x"]
    else:
        found = copy.deepcopy(saved)
    assert type(found) is torch.Tensor
    assert torch.equal(found, saved)
    assert found.data_ptr() != saved.data_ptr()


def test_it_is_written(saved: Any) -> None:
    before = saved.clone()
    saved += 1
    saved[0] = 0
    saved[:, 1].mul_(2)
    saved[saved > 5] = 5
    assert saved[0].abs().max() == 0
    assert torch.equal(saved[1, 0], (before[1, 0] + 1).clamp(max=5))


def test_it_is_trained_on(saved: Any) -> None:
    probe = nn.Linear(64, 1)
    probe(saved).pow(2).mean().backward()
    assert probe.weight.grad is not None
    assert probe.weight.grad.abs().max() > 0
    vector = nn.Parameter(saved[0, 0].clone())
    whole = nn.Parameter(saved)
    assert isinstance(whole, nn.Parameter)
    optimizer = torch.optim.SGD([vector, whole], lr=0.1)
    before = whole.detach().clone()
    (vector.sum() + whole.pow(2).sum()).backward()
    optimizer.step()
    assert torch.allclose(whole, before * 0.8)
    leaf = saved.clone().requires_grad_()
    leaf.exp().sum().backward()
    assert torch.allclose(leaf.grad, leaf.exp())
    saved.requires_grad_()
    (saved * 2).sum().backward()
    assert torch.equal(saved.grad, torch.full_like(saved.grad, 2))


def test_it_indexes_and_is_a_key(model: Any) -> None:
    with model.trace(ROWS):
        top = model.output[:, -1].argmax(-1).save()
        number = model.output[0, -1].argmax().save()
    table = torch.arange(400)
    assert torch.equal(table[top], top)
    assert list(range(400))[number] == int(number)
    assert {top: 1}[top] == 1
    assert model.tokenizer.decode(number)


def test_several_values_are_saved_together(model: Any) -> None:
    with model.trace(ROWS):
        best = model.output[:, -1].topk(3).save()
        halves = model.output.chunk(2, -1).save()
    assert best.values.shape == best.indices.shape == (2, 3)
    assert [half.shape for half in halves] == [(2, 3, 200)] * 2
    assert torch.equal(torch.cat(list(halves), -1)[:, -1].topk(3).indices, best.indices)


def test_a_name_saved_twice_keeps_each_line(model: Any) -> None:
    with model.trace(ROWS):
        hidden = model.transformer.h[0].output[0]
        first = hidden.save()
        again = hidden.save()
        hidden[:] = 0
        last = hidden.save()
    assert first is hidden
    assert torch.equal(first, again)
    assert first.abs().max() > 0
    assert last.abs().max() == 0


def test_a_saved_value_goes_into_the_next_block(model: Any, saved: Any) -> None:
    with model.trace(ROWS):
        model.transformer.h[0].output = saved * 0 + saved
        again = model.transformer.h[0].output.save()
    assert torch.equal(again, saved)
