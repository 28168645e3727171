"""Wrong programs on a module of one's own: class, line and advice of each; nothing stays hooked or changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpose import Model, errors
from test_errors_table import line_of
from torch import Tensor, nn

Program = Callable[[], Any]
TABLE: list[tuple[Program, type[errors.InterposeError], str]] = []


class Net(nn.Module):
    """Takes another branch for large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.strict = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        if self.strict and hidden.abs().max() > 100:
            raise ValueError("too large")
        result: Tensor = self.two(hidden) if x.sum() < 1e6 else hidden
        return result


def told(kind: type[errors.InterposeError], phrase: str) -> Callable[[Program], Program]:
    """Enter a program into the table: the line marked `# here` raises `kind`, whose message holds `phrase`."""

    def enter(program: Program) -> Program:
        TABLE.append((program, kind, phrase))
        return program

    return enter


def model(net: nn.Module | None = None) -> Any:
    return Model(net or Net().eval())


X = torch.ones(2, 4)


@told(errors.BadArgument, "torch.nn.Module")
def no_module() -> None:
    Model(lambda x: x)  # here


@told(errors.BadArgument, "compiled")
def a_compiled_module() -> None:
    Model(torch.compile(Net(), backend="eager"))  # here


@told(errors.BadArgument, "run a lazy module once")
def a_lazy_module() -> None:
    with model(nn.LazyLinear(3)).trace(X):  # here
        pass


@told(errors.ConfigError, "on no server")
def on_a_server() -> None:
    model().trace(X, remote=True)  # here


@told(errors.BadArgument, "fails on these inputs: RuntimeError: mat1")
def inputs_that_do_not_fit() -> None:
    with model().trace(torch.ones(2, 3)):  # here
        pass


@told(errors.BadArgument, "t.invoke(x)")
def no_inputs_yet() -> None:
    net = model()
    with net.trace():
        net.one.output.save()  # here


@told(errors.DeferredError, "inside a block")
def outside_a_block() -> None:
    model().one.output.save()  # here


@told(errors.UnknownModule, "did you mean two?")
def a_module_misspelt() -> None:
    net = model()
    with net.trace(X):
        net.twoo.output.save()  # here


@told(errors.UnknownPoint, "doesn't call it")
def a_module_that_is_not_called() -> None:
    net = model()
    with net.trace(X):
        net.unused.output.save()  # here


@told(errors.UnknownPoint, "holds no tensor")
def what_a_module_returns_that_is_no_tensor() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    net = model(Silent())
    with net.trace(X):
        net.output.save()  # here


@told(errors.BadArgument, "can't be copied")
def inputs_that_can_be_had_once() -> None:
    with model().trace(X for _ in range(2)):  # here
        pass


@told(errors.BadArgument, "still to come")
def inputs_that_are_still_to_come() -> None:
    net = model()
    with net.session():
        with net.trace(X):
            hidden = net.one.output
        with net.trace(hidden):  # here
            pass


@told(errors.WrongOrder, "exists only later")
def the_wrong_order() -> None:
    net = model()
    with net.trace(X):
        net.one.output[:] = net.two.output  # here


@told(errors.ShapeMismatch, "[2, 4]")
def another_shape() -> None:
    net = model()
    with net.trace(X):
        net.one.output = torch.zeros(3, 4)  # here


@told(errors.NotReached, "never came to two.output")
def a_branch_that_was_measured_and_not_taken() -> None:
    net = model()
    with net.trace(X):
        pass
    with net.trace(X * 1e6):
        net.two.output.save()  # here


@told(errors.OpFailed, "ValueError: too large")
def a_forward_that_fails_on_what_was_written() -> None:
    inner = Net().eval()
    inner.strict = True
    net = model(inner)
    with net.trace(X):
        net.one.output[:] = 1000.0
        net.output.save()


@told(errors.BadArgument, "these have 2 and 3")
def rows_that_do_not_agree() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return super().forward(x)

    net = model(Two().eval())
    with net.trace() as tracer, tracer.invoke(X, torch.ones(3, 4)):  # here
        pass


@told(errors.BadArgument, "differ only in")
def prompts_of_other_sizes() -> None:
    net = model(nn.ReLU())
    with net.trace() as tracer:
        with tracer.invoke(X):
            net.output.save()
        with tracer.invoke(torch.ones(2, 5)):  # here
            net.output.save()


@told(errors.BadArgument, "change with their neighbours")
def rows_that_influence_one_another() -> None:
    net = model(nn.BatchNorm1d(4).train())
    with net.trace() as tracer, tracer.invoke(torch.randn(3, 4)):  # here
        net.output.save()


@told(errors.BadArgument, "all prompts are seen")
def one_prompt_writes_what_is_everybodys() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale(torch.ones(1))

    net = model(Table())
    with net.trace() as tracer:
        with tracer.invoke(X):
            net.scale.output[:] = 0  # here
        with tracer.invoke(X):
            net.output.save()


@told(errors.BadArgument, "model.scan(x)")
def an_edit_of_what_was_never_run() -> None:
    model().edit()  # here


@told(errors.BadArgument, "runs on a LanguageModel")
def a_program_of_a_module() -> None:
    net = model()
    with net.trace(X) as tracer:
        net.one.output.save()
    assert "%0 = one.output" in str(tracer.graph)
    tracer.graph.run(net, X)  # here


@told(errors.BadArgument, "takes no tokens")
def the_mask_of_no_tokens() -> None:
    with model().trace(X) as tracer:
        _ = tracer.attention_mask  # here


@told(errors.BadArgument, "a trace has one forward")
def the_steps_of_no_generation() -> None:
    with model().trace(X) as tracer, tracer.iter[0]:  # here
        pass


@told(errors.DeferredError, "its own model")
def another_model_in_a_session() -> None:
    with model().session():
        model().trace(X)  # here


@pytest.mark.parametrize(("program", "kind", "phrase"), TABLE, ids=lambda item: getattr(item, "__name__", ""))
def test_wrong_programs(program: Program, kind: type[errors.InterposeError], phrase: str) -> None:
    with pytest.raises(errors.InterposeError) as caught:
        program()
    assert type(caught.value) is kind
    assert phrase in caught.value.message
    assert "# here" in line_of(caught.value, __file__) or program is a_forward_that_fails_on_what_was_written


@pytest.mark.parametrize("failing", ["recording", "measuring", "running"])
def test_nothing_stays_after_a_failure(failing: str) -> None:
    inner = Net().eval()
    inner.strict = failing == "running"
    net = model(inner)
    with pytest.raises(errors.InterposeError), net.trace(torch.ones(2, 3) if failing == "measuring" else X):
        net.one.output[:] = 1000.0
        net.one.output.sum().backward()
        net.output.save()
        if failing == "recording":
            _ = net.three
    assert all(param.requires_grad and param.grad is None for param in inner.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in inner.modules())
    inner.strict = False
    with net.trace(X):
        out = net.output.save()
    assert torch.equal(out, inner(X))


def test_threads_take_turns() -> None:
    inner = Net().eval()
    net = model(inner)
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        x = torch.full((2 + index % 3, 4), float(index))
        with net.trace(x):
            net.one.output[:] += index
            found[index] = net.output.save()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for index in range(8):
            x = torch.full((2 + index % 3, 4), float(index))
            assert torch.equal(found[index], inner.two(inner.one(x) + index))


def test_printing_before_and_after_it_has_run() -> None:
    net = model()
    assert "never called" not in repr(net)
    assert "once it has run" in repr(net)
    with net.scan(X):
        assert net.one.output.shape == (2, 4)
    assert "-> [2, 4]" in repr(net)
    assert "unused: Linear" in repr(net)
    assert "(never called)" in repr(net)
