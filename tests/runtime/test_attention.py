"""Attention: nobody's numbers change unless somebody looks, and then they are the library's own eager ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpose.graph.manifest import ATTENTION
from interpose.runtime import attention
from interpose.runtime.feeding import measure_feeding
from interpose.runtime.hooks import hooked
from interpose.runtime.inputs import batch_inputs
from models import tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

DECODERS = [
    *("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "neox", "opt", "phi", "mixtral"),
]
ROWS = {
    "plain": [[[5, 6, 7, 8, 9], [15, 16, 17, 18, 19]]],
    "left": [[[5, 6, 7, 8, 9], [15, 16]]],
    "right": [[[5, 6, 7, 8, 9]], [[15, 16, 17]]],
}


class Look:
    """A visitor that keeps what it sees and changes what it is told to."""

    attention = True

    def __init__(self, **changes: Any) -> None:
        self.seen: dict[str, Any] = {}
        self.changes = changes

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        self.seen[event] = value
        return self.changes[event](value) if event in self.changes else value


def model(arch: str, implementation: str | None = None) -> Any:
    kind = AutoModelForMaskedLM if arch == "bert" else AutoModelForCausalLM
    return kind.from_pretrained(tiny(arch), attn_implementation=implementation).eval()


def installed(arch: str) -> Any:
    found = model(arch)
    feeding = measure_feeding(found, "cpu")
    assert attention.install(found, [feeding.kwargs(batch_inputs(rows)) for rows in ROWS.values()]) == "interpose"
    return found


def feed(found: Any, style: str) -> dict[str, Tensor]:
    return measure_feeding(found, "cpu").kwargs(batch_inputs(ROWS[style]))


def attend(found: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the second block's attention."""
    names = ("attn", "self_attn", "self", "attention")
    every = [(path, module) for path, module in found.named_modules() if path.rpartition(".")[2] in names]
    return [(path, module) for path, module in every if not any(path == p.rpartition(".")[0] for p, _ in every)][1]


def look(found: nn.Module, kwargs: dict[str, Any], **changes: Any) -> tuple[Any, Look]:
    path, module = attend(found)
    visitor = Look(**changes)
    with hooked({path: module}, {m: p for p, m in found.named_modules()}, visitor):
        return found(**kwargs), visitor


@pytest.mark.parametrize("arch", [*DECODERS, "bert"])
@torch.no_grad()
def test_nobody_looking_is_the_stock_model(arch: str) -> None:
    stock, ours = model(arch), installed(arch)
    for style in ROWS:
        kwargs = feed(stock, style)
        assert torch.equal(stock(**kwargs).logits, ours(**kwargs).logits), style


@pytest.mark.parametrize("arch", DECODERS)
@torch.no_grad()
def test_decoding_with_a_cache_is_the_stock_models(arch: str) -> None:
    steps = []
    for found in (model(arch), installed(arch)):
        kwargs = feed(found, "left")
        cache = found(**kwargs, use_cache=True).past_key_values
        mask = torch.cat([kwargs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
        nxt = {"input_ids": torch.tensor([[3], [4]]), "position_ids": torch.tensor([[5], [2]])}
        steps.append(found(**nxt, attention_mask=mask, past_key_values=cache).logits)
    assert torch.equal(*steps)


@pytest.mark.parametrize("arch", [*DECODERS, "bert"])
@torch.no_grad()
def test_looking_is_the_eager_model(arch: str) -> None:
    eager, ours = model(arch, "eager"), installed(arch)
    for style in ROWS:
        kwargs = feed(eager, style)
        expected = eager(**kwargs, output_attentions=True)
        found, visitor = look(ours, kwargs)
        assert torch.equal(found.logits, expected.logits), style
        assert torch.equal(visitor.seen["pattern"], expected.attentions[1]), style
        assert torch.equal(visitor.seen["scores"].float().softmax(-1), visitor.seen["pattern"])
        assert visitor.seen["z"].shape[:2] == kwargs["input_ids"].shape


@torch.no_grad()
def test_only_the_touched_module_is_tapped_and_only_while_looking() -> None:
    ours = installed("llama")
    kwargs = feed(ours, "plain")
    path, module = attend(ours)
    names = {m: p for p, m in ours.named_modules()}
    visits: list[tuple[str, str]] = []

    class Log(Look):
        def visit(self, module: str, event: str, call: int, value: Any) -> Any:
            visits.append((module, event))
            return value

    with hooked({path: module, "": ours}, names, Log()):
        ours(**kwargs)
    assert [event for at, event in visits if at == path] == ["enter", *ATTENTION, "exit"]
    assert {at for at, _ in visits} == {"", path}

    Log.attention = False
    visits.clear()
    with hooked({path: module}, names, Log()):
        ours(**kwargs)
    assert [event for _, event in visits] == ["enter", "exit"]


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])
@torch.no_grad()
def test_written_scores_and_patterns_are_what_the_model_uses(arch: str) -> None:
    ours = installed(arch)
    kwargs = feed(ours, "plain")
    plain, seen = look(ours, kwargs)
    value = seen.seen["v"].repeat_interleave(seen.seen["pattern"].shape[1] // seen.seen["v"].shape[1], 1)

    uniform = torch.full_like(seen.seen["pattern"], 0.2)
    out, after = look(ours, kwargs, pattern=lambda _: uniform)
    torch.testing.assert_close(after.seen["z"], (uniform @ value).transpose(1, 2))
    assert not torch.allclose(out.logits, plain.logits, atol=1e-3)

    mixed = seen.seen["scores"].flip(-1).clamp(min=-5)
    _, after = look(ours, kwargs, scores=lambda _: mixed)
    torch.testing.assert_close(after.seen["z"], (mixed.softmax(-1) @ value).transpose(1, 2))

    _, module = attend(ours)
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, args, output: kept.append(output[0]))
    look(ours, kwargs, z=torch.zeros_like)
    handle.remove()
    assert float(kept[0].std(1).max()) < 1e-6  # nothing is left but the projection's bias


@torch.no_grad()
def test_a_rewritten_query_moves_the_scores() -> None:
    ours = installed("llama")
    kwargs = feed(ours, "plain")
    _, before = look(ours, kwargs)
    _, after = look(ours, kwargs, q_rot=lambda q: q * 2)
    kept = before.seen["scores"] > -1e30
    torch.testing.assert_close(after.seen["scores"][kept], 2 * before.seen["scores"][kept])


def test_gradients_flow_through_the_pattern() -> None:
    ours = installed("llama")
    kept: list[Tensor] = []

    def cut(pattern: Tensor) -> Tensor:
        kept.append(pattern.detach().requires_grad_())
        return kept[0]

    out, _ = look(ours, feed(ours, "plain"), pattern=cut)
    out.logits.sum().backward()
    assert kept[0].grad is not None and float(kept[0].grad.abs().max()) > 0


def test_a_model_outside_the_interface_says_so_and_stays_as_it_is() -> None:
    found = model("bloom")
    before = found.config._attn_implementation
    assert "attention interface" in attention.install(found, [feed(found, "plain")])
    assert found.config._attn_implementation == before


@pytest.mark.parametrize("overrides", [{}, {"alibi": True}, {"new_decoder_architecture": True, "num_kv_heads": 2}])
def test_fused_attention_that_a_model_calls_itself_is_written_out_for_those_who_look(overrides: Any) -> None:
    found = AutoModelForCausalLM.from_pretrained(tiny("falcon", **overrides)).eval()
    kwargs = feed(found, "left")
    plain, before = found(**kwargs).logits, found.config._attn_implementation
    assert attention.install(found, [kwargs]) == attention.READABLE
    assert found.config._attn_implementation == before
    assert torch.equal(found(**kwargs).logits, plain)


def test_a_model_whose_eager_form_is_another_function_is_refused() -> None:
    found = AutoModelForCausalLM.from_pretrained(tiny("gpt2", reorder_and_upcast_attn=True), dtype=torch.bfloat16)
    reason = attention.install(found.eval(), [feed(found, "plain")])
    assert "eager" in reason
    assert found.config._attn_implementation == "sdpa"
