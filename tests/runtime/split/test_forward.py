"""A split model's forward gives the whole model's numbers, whatever its architecture."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from interpose.errors import ConfigError, InternalError
from interpose.runtime.blocklists import main_list
from interpose.runtime.hooks import hooked
from interpose.runtime.loading import wrap
from interpose.runtime.split import placeholders
from interpose.runtime.split.route import Visit
from interpose.runtime.split.trial import tried
from models import ARCHITECTURES, BEYOND
from splitting import assert_same, fed, split, whole
from torch import nn


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *BEYOND])
@torch.no_grad()
def test_bitwise_equal_with_every_hidden_state(arch: str) -> None:
    model, inputs = whole(arch), fed(arch)
    expected, all_states = model(**inputs), model(**inputs, output_hidden_states=True)
    with split(model, 2) as parts:
        for _ in range(2):
            assert_same(expected, parts.home(**inputs))
            assert_same(all_states, parts.home(**inputs, output_hidden_states=True))


@pytest.mark.parametrize("arch", ["gpt2", "gemma3", "mixtral", "mamba"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_half_precision_too(arch: str, dtype: str) -> None:
    model = whole(arch, dtype=dtype)
    inputs = fed(arch)
    with split(model, 3) as parts:
        parts.home(**inputs)
        found = parts.home(**inputs)
        if arch != "mamba":  # which goes on in float32
            assert found.logits.dtype == getattr(torch, dtype)
        assert_same(model(**inputs), found)


@torch.no_grad()
def test_three_shards_are_visited_once_each_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = whole("gemma3"), fed("gemma3")
    with split(model, 3) as parts:
        assert_same(model(**inputs), parts.home(**inputs))
        journeys: list[list[Visit]] = []
        forward = parts.route.forward

        def noted(number: int, hidden: Any, visits: Any, mail: Any) -> Any:
            journeys.append([*visits])
            return forward(number, hidden, visits, mail)

        monkeypatch.setattr(parts.route, "forward", noted)
        parts.home(**inputs, use_cache=False)
        parts.home(**inputs, output_hidden_states=True)
    assert [[visit.site for visit in visits] for visits in journeys] == [[1, 2, 3]] * 2
    masks = [visit.calls[0].kwargs["attention_mask"] for visit in journeys[0]]
    assert masks[0] is masks[2] and not torch.equal(masks[0], masks[1])


@torch.no_grad()
def test_several_forwards_are_in_flight() -> None:
    model = whole("llama")
    inputs = [fed("llama", seed) for seed in range(8)]
    with split(model, 3) as parts, ThreadPoolExecutor(4) as threads:
        parts.home(**inputs[0])

        def run(kwargs: dict[str, Any]) -> Any:
            with torch.no_grad():
                return parts.home(**kwargs)

        for kwargs, found in zip(inputs, threads.map(run, inputs), strict=True):
            assert_same(model(**kwargs), found)


@torch.no_grad()
def test_an_error_in_a_block_is_raised_at_home_and_nothing_stays() -> None:
    model, inputs = whole("gpt2"), fed("gpt2")
    expected = model(**inputs)
    with split(model, 2) as parts:
        parts.home(**inputs)
        block = parts.parts[1].get_submodule("transformer.h.2.mlp")
        handle = block.register_forward_pre_hook(_fails)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(ZeroDivisionError):
                parts.home(**inputs)
        handle.remove()
        assert_same(expected, parts.home(**inputs))
        gc.collect()
        for site, stop in parts.route._stops.items():
            parts.route._threads[site].run(lambda: None)
            assert not stop._entries and not stop.station._kept  # type: ignore[attr-defined]


def _fails(module: nn.Module, args: Any) -> None:
    raise ZeroDivisionError


class Toy(nn.Module):
    """Blocks of one's own, called as a subclass pleases."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Plus() for _ in range(4)])

    def forward(self, hidden: torch.Tensor) -> Any:
        raise NotImplementedError


class Plus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, hidden: torch.Tensor, beside: Any = None) -> torch.Tensor:
        return hidden * self.shift + (0 if beside is None else beside)


class Twice(Toy):
    """The list comes twice in a forward."""

    def forward(self, hidden: torch.Tensor) -> Any:
        for block in [*self.layers, *self.layers]:
            hidden = block(hidden)
        return {"hidden": hidden}


class Beside(Toy):
    """What one block made is an argument of the others; and something happens in between."""

    def forward(self, hidden: torch.Tensor) -> Any:
        first = self.layers[0](hidden=hidden)
        second = self.layers[1](first, beside=first)
        second += 1
        return {"hidden": self.layers[3](self.layers[2](second), first), "list": [first, second]}


@pytest.mark.parametrize("kind", [Twice, Beside])
@torch.no_grad()
def test_lists_that_are_called_in_other_ways(kind: type[Toy]) -> None:
    model, hidden = kind().eval(), torch.randn(2, 3)
    with split(model, 2) as parts:
        for _ in range(2):
            assert_same(model(hidden), parts.home(hidden))


class Odd(Toy):
    def forward(self, hidden: torch.Tensor) -> Any:
        return self.layers[0](hidden, object())


class Reaches(Toy):
    def forward(self, hidden: torch.Tensor) -> Any:
        return self.layers[0](hidden) + self.layers[1].shift


class Passes(Toy):
    """What a block returns beside its hidden states goes on to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pair() for _ in range(4)])

    def forward(self, hidden: torch.Tensor) -> Any:
        beside = None
        for block in self.layers:
            hidden, beside = block(hidden, beside)
        return {"hidden": hidden}


class Pair(Plus):
    def forward(self, hidden: torch.Tensor, beside: Any = None) -> Any:
        result = super().forward(hidden, beside)
        return result, result.sin()


class Grows(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 3)])

    def forward(self, hidden: torch.Tensor) -> Any:
        for block in self.layers:
            hidden = block(hidden)
        return hidden


@pytest.mark.parametrize(
    "kind, why",
    [
        (Odd, r"layers.0 is given argument 1, a object"),
        (Reaches, "has no attribute 'shift'"),
        (Passes, r"layers.1 is given argument 1, which layers.0 returned"),
        (Grows, r"layers.1 makes \(2, 5\) torch.float32 of \(2, 3\)"),
    ],
)
def test_what_can_not_be_split_says_so_at_load(kind: type[Toy], why: str) -> None:
    with (
        split(kind().eval(), 2) as parts,
        pytest.raises(ConfigError, match=f"{kind.__name__} can't be split.*{why}"),
    ):
        tried(parts.home, [{"hidden": torch.randn(2, 3)}])


def test_a_model_without_a_list_of_blocks() -> None:
    assert main_list(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("arch", ["llama", "bert", "bloom", "mamba"])
def test_what_can_be_split_passes_its_trial(arch: str) -> None:
    with split(whole(arch), 2) as parts:
        tried(parts.home, [fed(arch)])


@pytest.mark.parametrize("arch", ["bert", "bloom", "mixtral"])
@torch.no_grad()
def test_what_modules_within_blocks_return_is_not_left_out_in_silence(arch: str) -> None:
    option = {"output_router_logits": True} if arch == "mixtral" else {"output_attentions": True}
    with split(whole(arch), 2) as parts:
        parts.home(**fed(arch))
        with pytest.raises(InternalError):
            parts.home(**fed(arch), **option)


@torch.no_grad()
def test_a_placeholder_tells_its_shape_without_a_journey() -> None:
    class Never:
        def value(self, turn: int) -> torch.Tensor:
            raise AssertionError

    made = placeholders.Placeholder(torch.zeros(2, 3), torch.float16, Never(), 0)
    assert made.shape == (2, 3) and made.size(-1) == 3 and made.ndim == 2 and len(made) == 2
    assert made.dtype == torch.float16 and made.device.type == "cpu" and made.is_floating_point()
    with pytest.raises(AssertionError):
        made + 1


class Looking:
    attention = True

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        return value

    def astray(self, module: str) -> None: ...


@pytest.mark.parametrize("arch", ["gpt2", "gemma3", "falcon", "mixtral", "neox", "bert"])
@torch.no_grad()
def test_a_run_that_looks_into_attention_has_its_eager_form_on_every_shard(arch: str) -> None:
    model, inputs = wrap(whole(arch), arch).model, fed(arch)
    with split(model, 3) as parts:
        plain = parts.home(**inputs)
        assert_same(model(**inputs), plain)
        with hooked({}, {}, Looking()):
            expected = model(**inputs)
        with hooked({}, {}, Looking()):
            assert_same(expected, parts.home(**inputs))
        assert not torch.equal(expected.logits, plain.logits)
