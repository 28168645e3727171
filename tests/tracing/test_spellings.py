"""What notebooks for nnsight 0.4 to 0.8, nnterp and TransformerLens write, each against our own spelling of it."""

from __future__ import annotations

from typing import Any

import interpose
import numpy as np
import pytest
import torch
from interpose import CONFIG, LanguageModel, nnsight
from interpose.config import Config
from interpose.errors import (
    BadArgument,
    ConfigError,
    ControlFlow,
    ShapeMismatch,
    UnknownModule,
    UnknownOp,
    UnknownPoint,
)
from interpose.nnterp import StandardizedTransformer
from interpose.tracing.keeping import SavedList, StepValues
from interpose.transformer_lens import HookedTransformer, HookPoint, hook_points, utils
from models import tiny
from torch import Tensor

ROW = [5, 9, 33, 7, 8]
OTHER = [81, 2, 14, 3, 4]
EDGE = 1e-5


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel(str(tiny("gpt2")))


@pytest.fixture(scope="module")
def plain(model: Any) -> dict[str, Tensor]:
    """A forward's values in our own spelling."""
    with model.trace(ROW):
        kept = {f"h{index}": block.output[...].save() for index, block in enumerate(model.transformer.h)}
        kept |= {"mlp0": model.transformer.h[0].mlp.output.save(), "wte": model.transformer.wte.output.save()}
        kept["logits"] = model.lm_head.output.save()
    return {name: value.value for name, value in kept.items()}


@pytest.fixture(scope="module")
def tokens(model: Any) -> Tensor:
    with model.generate(ROW, max_new_tokens=3) as t:
        ids = t.result.save()
    return ids.value


# -- nnsight: the model ------------------------------------------------------------------------------------------


def test_the_namespace_of_nnsight() -> None:
    assert nnsight.LanguageModel is LanguageModel is nnsight.TransformersModel
    assert nnsight.NNsight is interpose.Model and nnsight.CONFIG is CONFIG and nnsight.save is interpose.save
    with pytest.raises(UnknownOp, match="without a save"):
        nnsight.int(3)
    with pytest.raises(UnknownOp, match="fetch_models"):
        nnsight.ndif_status()


def test_options_that_change_no_result() -> None:
    model = LanguageModel(
        str(tiny("gpt2")), device_map="cpu", torch_dtype=torch.float32, dispatch=True, trust_remote_code=False
    )
    model.dispatch()
    assert model.eval() is model and model.requires_grad_(False) is model and model.cpu() is model
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    assert model.config.n_layer == len(model.transformer.h) == 3


@pytest.mark.parametrize(
    "options", [{"trust_remote_code": True}, {"load_in_8bit": True}, {"token": "t"}, {"nonsense": 1}]
)
def test_options_that_would_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(BadArgument, match=next(iter(options))):
        LanguageModel("gpt2", **options)


def test_a_model_stays_where_it_was_made(model: Any) -> None:
    for move in (lambda: model.to("cuda"), model.cuda, model.half):
        with pytest.raises(BadArgument, match="device_map"):
            move()
    with pytest.raises(BadArgument, match="backward"):
        model.requires_grad_()


def test_renamed_modules(plain: dict[str, Tensor]) -> None:
    names = {"transformer.h": "parts", "mlp": "feedforward", ".transformer": ["backbone", "body"]}
    model = LanguageModel(str(tiny("gpt2")), rename=names)
    with model.trace(ROW):
        one = model.parts[0].feedforward.output.save()
        two = model.body.h[0].mlp.output.save()
        three = model.backbone.wte.output.save()
    assert torch.equal(one, plain["mlp0"]) and torch.equal(two, plain["mlp0"]) and torch.equal(three, plain["wte"])
    with pytest.raises(BadArgument, match="a path"):
        LanguageModel("gpt2", rename={"mlp": "a.b"})


def test_the_key_and_the_address() -> None:
    config = Config()
    config.set_default_api_key("first")
    assert config.API_KEY == "first" == config.API.APIKEY
    config.API.APIKEY, config.API.HOST, config.APP.REMOTE_LOGGING = "second", "lab.example.org", False
    assert (config.API_KEY, config.HOST, config.PROGRESS) == ("second", "lab.example.org", False)
    with pytest.raises(ConfigError, match="https"):
        config.API.SSL = False


# -- nnsight: a trace --------------------------------------------------------------------------------------------


def test_outputs_inputs_and_lists_of_layers(model: Any, plain: dict[str, Tensor]) -> None:
    with model.trace(ROW, scan=True, validate=True):
        last = model.transformer.h[-1].output[0].save()
        middle = [layer.output[0].save() for layer in model.transformer.h[1:3]]
        given = model.transformer.h[1].inputs[0][0].save()
        same = model.transformer.h[1].input.save()
        logits, field = model.output.logits.save(), model.output["logits"].save()
    assert torch.equal(last.value, plain["h2"]) and torch.equal(middle[0], plain["h1"])
    assert torch.equal(given, plain["h0"]) and torch.equal(same, plain["h0"])
    assert torch.equal(logits, plain["logits"]) and torch.equal(field, plain["logits"])
    assert torch.equal(logits.logits, plain["logits"])


def test_without_a_block(model: Any, plain: dict[str, Tensor], tokens: Tensor) -> None:
    assert torch.equal(model.trace(ROW, trace=False).logits, plain["logits"])
    assert torch.equal(model.generate(ROW, max_new_tokens=3, trace=False), tokens)
    with model.trace(ROW) as tracer:
        result = tracer.result.save()
    assert torch.equal(result.logits, plain["logits"])


def test_where_values_live_and_what_they_become(model: Any, plain: dict[str, Tensor]) -> None:
    with model.trace(ROW):
        hidden = model.transformer.h[0].output[0]
        moved = hidden.detach().clone().cpu().to(hidden.device).to("cuda").cuda().save()
        half = hidden.to(torch.float16).save()
        noise = torch.zeros(hidden.shape[-1]).to(model.device) + torch.zeros_like(
            hidden[0, 0], device=hidden.device
        )
        hidden[:, -1] += noise
        assert hidden.dtype == torch.float32 and f"{hidden}".startswith("<deferred")
    assert torch.equal(moved, plain["h0"]) and half.dtype == torch.float16


def test_an_invoke_knows_its_tokens(model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(ROW) as one:
            model.output.save()
        with tracer.invoke([ROW, ROW[:2]]) as two:
            model.output.save()
    assert one.inputs[0][0]["input_ids"][0].tolist() == ROW
    given = two.inputs[0][0]
    assert given["input_ids"].tolist() == [ROW, [0, 0, 0, *ROW[:2]]]
    assert given["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 1, 1]]


def test_an_item_is_a_number_after_the_block(model: Any, plain: dict[str, Tensor]) -> None:
    with model.trace(ROW):
        score = (model.output[0, -1, 3] - model.output[0, -1, 4]).item().save()
        with pytest.raises(ControlFlow):
            float(model.output[0, -1, 3].item())
        with pytest.raises(ShapeMismatch):
            model.output.item()
    assert float(score) == float(plain["logits"][0, -1, 3] - plain["logits"][0, -1, 4])
    assert f"{score:.3f}" == f"{score.item():.3f}"


def test_torch_functions(model: Any, plain: dict[str, Tensor]) -> None:
    with model.trace(ROW):
        hidden = model.transformer.h[0].output[0]
        stacked = torch.stack([block.output[0][:, -1] for block in model.transformer.h]).save()
        top = torch.topk(model.lm_head.output[0, -1], 3).indices.save()
        gram = torch.einsum("bsd,btd->bst", hidden, hidden).save()
    wanted = torch.stack([plain[f"h{index}"][:, -1] for index in range(3)])
    assert torch.equal(stacked, wanted)
    assert torch.equal(top, torch.topk(plain["logits"][0, -1], 3).indices)
    assert torch.allclose(gram, torch.einsum("bsd,btd->bst", plain["h0"], plain["h0"]), atol=1e-4)


def test_einops(model: Any, plain: dict[str, Tensor]) -> None:
    einops = pytest.importorskip("einops")
    with model.trace(ROW):
        hidden = model.transformer.h[0].output[0]
        heads = einops.rearrange(hidden, "b s (n d) -> b n s d", n=4).save()
        mean = einops.reduce(hidden, "b s d -> b d", "mean").save()
        gram = einops.einsum(hidden, hidden, "b s d, b t d -> b s t").save()
    real = plain["h0"]
    assert torch.equal(heads, einops.rearrange(real, "b s (n d) -> b n s d", n=4))
    assert torch.allclose(mean, real.mean(1), atol=EDGE)
    assert torch.allclose(gram, torch.einsum("bsd,btd->bst", real, real), atol=1e-4)


def test_a_block_output_set_as_a_tuple(model: Any, plain: dict[str, Tensor]) -> None:
    block = model.transformer.h[0]
    with model.trace(ROW):
        block.output = (block.output[0] * 2,) + block.output[1:]  # noqa: RUF005
        joined = model.output.save()
    with model.trace(ROW):
        block.output = (block.output[0] * 2,)
        alone = model.output.save()
    with model.trace(ROW):
        block.output[:] = block.output * 2
        ours = model.output.save()
    assert torch.equal(joined, ours) and torch.equal(alone, ours) and not torch.equal(ours, plain["logits"])
    with model.trace(ROW), pytest.raises(BadArgument, match="output = hidden"):
        _ = (1,) + block.output[0]


def test_functions_and_logs_in_a_block(model: Any, plain: dict[str, Tensor], capsys: Any) -> None:
    with model.trace(ROW) as tracer, nnsight.local():
        total = tracer.apply(lambda x, y: x + y, model.transformer.h[0].output[0], 1).save()
        again = nnsight.apply(torch.add, model.transformer.h[0].output[0], 1).save()
        tracer.apply(print, "mean", model.transformer.h[0].output.mean())
        tracer.log("number", 3)
        nnsight.log("said")
    assert torch.equal(total, plain["h0"] + 1) and torch.equal(again, total)
    said = capsys.readouterr()
    assert f"{float(plain['h0'].mean()):.4f}" in said.out + said.err and "said" in said.out + said.err


def test_barriers(model: Any) -> None:
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(ROW):
            embedded = model.transformer.wte.output
            barrier()
        with tracer.invoke(OTHER):
            barrier()
            model.transformer.wte.output = embedded
            patched = model.lm_head.output.save()
    with model.trace(ROW):
        ours = model.lm_head.output.save()
    assert torch.allclose(patched, ours, atol=1e-4)


def test_stopping_and_skipping(model: Any, plain: dict[str, Tensor]) -> None:
    with model.trace(ROW) as tracer:
        early = model.transformer.h[0].output[0].save()
        tracer.stop()
    with model.trace(ROW):
        model.transformer.h[1].skip((model.transformer.h[1].input, None))
        through = model.transformer.h[1].output[0].save()
    assert torch.equal(early, plain["h0"]) and torch.equal(through, plain["h0"])


def test_a_condition_as_a_block(model: Any, plain: dict[str, Tensor]) -> None:
    with model.trace(ROW) as tracer:
        hidden = model.transformer.h[0].output[0]
        with tracer.cond(hidden.sum() > -1e9):
            model.transformer.h[1].output[0][:] = 0
        with nnsight.cond(hidden.sum() < -1e9):
            model.transformer.h[2].output[0][:] = 0
        zeroed = model.transformer.h[1].output[0].save()
        kept = model.transformer.h[2].output[0].save()
        with pytest.raises(BadArgument, match="Python if"):
            tracer.cond(True).__enter__()
    assert zeroed.abs().sum() == 0 and kept.abs().sum() > 0


# -- nnsight: keeping --------------------------------------------------------------------------------------------


def test_lists_and_dicts_that_are_saved(model: Any, plain: dict[str, Tensor]) -> None:
    with model.trace(ROW) as tracer:
        lists = [nnsight.list().save(), nnsight.save([]), interpose.save([]), tracer.list().save()]
        table = nnsight.dict().save()
        for kept in lists:
            kept.append(model.transformer.h[0].output[0])
        table["logits"] = model.lm_head.output
        both = nnsight.save({"a": model.transformer.h[1].output[0], "b": 3})
        both["c"] = model.transformer.wte.output
        width = interpose.save(model.transformer.h[0].output[0].shape[-1])
    assert all(torch.equal(kept[0].value, plain["h0"]) for kept in lists)
    assert torch.equal(table["logits"], plain["logits"]) and torch.equal(both["a"], plain["h1"])
    assert torch.equal(both["c"], plain["wte"]) and both["b"] == 3 and width == 64


def test_save_on_pythons_own_types_says_what_to_write(model: Any) -> None:
    with pytest.raises(AttributeError) as caught, model.trace(ROW):
        [].save()  # type: ignore[attr-defined]
    assert any("interpose.save([])" in note for note in caught.value.__notes__)
    with pytest.raises(AttributeError) as caught, model.session():
        (3).save()  # type: ignore[attr-defined]
    assert any("a int is kept" in note or "int" in note for note in caught.value.__notes__)


def test_a_cache_of_all_modules_as_the_block_leaves_them(model: Any, plain: dict[str, Tensor]) -> None:
    with model.trace(ROW) as tracer:
        cache = tracer.cache()
        model.transformer.h[0].output[0][:] *= 2
    assert torch.equal(cache["model.transformer.h.0"].output.value, plain["h0"] * 2)
    assert torch.equal(cache.model.transformer.h[0].output.value, plain["h0"] * 2)
    assert torch.equal(cache.transformer.h[0].mlp.output.value, plain["mlp0"])
    assert {"model.lm_head", "model.transformer.wte"} <= set(cache)
    with pytest.raises(UnknownModule, match="holds no"):
        cache["model.transformer.h.9"]
    with pytest.raises(UnknownModule, match="holds nothing"):
        _ = cache.model.nowhere


def test_a_cache_of_some_modules(model: Any, plain: dict[str, Tensor]) -> None:
    with model.trace() as tracer:
        with tracer.invoke(ROW):
            chosen = [model.transformer.h[1], model.lm_head]
            cache = tracer.cache(modules=chosen, include_inputs=True, device="cpu").save()
        with tracer.invoke(OTHER):
            named = tracer.cache(modules=["model.transformer.h.0"], include_inputs=True, include_output=False)
    assert list(cache) == ["model.transformer.h.1", "model.lm_head"]
    entry = cache["model.transformer.h.1"]
    assert torch.allclose(entry.output, plain["h1"], atol=EDGE)
    assert torch.allclose(entry.input, plain["h0"], atol=EDGE)
    assert torch.allclose(entry.inputs[0][0], plain["h0"], atol=EDGE)
    assert torch.allclose(cache.lm_head.output, plain["logits"], atol=1e-4)
    assert named.model.transformer.h[0].input.shape == (1, 5, 64)


def test_a_cache_of_patterns_keeps_its_lines_values(model: Any, plain: dict[str, Tensor]) -> None:
    with model.trace(ROW) as tracer:
        cache = tracer.cache("transformer.h.*.output").save()
        model.transformer.h[0].output[0][:] = 0
    assert torch.equal(cache["transformer.h.0.output"].value, plain["h0"])


# -- nnsight: generation -----------------------------------------------------------------------------------------


def test_what_steps_put_into_a_list_comes_step_by_step(model: Any, tokens: Tensor) -> None:
    with model.generate(ROW, max_new_tokens=3) as tracer:
        kept, pairs = nnsight.list().save(), nnsight.save([])
        with tracer.all():
            kept.append(model.lm_head.output[0, -1].argmax(-1))
            pairs.append(model.lm_head.output[0, -1].argmax(-1))
            pairs.append(model.lm_head.output[0, -1].max())
        unrolled = nnsight.save([])
        for _ in tracer.iter[:]:
            unrolled.append(model.lm_head.output[0, -1].argmax(-1))
    new = tokens[0, len(ROW) :].tolist()
    assert [int(value) for value in kept] == new == [int(value) for value in unrolled]
    assert [int(value) for value in pairs[::2]] == new and len(pairs) == 6


def test_all_of_a_module(model: Any, tokens: Tensor) -> None:
    with model.generate(ROW, max_new_tokens=3) as tracer:
        kept = nnsight.list().save()
        with model.transformer.h.all():
            kept.append(model.lm_head.output[0, -1].argmax(-1))
        result = model.generator.output.save()
    assert torch.equal(result, tokens) and tracer is not None
    assert [int(value) for value in kept] == tokens[0, len(ROW) :].tolist()


def test_next(model: Any, tokens: Tensor) -> None:
    with model.generate(ROW, max_new_tokens=3) as tracer:
        first = model.lm_head.output[0, -1].argmax(-1).save()
        second = model.lm_head.next().output[0, -1].argmax(-1).save()
        third = model.lm_head.next().output[0, -1].argmax(-1).save()
        with pytest.raises(BadArgument, match="outside"):
            model.lm_head.next()
        zeroth = model.transformer.h[0].output[0].shape
        tracer.next()
        then = model.transformer.h[0].output[0].shape
    assert [int(first), int(second), int(third)] == tokens[0, len(ROW) :].tolist()
    assert (zeroth, then) == ((1, 5, 64), (1, 1, 64))


def test_a_loop_over_steps_ends_where_it_stops(model: Any, tokens: Tensor) -> None:
    with model.generate(ROW, max_new_tokens=3) as tracer:
        picks = nnsight.save([])
        for _ in tracer.all():
            picks.append(model.output.logits[0, -1].argmax(dim=-1))
            if len(picks) == 2:
                tracer.stop()
    assert [int(pick) for pick in picks] == tokens[0, len(ROW) : -1].tolist()


def test_the_number_of_a_step(model: Any) -> None:
    with model.generate(ROW, max_new_tokens=3) as tracer:
        with tracer.iter[1] as step:
            assert step == 1
        with tracer.iter[:] as step, pytest.raises(ControlFlow, match="for step in"):
            assert step == 2
        model.output.save()


# -- nnsight: gradients, sessions, edits -------------------------------------------------------------------------


def test_gradients_named_before_and_after(model: Any) -> None:
    with model.trace(ROW):
        early = model.transformer.h[1].output[0].grad.save()
        model.output.logits.sum().backward()
    with model.trace(ROW):
        hidden = model.transformer.h[1].output[0]
        hidden.requires_grad_(True)
        loss = model.output.sum()
        with loss.backward(retain_graph=True):
            inside = hidden.grad.save()
        with (loss * 2).backward():
            twice = hidden.grad.save()
    assert inside.abs().sum() > 0
    assert torch.equal(early, inside) and torch.allclose(twice, inside * 2)


def test_a_weighted_backward(model: Any) -> None:
    with model.trace(ROW):
        hidden, logits = model.transformer.h[1].output[0], model.output[0, -1]
        with logits.backward(gradient=torch.eye(400)[7]):
            weighted = hidden.grad.save()
        with logits[7].backward():
            single = hidden.grad.save()
        with pytest.raises(BadArgument, match="create_graph"):
            logits.sum().backward(create_graph=True)
    assert torch.allclose(weighted, single, atol=EDGE)


def test_an_early_gradient_needs_its_loss(model: Any) -> None:
    with pytest.raises(BadArgument, match="no loss ran backward"), model.trace(ROW):
        gradient = model.transformer.h[1].output[0].grad
        with pytest.raises(BadArgument, match="backward"):
            gradient * 2
        gradient.save()


def test_sessions(model: Any, plain: dict[str, Tensor]) -> None:
    with model.session() as session:
        kept = nnsight.list().save()
        for row in session.iter([ROW, OTHER]):
            with model.trace(row):
                kept.append(model.transformer.h[0].output[0])
        with pytest.raises(BadArgument, match="for item in"), session.iter([1]):
            pass
    assert torch.allclose(kept[0], plain["h0"], atol=EDGE) and len(kept) == 2


def test_edits_of_0_8(model: Any) -> None:
    with model.edit() as (_, edited):
        edited.transformer.h[1].output[:] = 0
    with edited.trace(ROW):
        zeroed = edited.transformer.h[1].output.save()
    with model.trace(ROW):
        untouched = model.transformer.h[1].output[0].save()
    assert zeroed.abs().sum() == 0 and untouched.abs().sum() > 0


def test_names_that_mean_something_else_say_so(model: Any) -> None:
    with model.trace(ROW) as tracer:
        for name in ("vis", "nonsense"):
            with pytest.raises(UnknownOp, match=name):
                getattr(tracer, name)
        with pytest.raises(ControlFlow, match="after the block"):
            _ = model.output.value
        model.output.save()


# -- nnterp ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standard() -> Any:
    return StandardizedTransformer(str(tiny("gpt2")))


def test_nnterp_figures_and_accessors(standard: Any, plain: dict[str, Tensor]) -> None:
    assert (standard.num_layers, standard.hidden_size, standard.num_heads) == (3, 64, 4)
    assert standard.vocab_size == 400
    with standard.trace(ROW):
        hidden, mlp = standard.layers_output[1].save(), standard.mlps_output[0].save()
        seen = standard.project_on_vocab(standard.layers_output[2]).save()
        likely = standard.next_token_probs.save()
    assert torch.equal(hidden.value, plain["h1"]) and torch.equal(mlp, plain["mlp0"])
    assert torch.allclose(seen, plain["logits"], atol=1e-4)
    assert torch.allclose(likely, plain["logits"][:, -1].softmax(-1), atol=EDGE)


def test_nnterp_steering(standard: Any, model: Any, plain: dict[str, Tensor]) -> None:
    vector = torch.linspace(-1, 1, 64)
    with standard.trace(ROW):
        standard.steer([0, 1], vector, factor=2, positions=-1)
        steered = standard.logits.save()
    with model.trace(ROW):
        for layer in (0, 1):
            model.transformer.h[layer].output[0][:, -1] += 2 * vector
        ours = model.output.save()
    assert torch.allclose(steered, ours, atol=1e-4) and not torch.allclose(ours, plain["logits"], atol=0.1)


def test_nnterp_skipping(standard: Any, plain: dict[str, Tensor]) -> None:
    with standard.trace(ROW):
        standard.skip_layers(1, 2)
        through = standard.layers_output[2].save()
    assert torch.equal(through.value, plain["h0"])
    with standard.trace(ROW):
        standard.skip_layer(0, torch.zeros(1, 5, 64))
        empty = standard.layers_output[0].save()
    assert empty.abs().sum() == 0
    with standard.trace(ROW), pytest.raises(BadArgument, match="3"):
        standard.skip_layers(2, 3)


# -- TransformerLens ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooked() -> Any:
    return HookedTransformer.from_pretrained_no_processing(str(tiny("gpt2")))


def test_run_with_cache(model: Any, plain: dict[str, Tensor]) -> None:
    logits, cache = model.run_with_cache(ROW)
    close = {"atol": 1e-4}
    assert torch.allclose(logits, plain["logits"], **close)  # a look inside attention takes its eager form
    assert torch.allclose(cache["blocks.0.hook_resid_post"], plain["h0"], **close)
    assert torch.allclose(cache["resid_post", -1], plain["h2"], **close)
    assert torch.allclose(cache["mlp_out", 0], plain["mlp0"], **close)
    pattern = cache["pattern", 1]
    assert pattern.shape == (1, 4, 5, 5) and torch.allclose(pattern.sum(-1), torch.ones(1, 4, 5))
    assert torch.equal(cache["pattern", 1, "attn"], cache["attn", 1])
    assert cache["embed"].shape == (1, 5, 64) and cache.stack_activation("resid_pre").shape == (3, 1, 5, 64)
    assert not any(name.endswith("hook_result") for name in cache)


def test_a_cache_of_chosen_names(model: Any) -> None:
    _, cache = model.run_with_cache(
        ROW, lambda name: name.endswith("hook_z"), return_type=None, remove_batch_dim=True
    )
    assert list(cache) == [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    assert cache["z", 0].shape == (5, 4, 16)
    assert repr(cache) == f"ActivationCache with keys {list(cache)}"
    _, heads = model.run_with_cache(ROW, "blocks.1.attn.hook_result")
    assert heads["result", 1].shape == (1, 5, 4, 64)
    with pytest.raises(UnknownPoint, match="names_filter"):
        heads["z", 0]
    with pytest.raises(UnknownPoint, match="gain"):
        heads["normalized", 0]
    with pytest.raises(UnknownOp, match="stack_activation"):
        heads.decompose_resid(2)
    with pytest.raises(BadArgument, match="stop_at_layer"):
        model.run_with_cache(ROW, stop_at_layer=1)


def test_run_with_hooks(model: Any, plain: dict[str, Tensor]) -> None:
    def halve(value: Any, hook: Any) -> Any:
        assert (hook.name, hook.layer()) == ("blocks.0.hook_mlp_out", 0)
        return value * 0.5

    def silence(z: Any, hook: Any) -> Any:
        z[:, :, 1] = 0
        return z

    hooks = [("blocks.1.attn.hook_z", silence), ("blocks.0.hook_mlp_out", halve)]
    logits = model.run_with_hooks(ROW, fwd_hooks=hooks)
    with model.trace(ROW):
        model.layers[0].mlp_out *= 0.5
        model.layers[1].z[:, :, 1] = 0
        ours = model.output.save()
    assert torch.equal(logits, ours) and not torch.allclose(ours, plain["logits"], atol=0.01)


def test_hooks_tell_one_another_in_the_order_of_the_model(model: Any, plain: dict[str, Tensor]) -> None:
    seen: dict[str, Any] = {}

    def keep(value: Any, hook: Any) -> None:
        seen["value"] = value

    def put(value: Any, hook: Any) -> Any:
        return seen["value"]

    hooks = [("blocks.2.hook_resid_post", put), ("blocks.0.hook_resid_pre", keep)]
    logits = model.run_with_hooks(ROW, fwd_hooks=hooks)
    with model.trace(ROW):
        model.layers[2].resid_post = model.layers[0].resid_pre
        ours = model.output.save()
    assert torch.equal(logits, ours) and not torch.equal(ours, plain["logits"])


def test_losses(model: Any, plain: dict[str, Tensor]) -> None:
    logits, loss = model.run_with_hooks([ROW, OTHER], return_type="both")
    ids = torch.tensor([ROW, OTHER])
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(loss, wanted, atol=1e-4)
    with pytest.raises(BadArgument, match="one length"):
        model.run_with_hooks([ROW, OTHER[:3]], return_type="loss")
    with pytest.raises(BadArgument, match="return_type"):
        model.run_with_hooks(ROW, return_type="everything")


def test_names_of_activations() -> None:
    assert hook_points.HookPoint is HookPoint
    assert utils.get_act_name("pattern", 5) == "blocks.5.attn.hook_pattern"
    assert utils.get_act_name("resid_pre", 0) == "blocks.0.hook_resid_pre"
    assert utils.get_act_name("post", 2) == "blocks.2.mlp.hook_post"
    assert utils.get_act_name("embed") == "hook_embed"
    assert utils.get_act_name("normalized", 1, "ln2") == "blocks.1.ln2.hook_normalized"
    assert utils.get_act_name("scale") == "ln_final.hook_scale"


def test_a_hooked_transformer(hooked: Any, model: Any) -> None:
    text = "The capital of France is"
    tokens = hooked.to_tokens(text)
    bos = hooked.tokenizer.bos_token_id
    assert tokens[0, 0] == bos and hooked.to_tokens(text, prepend_bos=False).shape[1] == tokens.shape[1] - 1
    assert hooked.to_string(tokens[0, 1:]) == text == hooked.to_string(tokens[:, 1:])[0]
    assert "".join(hooked.to_str_tokens(text, prepend_bos=False)) == text
    assert hooked.to_str_tokens(tokens)[0] == hooked.tokenizer.bos_token
    single = hooked.to_str_tokens(text, prepend_bos=False)[1]
    assert hooked.to_single_str_token(hooked.to_single_token(single)) == single
    with pytest.raises(BadArgument, match="tokens"):
        hooked.to_single_token(text)
    with model.trace(tokens):
        ours = model.output.save()
    assert torch.equal(hooked(text), ours) and torch.equal(hooked(tokens), ours)
    assert torch.allclose(hooked.run_with_cache(text)[0], ours, atol=1e-4)


def test_hooks_that_stay(hooked: Any) -> None:
    def double(value: Any, hook: Any) -> Any:
        return value * 2

    plain = hooked(ROW)
    once = hooked.run_with_hooks(ROW, fwd_hooks=[("blocks.0.hook_mlp_out", double)])
    with hooked.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", double)]):
        inside = hooked(ROW)
    hooked.add_hook("blocks.0.hook_mlp_out", double)
    added = hooked(ROW)
    hooked.reset_hooks()
    with pytest.raises(BadArgument, match=r"loss\.backward\(\)"):
        hooked.add_hook("blocks.0.hook_mlp_out", double, "bwd")
    assert torch.equal(inside, once) and torch.equal(added, once) and not torch.equal(once, plain)
    assert torch.equal(hooked(ROW), plain)


def test_figures_and_weights(hooked: Any, model: Any) -> None:
    cfg = hooked.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_vocab, cfg.n_ctx) == (3, 4, 64, 400, 128)
    stock = model._model
    assert torch.equal(hooked.W_U, stock.lm_head.weight.T) and torch.equal(hooked.W_E, stock.transformer.wte.weight)


def test_processed_weights_are_refused() -> None:
    with pytest.raises(BadArgument, match="fold_ln=False"):
        HookedTransformer.from_pretrained("gpt2-small", fold_ln=True)


def test_steps_are_told_apart_once_all_of_them_have_come() -> None:
    kept: Any = SavedList()
    first, second = StepValues(), StepValues()
    for steps in (first, second):
        steps._holder, steps._body = kept, 4
        list.append(kept, steps)
    first._become([np.float32(1), np.float32(3)])
    assert kept == [[1, 3], []]
    second._become([np.float32(2), np.float32(4)])
    assert kept == [1, 2, 3, 4]


def test_patterns_of_transformer_lens_names(model: Any) -> None:
    with model.trace(ROW) as tracer:
        cache = tracer.cache("blocks.*.hook_resid_post", "blocks.1.attn.hook_pattern")
        posts = [layer.resid_post.save() for layer in model.layers]
    assert list(cache) == [
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
        "blocks.2.hook_resid_post",
        "blocks.1.attn.hook_pattern",
    ]
    for value, post in zip(cache.values(), posts, strict=False):
        assert torch.equal(value, post)
