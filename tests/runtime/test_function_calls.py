"""Which calls of functions are shown to a run, in what order, and that nothing of it stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.errors import InterposeError, NotReached, UnknownPoint
from interpose.runtime.functions import called, steady, writes
from interpose.runtime.hooks import hooked
from models import tiny
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack as modes

ROW = [7, 21, 90, 33]


class Inner(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.exp() + 1


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, value: Tensor) -> Tensor:
        value = (2 * value).view(-1, 2)
        value = self.inner(value) @ value.T
        value += 1
        return torch.cat([value, functional.softmax(value, -1)])


class Watch:
    attention = False

    def __init__(self, change: Any = None) -> None:
        self.seen: list[tuple[str, str]] = []
        self.strayed: list[str] = []
        self.change = change or (lambda event, value: value)

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        torch.ones(2).exp()  # what a run computes itself is nobody's call
        self.seen.append((module, event))
        return self.change(event, value)

    def astray(self, module: str) -> None:
        self.strayed.append(module)


def watch(model: nn.Module, expected: Any = None, change: Any = None, **modules: nn.Module) -> tuple[Watch, Tensor]:
    visitor = Watch(change)
    names = {module: name for name, module in model.named_modules()}
    with hooked({"": model, **modules}, names, visitor, {"": expected}):
        out = model(torch.arange(4.0))
    return visitor, out


def events(*calls: str) -> list[str]:
    return [f"{call}.{side}" for call in calls for side in ("inputs", "output")]


OWN = ("mul_0", "matmul_0", "add_0", "softmax_0", "cat_0")


@pytest.mark.parametrize("touched", [False, True])
def test_a_modules_own_calls_are_shown_and_no_others(touched: bool) -> None:
    model = Outer()
    modules = {"inner": model.inner} if touched else {}
    seen = [event for module, event in watch(model, **modules)[0].seen if module == ""]
    assert seen == ["enter", *events(*OWN), "exit"]
    assert not modes() and not model._forward_hooks and not model.inner._forward_pre_hooks


def test_what_is_put_in_place_of_a_value_is_gone_on_with() -> None:
    model = Outer()

    def change(event: str, value: Any) -> Any:
        return value * 0 + 5 if event == "add_0.output" else value

    _, out = watch(model, change=change)
    assert torch.equal(out[:2], torch.full((2, 2), 5.0))
    assert torch.equal(out[2:], torch.full((2, 2), 0.5))


def test_a_forward_that_calls_other_functions_is_astray() -> None:
    model = Outer()
    visitor, _ = watch(model, expected=("mul_0", "softmax_0", "matmul_0", "cat_0"))
    assert [event for _, event in visitor.seen] == ["enter", *events("mul_0"), "exit"]
    assert visitor.strayed == [""]
    visitor, _ = watch(model, expected=("mul_0", "matmul_0"))
    assert visitor.strayed == []  # the others varied, and were never offered
    visitor, _ = watch(model, expected=(*OWN, "cat_1"))
    assert visitor.strayed == [""]


def test_nothing_stays_after_a_failure() -> None:
    model = Outer()

    def fail(event: str, value: Any) -> Any:
        if event == "softmax_0.inputs":
            raise ValueError("stop")
        return value

    with pytest.raises(ValueError, match="stop"):
        watch(model, change=fail)
    assert not modes() and not model._forward_hooks and not model.inner._forward_pre_hooks


def test_calls_that_vary_between_runs_are_not_offered() -> None:
    assert steady([["mul_0", "exp_0"], ["mul_0", "exp_0"]]) == ("mul_0", "exp_0")
    assert steady([["mul_0", "exp_0"], ["mul_0", "add_0", "exp_0"]]) == ("mul_0", "exp_0")
    assert steady([["mul_0", "exp_0"], ["mul_0", "mul_1", "exp_0"]]) == ("exp_0",)
    assert steady([["mul_0", "exp_0"], ["exp_0", "mul_0"]]) == ()
    assert steady([["mul_0"], []]) == ()


def test_functions_go_by_one_name() -> None:
    spelled = {
        "softmax": [functional.softmax, torch.softmax, Tensor.softmax],
        "add": [Tensor.add, Tensor.add_, Tensor.__iadd__],
        "div": [Tensor.div, Tensor.__rdiv__, torch.true_divide],
        "sub": [Tensor.__rsub__, torch.sub],
        "masked_fill": [Tensor.masked_fill, Tensor.masked_fill_],
    }
    for name, functions in spelled.items():
        for function in functions:
            assert called(function) == name, function
    assert writes(Tensor.add_) and writes(Tensor.__iadd__)
    assert not writes(Tensor.add) and not writes(Tensor.__invert__)
    for moved in (Tensor.view, Tensor.transpose, Tensor.float, Tensor.__getitem__, Tensor.shape.__get__):
        assert called(moved) is None


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(str(tiny("llama")))


def test_a_model_that_goes_another_way_fails_its_job_alone(model: LanguageModel) -> None:
    loaded = model._access.local.loaded
    norm = loaded.modules["model.layers.1.input_layernorm"]
    stock = norm.forward
    norm.forward = lambda hidden: stock(hidden * torch.rsqrt(torch.ones(1)))
    try:
        with pytest.raises(NotReached, match=r"other functions|never"), model.trace(ROW):
            model.model.layers[1].input_layernorm.functions.mul[1].output.save()
        with model.trace(ROW):
            fine = model.logits.save()
    finally:
        del norm.forward
    assert torch.isfinite(fine).all() and not modes()


def test_they_are_printed_as_they_are_called(model: LanguageModel) -> None:
    text = repr(model.model.layers[0].mlp.functions)
    assert text == (
        "model.layers.0.mlp (LlamaMLP) calls\n  mul_0  ([batch, seq, 112], [batch, seq, 112]) -> [batch, seq, 112]"
    )
    assert repr(model.model.layers[0].mlp.source) == text
    assert [repr(call) for call in model.model.layers[0].mlp.functions] == ["<mul_0 in model.layers.0.mlp>"]
    assert "mul_0" not in repr(model)
    assert "no function" in repr(model.lm_head.functions)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda m: m.model.layers[0].mlp.functions.softmax, "calls no softmax_0; it calls mul_0"),
        (lambda m: m.model.layers[0].mlp.functions.mul[1], r"calls mul 1 times; there is no \[1\]"),
        (lambda m: m.model.layers[0].mlp.source.mull_0.output, "did you mean mul_0"),
        (lambda m: m.model.layers[0].mlp.functions.mul[0].result, "output, input and inputs"),
        (lambda m: m.lm_head.functions.linear[0].output, "no function it calls is a point"),
    ],
)
def test_names_that_are_none_say_which_there_are(model: LanguageModel, wrong: Any, says: str) -> None:
    with pytest.raises(UnknownPoint, match=says), model.trace(ROW):
        wrong(model)


def test_two_spellings_are_one_point(model: LanguageModel) -> None:
    mlp = model.model.layers[0].mlp
    with model.trace(ROW):
        mlp.source.mul_0.output[:] = 0
        assert isinstance(mlp.functions.mul, list) or len(mlp.functions.mul) == 1
        out = mlp.functions.mul[-1].output.save()
    assert not out.any()


def test_errors_are_of_our_tree(model: LanguageModel) -> None:
    with pytest.raises(InterposeError), model.trace(ROW):
        model.model.layers[0].mlp.functions.mul[0].output = torch.zeros(1)
