"""Adapters on a split model: the numbers, the manifest and the refusals of the whole model with the same ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from interpose import LanguageModel
from interpose.errors import ConfigError, InterposeError, UnknownAdapter
from interpose.graph.manifest import fingerprint
from interpose.runtime import adapters
from interpose.runtime.adapter_files import WEIGHTS
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.loading import load, with_adapters
from interpose.runtime.lora import load as load_lora
from interpose.runtime.partial_loading import outside
from interpose.runtime.split.placeholders import settled
from interpose.runtime.split.shard import Shard
from lora import lora, reconfigured
from models import tiny
from safetensors.torch import load_file, save_file
from sharding import assembled
from test_adapters_apart import Company, forward, generation
from test_random_programs import outcome, same
from transformers import LlamaForCausalLM

ROW = [5, 9, 33, 7, 8]
ROWS = [ROW, [81, 2, 14]]
NAMES = (None, "a", "b")

KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gpt2": ("gpt2", 2, {}),
    "llama": ("llama", 3, {"targets": ["q_proj", "o_proj", "lm_head", "embed_tokens"]}),
    "gemma3": ("gemma3", 3, {}),
    "mixtral": ("mixtral", 2, {}),
    "mamba": ("mamba", 3, {}),
    "dora": ("llama", 2, {"use_dora": True, "targets": ["v_proj", "o_proj", "lm_head"]}),
    "bfloat16": ("llama", 3, {"dtype": "bfloat16"}),
    "patterns": ("gpt2", 3, {"rank_pattern": {"c_fc": 2}, "layers_to_transform": [0, 2], "use_rslora": True}),
}
"""Architecture, shards, and what is special of the adapter."""

BLOCKS = {"gpt2": "transformer.h", "mamba": "backbone.layers"}
OUT = {"gpt2": "attn.c_proj", "mamba": "mixer.in_proj"}
HEAD = "lm_head"


@cache
def sources(kind: str) -> dict[str, Path]:
    arch, _, config = KINDS[kind]
    return {"a": lora(arch, **config), "b": lora(arch, 1, dtype=config.get("dtype", "float32"))}


@cache
def folder(kind: str) -> Path:
    return tiny(KINDS[kind][0], dtype=KINDS[kind][2].get("dtype", "float32"))


@cache
def whole(kind: str) -> Engine:
    return Engine(load(folder(kind), adapters=sources(kind), device="cpu"))


@cache
def shards(kind: str) -> Engine:
    return Engine(assembled(folder(kind), KINDS[kind][1], sources(kind)))


@cache
def language(kind: str, *, split: bool) -> LanguageModel:
    model = LanguageModel(str(folder(kind)), adapters=sources(kind))
    if split:
        model._access.local.engine = shards(kind)
    return model


def within(kind: str, block: int, path: str = "") -> str:
    return f"{BLOCKS.get(KINDS[kind][0], 'model.layers')}.{block}{path and '.' + path}"


def at(model: LanguageModel, path: str) -> Any:
    found: Any = model
    for name in path.split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    return found


@pytest.fixture(autouse=True)
def nothing_stays_chosen() -> Iterator[None]:
    chosen: list[str | None] = []
    visit = Shard.visit

    def watched(self: Shard, *args: Any) -> Any:
        try:
            return visit(self, *args)
        finally:
            chosen.append(adapters.choice())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shard, "visit", watched)
        yield
    assert set(chosen) <= {None} and adapters.choice() is None


# -- what is loaded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_is_the_whole_models(kind: str) -> None:
    found, expected = shards(kind).manifest, whole(kind).manifest
    assert found.adapters == expected.adapters
    assert fingerprint(found) == fingerprint(replace(expected, model=found.model))


def test_each_process_has_the_layers_of_its_own_modules() -> None:
    loaded = shards("llama").loaded
    assert loaded.split is not None
    route: Any = loaded.split.route
    held = {0: [loaded.names[module] for module in loaded.adapters["a"].layers]}
    for site, stop in route._stops.items():
        part = stop.station
        paths = {module: path for path, module in part._model.named_modules()}
        held[site] = [paths[module] for module in part._shard.adapters["a"].layers]
        assert set(held[site]) == {within("llama", site - 1, f"self_attn.{name}") for name in ("q_proj", "o_proj")}
        assert not any(
            tensor.is_meta
            for layer in part._shard.adapters["a"].layers.values()
            for tensor in (*layer.parameters(), *layer.base_layer.parameters())
        )
    assert set(held[0]) == {"model.embed_tokens", HEAD}
    assert not any("lora" in name for name, _ in loaded.model.named_modules())
    assert sum(map(len, held.values())) == loaded.manifest.adapters["a"].modules


def test_no_process_has_more_of_an_adapter_than_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources("llama")["a"]
    model = LlamaForCausalLM.from_pretrained(tiny("llama")).eval()
    others = ["model.layers.1", "model.layers.2"]
    for path in others:
        model.get_submodule(path).to("meta")
    held: list[int] = []
    filled = peft.set_peft_model_state_dict

    def watched(wrapped: Any, *args: Any, **kwargs: Any) -> Any:
        told = filled(wrapped, *args, **kwargs)
        weights = (weight for name, weight in wrapped.named_parameters() if "lora_" in name)
        held.extend(weight.nbytes for weight in weights if not weight.is_meta)
        return told

    monkeypatch.setattr(peft, "set_peft_model_state_dict", watched)
    found = load_lora(model, "a", source, keep=outside(others))
    own = (
        weight for layer in found.layers.values() for name, weight in layer.named_parameters() if "lora_" in name
    )
    assert sorted(held) == sorted(weight.nbytes for weight in own)
    assert len(found.layers) == 4 < found.info.modules
    assert str(source / WEIGHTS) not in Path("/proc/self/maps").read_text(), "nor does it hold the file"


def still(tmp_path: Path, path: str) -> Path:
    """An adapter with which one module makes nothing but zeros."""
    made = tmp_path / "still"
    shutil.copytree(lora("llama", use_dora=True, targets=["down_proj", "lm_head"]), made)
    weights = load_file(made / WEIGHTS)
    (key,) = (name for name in weights if "magnitude" in name and f".{path}." in name)
    save_file({**weights, key: torch.zeros_like(weights[key])}, made / WEIGHTS)
    return made


@pytest.mark.parametrize("path", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"])
def test_points_that_do_not_hold_with_an_adapter_are_the_whole_models(tmp_path: Path, path: str) -> None:
    source = {"a": still(tmp_path, path)}
    expected = load(tiny("llama"), adapters=source, device="cpu").manifest.adapters
    assert expected["a"].refused
    assert assembled(tiny("llama"), 3, source).manifest.adapters == expected


# -- numbers ----------------------------------------------------------------------------------------------------


def read(model: LanguageModel, kind: str, name: str | None) -> dict[str, Any]:
    """Values of every site, one of them changed, and weights."""
    arch = KINDS[kind][0]
    out = OUT.get(arch, "self_attn.o_proj")
    with model.trace(ROWS, adapter=name):
        at(model, within(kind, 0)).output[:, -1] *= 2
        made = at(model, within(kind, 2, out)).output.save()
        hidden = at(model, within(kind, 1)).output.save()
        weight = at(model, within(kind, 2, out)).weight.save()
        logits = at(model, HEAD).output.save()
    with model.trace(ROW, adapter=name):
        product = (at(model, within(kind, 0, out)).weight.sum() + at(model, HEAD).weight.sum()).save()
    return {"made": made, "hidden": hidden, "weight": weight, "logits": logits, "product": product}


def gradients(model: LanguageModel, kind: str, name: str | None) -> dict[str, Any]:
    with model.trace(ROW, adapter=name):
        first, second = (at(model, within(kind, block)).output for block in (0, 1))
        first.retain_grad()
        second *= 1.5
        second.retain_grad()
        logits = at(model, HEAD).output
        logits[:, -1].float().logsumexp(-1).sum().backward()
        found = first.grad.save(), second.grad.save()
    return {"first": found[0], "second": found[1]}


def generation_of(model: LanguageModel, kind: str, name: str | None) -> dict[str, Any]:
    with model.generate(ROWS, max_new_tokens=5, adapter=name) as tracer:
        with tracer.all():
            at(model, within(kind, 1)).output[:, -1] *= 1.1
            steps = at(model, within(kind, 2)).output[:, -1].save()
        ids = tracer.result.save()
    return {"steps": steps, "ids": ids}


def session(model: LanguageModel, kind: str, name: str | None) -> dict[str, Any]:
    """Runs with different adapters, with values from one to the other."""
    with model.session(adapter=name):
        with model.trace(ROW):
            hidden = at(model, within(kind, 1)).output
            first = at(model, HEAD).output.save()
        with model.trace(ROW, adapter="b"):
            apart = (at(model, within(kind, 1)).output - hidden).save()
            at(model, within(kind, 1)).output[:] = hidden
            second = at(model, HEAD).output.save()
        with model.generate(ROW, max_new_tokens=3, adapter="a") as tracer:
            ids = tracer.result.save()
    return {"first": first, "apart": apart, "second": second, "ids": ids}


@pytest.mark.parametrize("way", [read, gradients, generation_of, session])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_the_whole_models_bit_by_bit(kind: str, way: Callable[..., dict[str, Any]]) -> None:
    seen = []
    for name in NAMES:
        expected, found = (way(language(kind, split=split), kind, name) for split in (False, True))
        for key, value in expected.items():
            _same(found[key], value, f"{name}: {key}")
        seen.append(next(iter(expected.values())))
    assert not torch.equal(_first(seen[0]), _first(seen[1])), "the adapter counts"


def test_what_is_looked_at_later_is_made_with_the_adapter_it_was_asked_for_with() -> None:
    loaded, hidden = shards("llama").loaded, torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    blocks = [loaded.modules[within("llama", block)] for block in (0, 1)]
    turns = loaded.model.model.rotary_emb(hidden, torch.arange(3)[None])

    def made(name: str | None) -> torch.Tensor:
        value = hidden
        with adapters.chosen(loaded.adapters, name):
            for block in blocks:
                value = block(value, position_embeddings=turns)
        return value

    with torch.no_grad():
        one, other = made("a"), made(None)
        assert not torch.equal(settled(one), settled(other))
        with adapters.chosen(loaded.adapters, "a"):
            assert torch.equal(settled(made("a")), settled(one))
            assert torch.equal(settled(made(None)), settled(other))


def _first(value: Any) -> torch.Tensor:
    found: torch.Tensor = value[0] if isinstance(value, (list, tuple)) else value
    return found


def _same(found: Any, expected: Any, what: str) -> None:
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), what
        for one, other in zip(found, expected, strict=True):
            _same(one, other, what)
    else:
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=0, equal_nan=True, msg=what)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "dora"])
def test_modules_called_on_values_of_other_sites(kind: str) -> None:
    """From home, from another shard, in the middle of a block, and with gradients, which run it once more."""
    out = OUT.get(KINDS[kind][0], "self_attn.o_proj")

    def called(model: LanguageModel, name: str | None) -> list[Any]:
        with model.trace(ROW, adapter=name):
            module = at(model, within(kind, 0, out))
            given = module.input
            early = at(model, HEAD)(at(model, within(kind, 0)).output).save()
            late = module(at(model, within(kind, 2)).output).save()
        with model.trace(ROW, adapter=name):
            hidden = at(model, within(kind, 2)).output
            hidden.retain_grad()
            at(model, within(kind, 0, out))(hidden).square().sum().backward()
            grad = hidden.grad.save()
        with model.trace(ROW, adapter=name):
            inner = at(model, within(kind, 1, out)).output
            size = at(model, HEAD)(inner).amax(-1, keepdim=True)
            at(model, within(kind, 1)).output[:] += at(model, within(kind, 0, out))(inner) * size
            steered = at(model, HEAD).output.save()
        del given
        return [early, late, grad, steered]

    for name in NAMES:
        for found, expected in zip(
            *(called(language(kind, split=split), name) for split in (True, False)), strict=True
        ):
            # A value that travelled lies otherwise in memory.
            torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["a", "b"])
def test_random_programs(name: str) -> None:
    models = []
    for split in (True, False):
        with language("gpt2", split=split).edit(adapter=name) as edited:
            pass
        models.append(edited)
    ran = 0
    for seed in range(40):
        found, expected = (outcome(model, seed) for model in models)
        if isinstance(expected, InterposeError):
            assert type(found) is type(expected), (seed, found, expected)
        else:
            assert not isinstance(found, InterposeError), (seed, found)
            same(seed, found, expected)
            plain = outcome(language("gpt2", split=False), seed)
            assert not isinstance(plain, InterposeError)
            ran += not torch.equal(plain[-1], expected[-1])
    assert ran > 20, "the adapter counts"


# -- beside one another -----------------------------------------------------------------------------------------


def on(engine: Engine, make: Callable[[], Sequence[EngineJob]]) -> list[dict[int, Any]]:
    jobs = make()
    assert engine.run(jobs) == [None] * len(jobs)
    return [job.sink.values for job in jobs]  # type: ignore[attr-defined]


def test_jobs_of_a_batch_have_each_its_own() -> None:
    rows = [(5, 9, 33), (81, 2, 14, 7, 60), (4, 4)]

    def make() -> list[EngineJob]:
        return [forward(name, row) for row in rows for name in NAMES] + [generation(name, 4) for name in NAMES]

    for found, expected in zip(on(shards("llama"), make), on(whole("llama"), make), strict=True):
        for node, value in expected.items():
            torch.testing.assert_close(found[node], value, rtol=0, atol=1e-5 if node == 4 else 0.0)


def test_lanes_of_one_engine_choose_apart() -> None:
    alone = [on(shards("llama"), lambda name=name: [forward(name)])[0] for name in NAMES]  # type: ignore[misc]
    with ThreadPoolExecutor(3) as lanes:
        for _ in range(5):
            found = lanes.map(lambda name: on(shards("llama"), lambda: [forward(name)])[0], NAMES)
            for one, expected in zip(found, alone, strict=True):
                assert all(torch.equal(one[node], value) for node, value in expected.items())


@pytest.mark.parametrize("host", NAMES)
def test_generations_are_joined_by_their_own_and_left(host: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(engine: Engine) -> list[tuple[Any, InterposeError | None]]:
        begun = [generation(host, 12), generation(host, 3, (7, 7))]
        joins = [generation(host, 5, (81, 2, 14)), *(generation(name, 4) for name in NAMES if name != host)]
        aside = [forward(name) for name in NAMES] + [generation(name, 3) for name in NAMES]
        monkeypatch.setattr("test_adapters_apart.engine", lambda: engine)
        company = Company({3: joins}, {2: aside[:3], 4: aside[3:]})
        engine.host(begun, company)
        jobs = [*begun, *joins, *aside]
        told = {id(job): error for job, error in company.ends}
        return [(job.sink.values, told[id(job)]) for job in jobs]  # type: ignore[attr-defined]

    for (found, error), (expected, _) in zip(ended(shards("llama")), ended(whole("llama")), strict=True):
        assert error is None and found.keys() == expected.keys()
        for node, value in expected.items():
            torch.testing.assert_close(found[node], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("raised", [RuntimeError("broken"), torch.OutOfMemoryError("full")])
def test_a_failure_on_a_shard_leaves_nothing_switched(raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = shards("llama")
    (expected,) = on(engine, lambda: [forward(None)])
    route: Any = engine.loaded.split.route  # type: ignore[union-attr]
    layer = next(iter(route._stops[2].station._shard.adapters["a"].layers.values()))

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", broken)
        jobs = [forward(name) for name in NAMES]
        assert [error is None for error in engine.run(jobs)] == [True, False, True]
        (error,) = engine.run([generation("a", 3)])
        assert error is not None
        (plain,) = on(engine, lambda: [forward(None)])
    assert torch.equal(plain[3], expected[3]) and torch.equal(plain[4], expected[4])
    for split, whole_ in zip(
        on(engine, lambda: [forward("a")]), on(whole("llama"), lambda: [forward("a")]), strict=True
    ):
        assert torch.equal(split[3], whole_[3])


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"r": 4},
        {"target_modules": ["nowhere"]},
        {"target_modules": ["q_proj"]},
    ],
)
def test_what_does_not_fit_is_refused_with_the_same_reason(tmp_path: Path, settings: dict[str, Any]) -> None:
    source = {"c": reconfigured("llama", tmp_path / "changed", **settings)}
    reasons = []
    for loading in (lambda: load(tiny("llama"), adapters=source), lambda: assembled(tiny("llama"), 2, source)):
        with pytest.raises(ConfigError) as refused:
            loading()
        reasons.append(refused.value.message)
    assert reasons[0] == reasons[1]


def test_parts_that_read_different_weights_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where each node has a folder of its own under the same name."""
    from interpose_server.shards.loaded_shard import LoadedShard

    adapted = LoadedShard._adapted

    def other(self: LoadedShard, request: Any) -> Any:
        return adapted(self, {**request, "adapters": {"a": str(lora("llama", self._site))}})

    monkeypatch.setattr(LoadedShard, "_adapted", other)
    with pytest.raises(ConfigError, match="adapter 'a' isn't the same"):
        assembled(tiny("llama"), 2, {"a": lora("llama", 1)})


def test_later_ones_and_unknown_ones_are_refused() -> None:
    loaded = shards("llama").loaded
    with pytest.raises(ConfigError, match="its adapters are loaded when it is"):
        with_adapters(loaded, {"c": lora("llama")})
    with pytest.raises(UnknownAdapter, match="it has a, b"):
        language("llama", split=True).trace(ROW, adapter="c")
