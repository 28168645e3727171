"""Any torch module: what is read and replaced in it equals the same by hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpose import Model
from interpose.errors import UnknownPoint
from models import liven, tiny
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification
from twins import alive, close, same


class Convolutional(nn.Module):
    """In-place activations, normalised by running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.act(self.bn(self.conv(image)))
        pooled: Tensor = self.head(functional.gelu(hidden).mean((2, 3)) * scale)
        return pooled


class Recurrent(nn.Module):
    """Nested inputs and outputs, rows second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(6, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, given: dict[str, Tensor]) -> dict[str, Any]:
        sequence, state = self.inner(given["values"] * given["weight"])
        return {"all": self.head(sequence), "last": state}


class Residual(nn.Module):
    """A list of blocks, and one module called several times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3)])
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(self.norm(x))
        return x


def encoder() -> nn.Module:
    """Torch's own, whose fused form shows nothing of its inside."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


def vision() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
            image_size=12,
            patch_size=4,
            num_labels=5,
        )
    )


def randomly(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


Given = tuple[tuple[Any, ...], dict[str, Any]]
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Given]]] = {
    "convolutional": (Convolutional, lambda: ((randomly(2, 3, 6, 7),), {"scale": 1.5})),
    "recurrent": (Recurrent, lambda: (({"values": randomly(5, 2, 6), "weight": torch.tensor(1.5)},), {})),
    "residual": (Residual, lambda: ((randomly(4, 12),), {})),
    "encoder": (encoder, lambda: ((randomly(2, 5, 16),), {})),
    "vision": (vision, lambda: ((), {"pixel_values": randomly(2, 3, 12, 12)})),
}


def make(name: str) -> tuple[nn.Module, Given]:
    build, inputs = NETS[name]
    torch.manual_seed(0)
    net = build()
    liven(net)
    return net.eval(), inputs()


def first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value


def put(value: Any, new: Tensor) -> Any:
    """The nest with its first tensor replaced."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, tuple):
        return (put(value[0], new), *value[1:])
    key = next(iter(value))
    value[key] = put(value[key], new)
    return value


@torch.no_grad()
def by_hand(
    net: nn.Module, given: Given, path: str | None = None, change: Callable[[Tensor], Tensor] | None = None
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Each module's first output tensor in each of its calls, and the net's; changed in one module's first call."""
    seen: dict[str, list[Tensor]] = {}
    handles = []

    def watch(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if name == path and change is not None and name not in seen:
                output = put(output, change(first(output)))
            seen.setdefault(name, []).append(first(output).clone())
            return output

        return hook

    for name, module in net.named_modules():
        if name:
            handles.append(module.register_forward_hook(watch(name)))
    try:
        args, kwargs = given
        output = first(net(*args, **kwargs)).clone()
    finally:
        for handle in handles:
            handle.remove()
    return seen, output


def handle(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


@pytest.mark.parametrize("name", NETS)
def test_every_module_is_read_as_hooks_see_it(name: str) -> None:
    net, given = make(name)
    seen, output = by_hand(net, given)
    args, kwargs = given
    model: Any = Model(net)
    with model.trace(*args, **kwargs):
        read = {
            (path, call): first_of(handle(model, path).calls[call]).save()
            for path, calls in seen.items()
            for call in range(len(calls))
        }
        shapes = {where: tuple(value.shape) for where, value in read.items()}
        whole = first_of(model).save()
    assert len(read) > 1
    for (path, call), value in read.items():
        same(value, seen[path][call])
        assert shapes[path, call] == tuple(value.shape)
    same(whole, output)


def first_of(module: Any) -> Any:
    """The first tensor a module gives, deferred."""
    value = module.output
    while not isinstance(value, Tensor):
        value = (
            value[0] if not hasattr(value, "keys") or value.keys() == range(len(value)) else value[value.keys()[0]]
        )
    return value


@pytest.mark.parametrize("name", NETS)
def test_every_module_is_replaced_as_by_a_hook(name: str) -> None:
    net, given = make(name)
    args, kwargs = given
    seen, plain = by_hand(net, given)
    model: Any = Model(net)

    def change(value: Tensor) -> Tensor:
        return value * 0.5 + 0.1

    moved = 0
    for path in seen:
        _, expected = by_hand(net, given, path, change)
        with model.trace(*args, **kwargs):
            target = first_of(handle(model, path).calls[0])
            target[:] = change(target)
            found = first_of(model).save()
        same(found, expected)
        moved += not torch.equal(expected, plain)
    assert moved >= len(seen) - 1


def test_functions_inside_a_forward() -> None:
    net, (args, kwargs) = make("convolutional")
    model: Any = Model(net)
    with model.trace(*args, **kwargs):
        gelu = model.functions.gelu[0].output.save()
        model.functions.mean[0].output[:, 2] = 1.0
        out = model.output.save()
    with torch.no_grad():
        hidden = functional.gelu(net.act(net.bn(net.conv(args[0]))))
        pooled = hidden.mean((2, 3))
        pooled[:, 2] = 1.0
        same(gelu, hidden)
        same(out, net.head(pooled * 1.5))
        assert not torch.equal(out, net(*args, **kwargs))


def test_gradients_leave_the_modules_own_alone() -> None:
    net, (args, kwargs) = make("convolutional")
    model: Any = Model(net)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    image = args[0].clone().requires_grad_()
    with model.trace(image, **kwargs):
        hidden = model.conv.output
        loss = model.output.pow(2).sum()
        with loss.backward():
            gradient = hidden.grad.save()
            hidden.grad[:, 0] = 0
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert image.grad is None
    assert all(param.requires_grad for param in net.parameters())
    assert net.conv.weight.grad is None
    cut = net.conv(image).detach().requires_grad_()
    act = functional.relu(net.bn(cut))
    net.head(functional.gelu(act).mean((2, 3)) * 1.5).pow(2).sum().backward()
    assert cut.grad is not None
    close(gradient, cut.grad, 1e-4)


def test_retained_gradients() -> None:
    net, (args, _) = make("residual")
    model: Any = Model(net)
    with model.trace(*args):
        hidden = model.blocks[1].output.save()
        hidden.retain_grad()
        model.output.sum().backward()
    seen: list[Tensor] = []
    handle_ = net.blocks[1].register_forward_hook(lambda module, given, output: seen.append(output))
    output = net(*args)
    (expected,) = torch.autograd.grad(output.sum(), seen[-1])
    handle_.remove()
    close(hidden.grad, expected, 1e-4)


# -- the owner's module stays as it is ----------------------------------------------------------------------------


def test_training_mode_counts_once_and_draws_the_same() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)).train()
    twin = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)).train()
    twin.load_state_dict(net.state_dict())
    x = randomly(8, 4)
    model: Any = Model(net)
    torch.manual_seed(5)
    with model.trace(x):
        found = model.output.save()
    torch.manual_seed(5)
    same(found, twin(x).detach())
    assert net.training
    for name, value in twin.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert int(net[1].num_batches_tracked) == 1


def test_inputs_are_changed_only_as_by_the_module_itself() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1).mul(2)

    x = torch.zeros(3)
    model: Any = Model(Adds())
    with model.trace(x):
        before = model.input.save()
        out = model.output.save()
    assert x.tolist() == [1.0] * 3, "once, by the forward that was asked for"
    assert before.tolist() == [0.0] * 3
    assert out.tolist() == [2.0] * 3


def test_inputs_that_remember_are_used_once() -> None:
    class Cache:
        def __init__(self) -> None:
            self.items: list[Tensor] = []

    class Remembers(nn.Module):
        def forward(self, x: Tensor, cache: Cache, also: list[Tensor], draws: torch.Generator) -> Tensor:
            cache.items.append(x * 1)
            also.append(x)
            return len(cache.items) + torch.rand(2, generator=draws)

    cache, also, draws = Cache(), [torch.ones(1)], torch.Generator().manual_seed(3)
    cache.items.append(torch.ones(1, requires_grad=True) * 2)
    model: Any = Model(Remembers())
    with model.trace(torch.zeros(1), cache, also, draws):
        out = model.output.save()
    assert (len(cache.items), len(also)) == (2, 2)
    same(out, 2 + torch.rand(2, generator=torch.Generator().manual_seed(3)))


def test_what_a_module_keeps_and_writes_over_is_saved_as_it_was() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.state = torch.zeros(2) if self.state is None else self.state
            return self.state.add_(x)

    model: Any = Model(Counts())
    seen = []
    for _ in range(3):
        with model.trace(torch.ones(2)):
            seen.append(model.output.save())
    assert [value.tolist() for value in seen] == [[1, 1], [2, 2], [3, 3]]


def test_rows_of_shapes_of_their_own_are_no_points() -> None:
    net, (args, _) = make("encoder")
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model: Any = Model(net)
    with pytest.warns(UserWarning, match="nested tensors"), model.trace(*args, src_key_padding_mask=mask):
        out = model.output.save()
        with pytest.raises(UnknownPoint, match="holds no tensor"):
            model.layers[0].output.save()
    with torch.no_grad():
        close(out, net(*args, src_key_padding_mask=mask))


def test_a_models_cache_goes_on_by_one_step() -> None:
    model: Any = Model(AutoModelForCausalLM.from_pretrained(tiny("gpt2")).eval())
    ids = torch.tensor([[5, 9, 33, 7]])
    cache = model._model(ids, use_cache=True).past_key_values
    with model.trace(input_ids=ids[:, :1], past_key_values=cache):
        logits = model.output.logits.save()
        named = model.output["logits"].save()
    assert cache.get_seq_length() == 5
    with torch.no_grad():
        close(logits, model._model(torch.tensor([[5, 9, 33, 7, 5]])).logits[:, -1:])
    same(named, logits)


def test_a_block_under_autocast() -> None:
    net, (args, _) = make("residual")
    model: Any = Model(net)
    with model.trace(*args):
        plain = model.blocks[0].output.save()
    with torch.autocast("cpu", torch.bfloat16), model.trace(*args):
        assert model.blocks[0].output.dtype == torch.bfloat16
        cast = model.blocks[0].output.save()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        same(cast, net.blocks[0](net.norm(args[0])))
    assert (plain.dtype, cast.dtype) == (torch.float32, torch.bfloat16)


def test_what_changes_in_the_module_is_seen() -> None:
    net, (args, _) = make("residual")
    model: Any = Model(net)
    with model.trace(*args):
        before = model.output.save()
    with torch.no_grad():
        net.norm.weight.mul_(2)
    net.blocks[2] = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12))
    with model.trace(*args):
        wide = model.blocks[2][0].output.save()
        after = model.output.save()
    assert wide.shape == (4, 20)
    with torch.no_grad():
        same(after, net(*args))
    assert not torch.equal(before, after)


def test_a_saved_value_shares_memory_with_nobody() -> None:
    net, (args, _) = make("residual")
    model: Any = Model(net)
    with model.trace(*args):
        given = model.input.save()
        weight = model.norm.weight.save()
    given.zero_()
    weight.zero_()
    alive(args[0], net.norm.weight.detach())


# -- several prompts, several forwards ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convolutional", "residual", "encoder", "vision"])
def test_prompts_that_share_a_forward_equal_each_alone(name: str) -> None:
    net, (args, kwargs) = make(name)
    key = next(iter(kwargs)) if not args else None
    whole = kwargs[key] if key else args[0]
    rest = {} if key else kwargs

    def given(value: Tensor) -> Given:
        return ((), {key: value}) if key else ((value,), rest)

    model: Any = Model(net)
    parts = [whole[:1], whole, whole[-1:] * 0.3]
    path = next(path for path, module in net.named_modules() if isinstance(module, nn.LayerNorm | nn.Conv2d))
    saved = []
    with model.trace() as tracer:
        for part in parts:
            args_, kwargs_ = given(part)
            with tracer.invoke(*args_, **kwargs_):
                saved.append((handle(model, path).calls[0].output.save(), first_of(model).save()))
        with tracer.invoke():
            everything = first_of(model).save()
    for part, (inner, out) in zip(parts, saved, strict=True):
        seen, expected = by_hand(net, given(part))
        close(inner, seen[path][0])
        close(out, expected)
    same(everything, torch.cat([out for _, out in saved]))


def test_values_flow_between_prompts_and_only_own_rows_are_written() -> None:
    net, (args, _) = make("residual")
    model: Any = Model(net)
    one, two = args[0][:1], args[0][1:3]
    with model.trace() as tracer:
        with tracer.invoke(one):
            source = model.blocks[0].output
            untouched = model.output.save()
        with tracer.invoke(two):
            model.blocks[0].output[1] = source[0]
            out = model.output.save()

    other = by_hand(net, ((one,), {}))[0]["blocks.0"][0][0]

    def change(value: Tensor) -> Tensor:
        new = value.clone()
        new[1] = other
        return new

    _, expected = by_hand(net, ((two,), {}), "blocks.0", change)
    close(out, expected)
    assert not torch.allclose(expected, by_hand(net, ((two,), {}))[1], atol=1e-3)
    close(untouched, by_hand(net, ((one,), {}))[1])


def test_rows_in_another_dimension() -> None:
    net, (args, _) = make("recurrent")
    model: Any = Model(net, rows=1)
    given = args[0]
    parts = [given["values"][:, :1], given["values"]]
    with model.trace() as tracer:
        outs = []
        for part in parts:
            with tracer.invoke({"values": part, "weight": given["weight"]}):
                assert model.head.output.shape == (5, part.shape[1], 3)
                outs.append((model.output["all"].save(), model.output["last"][1].save()))
    for part, (out, state) in zip(parts, outs, strict=True):
        with torch.no_grad():
            expected = net({"values": part, "weight": given["weight"]})
        close(out, expected["all"])
        close(state, expected["last"][1])


def test_a_session_of_inputs_of_other_sizes() -> None:
    net, (args, _) = make("convolutional")
    model: Any = Model(net)
    small, large = args[0], randomly(3, 3, 9, 9)
    with model.session():
        with model.trace(small):
            mean = model.conv.output.mean((0, 2, 3))
        with model.trace(large):
            assert model.conv.output.shape == (3, 8, 9, 9)
            model.conv.output[:] = model.conv.output - mean[:, None, None]
            out = model.output.save()
    moved = by_hand(net, ((small,), {}))[0]["conv"][0].mean((0, 2, 3))
    _, expected = by_hand(net, ((large,), {}), "conv", lambda value: value - moved[:, None, None])
    close(out, expected)
    assert not torch.allclose(expected, by_hand(net, ((large,), {}))[1], atol=1e-3)


def test_edits_stay() -> None:
    net, (args, _) = make("residual")
    model: Any = Model(net)
    with model.scan(*args):
        assert model.blocks[0].output.shape == (4, 12)
    with model.edit() as edited:
        edited.blocks[1].output[:, 0] = 3.0
    larger = randomly(7, 12)

    def change(value: Tensor) -> Tensor:
        new = value.clone()
        new[:, 0] = 3.0
        return new

    with edited.trace(larger):
        out = edited.output.save()
    with model.trace(larger):
        plain = model.output.save()
    same(out, by_hand(net, ((larger,), {}), "blocks.1", change)[1])
    same(plain, by_hand(net, ((larger,), {}))[1])
    assert not torch.equal(out, plain)


def test_modules_are_called_on_values_and_skipped() -> None:
    net, (args, _) = make("residual")
    model: Any = Model(net)
    with model.trace(*args):
        again = model.blocks[2](model.blocks[0].output).save()
        model.blocks[1].skip(model.blocks[0].output)
        out = model.output.save()
    seen, plain = by_hand(net, ((args[0],), {}))
    with torch.no_grad():
        same(again, net.blocks[2](seen["blocks.0"][0]))
    expected = by_hand(net, ((args[0],), {}), "blocks.1", lambda _: seen["blocks.0"][0])[1]
    same(out, expected)
    assert not torch.equal(expected, plain)


def test_a_module_called_on_another_size_than_the_models() -> None:
    net = nn.Sequential(nn.AvgPool1d(2), nn.Tanh())
    model: Any = Model(net)
    longer = randomly(3, 5, 12)
    with model.trace(randomly(2, 5, 8)):
        pooled = model[0](longer).save()
    same(pooled, net[0](longer))


def test_calls_of_functions_are_cached_by_pattern() -> None:
    net, (args, kwargs) = make("convolutional")
    model: Any = Model(net)
    with model.trace(*args, **kwargs) as tracer:
        cache = tracer.cache("gelu_*.output", "bn.output")
    assert list(cache) == ["gelu_0.output", "bn.output"]
    same(cache["gelu_0.output"], functional.gelu(functional.relu(cache["bn.output"])))


def test_conditions_loops_and_caches() -> None:
    net, (args, _) = make("residual")
    model: Any = Model(net)
    with model.trace(*args) as tracer:
        cache = tracer.cache("blocks.*.output")
        hidden = model.blocks[0].output
        chosen = tracer.cond(hidden.sum() > 1e6, lambda: hidden * 0, lambda: hidden * 2).save()
        total = tracer.loop(3, lambda turn, so_far: so_far + hidden, torch.zeros(4, 12)).save()
    seen, _ = by_hand(net, ((args[0],), {}))
    assert list(cache) == [f"blocks.{index}.output" for index in range(3)]
    for name, value in cache.items():
        same(value, seen[name.removesuffix(".output")][0])
    same(chosen, seen["blocks.0"][0] * 2)
    close(total, seen["blocks.0"][0] * 3)
