"""What a model takes, from its config alone: against what models of that kind really have, keep and make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from interpose.errors import ConfigError
from interpose.runtime.blocklists import main_list
from interpose.runtime.loading import load
from interpose.runtime.partial_loading import outline
from interpose.runtime.sources import Source, auto_class
from interpose_server.models.dryrun import _caches, dry_run
from interpose_server.models.planning import figures
from interpose_server.models.sizes import Part, Sizes
from interpose_server.models.sizing import estimated, of_config, sizes
from interpose_server.models.spec import ModelSpec
from lora import lora, stock
from models import tiny
from peft import LoraConfig
from published import CONFIGS, PARAMETERS, written
from transformers import AutoConfig, DeepseekV3Config, LlamaConfig, SwinConfig

TRUE = ("Llama-3.1-70B", "Llama-3.1-405B", "Mixtral-8x22B", "DeepSeek-R1")
ARCHITECTURES = ("gpt2", "llama", "gemma3", "mistral", "bloom", "mamba", "mamba2", "mixtral", "qwen2_moe", "falcon")


@cache
def whole(arch: str) -> Any:
    return auto_class(Source.of(tiny(arch)).config()).from_pretrained(tiny(arch))


@cache
def sized(arch: str) -> Sizes:
    return sizes(tiny(arch))


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "bert", "vit", "llava"])
def test_weights_are_those_of_the_loaded_model(arch: str) -> None:
    found, model = sized(arch), whole(arch)
    its = main_list(model)
    assert its is not None and its.path == found.path
    assert found.parameters == sum(param.numel() for param in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    assert found.weights == sum(tensor.nbytes for tensor in tensors)
    for part, path in zip(found.blocks, its.blocks, strict=True):
        block = model.get_submodule(path)
        assert part.weights == sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"targets": ["wte", "c_attn", "c_fc"]}),
    "llama": ("llama", {"targets": ["q_proj", "down_proj", "lm_head", "embed_tokens"], "lora_bias": False}),
    "mixtral": ("mixtral", {}),
    "mamba": ("mamba", {}),
    "dora": ("llama", {"use_dora": True, "targets": ["v_proj", "o_proj", "lm_head"]}),
    "bfloat16": ("llama", {"dtype": "bfloat16"}),
    "patterns": ("gpt2", {"rank_pattern": {"c_fc": 2}, "layers_to_transform": [0, 2], "use_rslora": True}),
    "start": ("llama", {"r": 4, "init_lora_weights": "orthogonal"}),
}
"""Architecture, and what is special of the adapter."""


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_count_as_their_layers_are_kept(kind: str) -> None:
    arch, config = KINDS[kind]
    sources = {"a": lora(arch, **config), "b": lora(arch, 1, dtype=config.get("dtype", "float32"))}
    base = tiny(arch, dtype=config.get("dtype", "float32"))
    loaded = load(base, device="cpu", adapters=sources)
    real = {
        (name, loaded.names[module]): sum(
            held.nbytes for key, held in layer.named_parameters() if not key.startswith("base_layer.")
        )
        for name, adapter in loaded.adapters.items()
        for module, layer in adapter.layers.items()
    }
    found, plain = sizes(base, adapters={name: str(folder) for name, folder in sources.items()}), sizes(base)
    assert found.adapters == sum(real.values()) > 0
    assert (found.weights - plain.weights, found.parameters) == (found.adapters, plain.parameters)
    for index, (part, without) in enumerate(zip(found.blocks, plain.blocks, strict=True)):
        within = f"{found.path}.{index}."
        own = sum(size for (_, path), size in real.items() if path.startswith(within))
        assert part.weights - without.weights == own
        assert part.cache_token == without.cache_token


def test_an_adapter_at_true_size_is_told_by_its_config(tmp_path: Path) -> None:
    """41,943,040 numbers, as is known of rank 16 on all linear layers of Llama-3-8B; kept in float32."""
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    LoraConfig(r=16, target_modules=linear, task_type="CAUSAL_LM").save_pretrained(str(tmp_path))
    base = ModelSpec(name="its", source=str(written("Llama-3.1-8B")))
    found = figures(base.model_copy(update={"adapters": {"a": str(tmp_path)}}))
    assert found.adapters == found.weights - figures(base).weights == 4 * 41_943_040


@pytest.mark.parametrize(
    "odd",
    [{"n_layer": "many"}, {"n_head": 0}, {"n_embd": 0}, {"quantization_config": []}, {"dtype": "float12"}],
)
def test_a_config_that_makes_no_sense_is_told_so(tmp_path: Path, odd: dict[str, Any]) -> None:
    plain = json.loads((tiny("gpt2") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(plain | odd))
    with pytest.raises(ConfigError, match=r"can't be loaded|no model"):
        sizes(tmp_path)


def test_an_adapter_that_was_changed_counts_anew(tmp_path: Path) -> None:
    its = ModelSpec(name="its", source=str(tiny("llama")), adapters={"a": str(tmp_path)})
    found = []
    for rank in (2, 4):
        LoraConfig(r=rank, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
        os.utime(tmp_path / "adapter_config.json", (rank, rank))
        found.append(figures(its).adapters)
    assert found[1] == 2 * found[0] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_forward_with_an_adapter_makes_counts(dtype: str) -> None:
    folder, base = lora("llama", dtype=dtype), tiny("llama", dtype=dtype)
    found, plain = sizes(base, adapters={"a": str(folder)}), sizes(base)
    with_it = stock("llama", folder, dtype=dtype)
    its = main_list(whole("llama"))
    assert its is not None
    real = dry_run(
        with_it.base_model.model, [with_it.base_model.model.get_submodule(path) for path in its.blocks], "cpu"
    )
    for part, without, made in zip(found.blocks, plain.blocks, real.work, strict=True):
        assert without.work_token <= part.work_token
        assert 0.5 * made <= part.work_token <= 2 * made


def test_an_adapter_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="adapter 'a'"):
        sizes(tiny("mamba"), adapters={"a": str(lora("llama"))})
    with pytest.raises(ConfigError, match="adapter 'a': there is no folder"):
        sizes(tiny("llama"), adapters={"a": "./none"})


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("context", [5, 11, 40])
def test_a_cache_is_what_the_library_keeps(arch: str, context: int) -> None:
    """Grouped heads, windows and states included."""
    found, model = sized(arch), whole(arch)
    with torch.no_grad():
        output = model(input_ids=torch.ones(2, context, dtype=torch.long), use_cache=True)
    kept = sum(size for size, _ in _caches(output)[0])
    assert found.measured
    assert kept <= found.cache(2, context) <= kept + 64


def test_a_compressed_cache_is_what_the_library_keeps() -> None:
    """DeepSeek's: the latent and the rotated part, whichever of them the library keeps."""
    config = DeepseekV3Config(
        **{"vocab_size": 200, "hidden_size": 64, "intermediate_size": 112, "moe_intermediate_size": 48},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 6},
        **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24},
        **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    )
    found = of_config(config, "tiny", torch.float32)
    model: Any = auto_class(config).from_config(config)
    with torch.no_grad():
        output = model(input_ids=torch.ones(2, 9, dtype=torch.long), use_cache=True)
    assert found.cache(2, 9) == sum(size for size, _ in _caches(output)[0])


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3", "bert", "mixtral", "qwen2_moe"])
def test_what_a_forward_makes_is_about_what_one_really_makes(arch: str) -> None:
    """The same bookkeeping over a real forward."""
    found, model = sized(arch), whole(arch)
    its = main_list(model)
    assert its is not None
    real = dry_run(model, [model.get_submodule(path) for path in its.blocks], device="cpu")
    for part, made, given in zip(found.blocks, real.work, real.output, strict=True):
        assert part.output_token == given == 64 * 4
        assert 0.5 * made <= part.work_token <= 2 * made


def test_the_workers_own_estimate_is_of_the_same_order() -> None:
    """`worker.measure` tells it from the layouts it measured on the loaded model."""
    from interpose_server.models.sizes import widest
    from interpose_server.worker.measure import estimate

    found = sized("llama")
    token_bytes, _ = estimate(load(tiny("llama")).manifest)
    assert 0.5 < widest([found.outside, *found.blocks]) / token_bytes < 2


@pytest.mark.parametrize("arch", ["gpt2", "llama", "bloom"])
def test_estimates_are_near_where_a_model_needs_data(arch: str) -> None:
    model = whole(arch)
    its = main_list(model)
    assert its is not None
    guessed, found = estimated(model, its), sized(arch)
    for part, work, output, kept in zip(found.blocks, guessed.work, guessed.output, guessed.cache, strict=True):
        assert (output, kept.token) == (part.output_token, part.cache_token)
        assert 0.4 < work / part.work_token < 2.5


def test_what_the_library_cant_make_is_refused() -> None:
    with pytest.raises(ConfigError, match="no model can be made of this config"):
        outline(LlamaConfig(hidden_size=64, num_attention_heads=4, hidden_act="nobody's"))


def test_stages_of_other_widths_are_estimated() -> None:
    model = outline(SwinConfig())
    found = estimated(model, main_list(model))
    assert len(found.work) == 4 and all(found.work) and not found.cache


def test_a_model_that_needs_data_is_estimated() -> None:
    found = sizes(tiny("clip"))
    assert not found.measured and found.weights and all(block.work_token for block in found.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUE)
def test_parameters_at_true_size(name: str) -> None:
    found = figures(ModelSpec(name=name, source=str(written(name))))
    # The biases of DeepSeek's routers, 256 in each of 58 blocks, are buffers in the library.
    buffers = 58 * 256 if name == "DeepSeek-R1" else 0
    assert found.parameters + buffers == PARAMETERS[name]
    assert found.measured and len(found.blocks) == CONFIGS[name]["num_hidden_layers"]


CACHES = {"Llama-3.1-70B": 80 * 4096, "Llama-3.1-405B": 126 * 4096, "Mixtral-8x22B": 56 * 4096}


@pytest.mark.slow
def test_true_sizes_take_little_memory_and_time(tmp_path: Path) -> None:
    """In a process of its own: of 405 billion parameters not one is made."""
    written("Llama-3.1-405B", tmp_path)
    script = (
        "import json, resource, sys, time\n"
        "from interpose_server.models.sizing import sizes\n"
        "before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()\n"
        "found = sizes(sys.argv[1])\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(json.dumps([found.parameters, found.cache(1, 1), grown >> 10, time.process_time() - start]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "Llama-3.1-405B")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    parameters, position, grown_mb, seconds = json.loads(done.stdout)
    assert (parameters, position) == (PARAMETERS["Llama-3.1-405B"], CACHES["Llama-3.1-405B"])
    assert grown_mb < 200 and seconds < 30


def test_quantised_weights_count_as_they_are_kept(tmp_path: Path) -> None:
    config = json.loads((tiny("llama") / "config.json").read_text())
    plain = sizes(tiny("llama"), dtype="bfloat16")
    linear = 4 * 64 * 64 - 2 * 64 * 32 + 3 * 64 * 112
    assert plain.blocks[0].weights == 2 * (linear + 2 * 64)
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = sizes(tmp_path, dtype="bfloat16")
    assert found.quantization == "gptq" and found.outside == plain.outside
    assert found.blocks[0].weights == pytest.approx(linear * 4.25 / 8 + 4 * 64, abs=8)
    chosen = sizes(tiny("llama"), dtype="bfloat16", quantization="fp8")
    assert chosen.blocks[0].weights == linear + 4 * 64
    with pytest.raises(ConfigError, match="no quantization 'int3'"):
        sizes(tiny("llama"), quantization="int3")


def test_a_configs_file_or_a_folder_without_weights_will_do(tmp_path: Path) -> None:
    folder = written("gpt2", tmp_path)
    found = sizes(folder)
    assert found == sizes(folder / "config.json")
    assert (found.model, found.dtype, found.positions) == ("gpt2", "float32", 1024)
    with pytest.raises(ConfigError, match="no folder"):
        sizes(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody's"}))
    with pytest.raises(ConfigError, match="nobody's"):
        sizes(tmp_path)


def test_the_dtype_is_the_saved_one_unless_chosen(tmp_path: Path) -> None:
    """A folder whose config says none is asked for its weights'."""
    folder = tiny("llama", dtype="float16")
    assert (sizes(folder).dtype, sizes(folder, dtype="float32").dtype) == ("float16", "float32")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    assert sizes(tmp_path).dtype == "float32"
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert sizes(tmp_path).dtype == "float16"


def test_a_window_bounds_a_cache() -> None:
    part = Part(0, cache_token=10, cache_row=3, window=11)
    assert [part.cache(2, length) for length in (5, 11, 500)] == [2 * 53, 2 * 113, 2 * 113]


def test_every_published_config_is_one_the_library_knows() -> None:
    assert set(CONFIGS) == set(PARAMETERS)
    for config in CONFIGS.values():
        AutoConfig.for_model(**config)
