"""Loading parts of models: bitwise what the library's own loading gives, and no byte of anything else."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from interpose.errors import ConfigError, ModelUnavailable
from interpose.runtime import quantized
from interpose.runtime.blocklists import block_lists, main_list
from interpose.runtime.loading import load
from interpose.runtime.partial_loading import Keep, inside, load_part, outline, outside
from interpose.runtime.sources import Source, auto_class
from models import liven, tiny
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, PreTrainedModel

ARCHITECTURES = [
    *(
        "gpt2",
        "llama",
        "gemma3",
        "mixtral",
        "mamba",
        "bert",
        "bert_base",
        "vit",
        "vit_classes",
        "qwen2_moe",
        "bloom",
    ),
    *("mpt", "llava"),
]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def whole(folder: Path, **options: Any) -> PreTrainedModel:
    config = Source.of(folder).config()
    model: PreTrainedModel = auto_class(config).from_pretrained(folder, config=config, **options)
    return model


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def check(folder: Path, keep: Keep, expected: nn.Module) -> PreTrainedModel:
    """Load a part: what is kept is the expected model's, all else is on meta with the same shapes and dtypes."""
    part = load_part(folder, keep)
    theirs, ours = tensors(expected), tensors(part)
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype)
        assert tensor.is_meta or same(tensor, theirs[name]), name
        assert not tensor.is_meta or not keep(name), name
    return part


def there(model: nn.Module) -> set[str]:
    return {name for name, tensor in tensors(model).items() if not tensor.is_meta}


def in_files(folder: Path, target: Path, size: str) -> Path:
    """The same model, saved in several files."""
    whole(folder).save_pretrained(target, max_shard_size=size)
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DeepseekV3Config(
        **{"vocab_size": 200, "hidden_size": 64, "intermediate_size": 112, "moe_intermediate_size": 48},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 6},
        **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24},
        **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
        max_position_embeddings=128,
    )
    model = DeepseekV3ForCausalLM(config)
    liven(model)
    folder = tmp_path_factory.mktemp("deepseek")
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("files", ["one", "several"])
def test_parts_together_are_the_whole(arch: str, files: str, tmp_path: Path) -> None:
    folder = tiny(arch) if files == "one" else in_files(tiny(arch), tmp_path, "60KB")
    _check_parts(folder)


def test_experts_fused_by_the_library_come_whole(deepseek: Path) -> None:
    _check_parts(deepseek)


def _check_parts(folder: Path) -> None:
    expected = whole(folder)
    lists = block_lists(outline(Source.of(folder).config()))
    found = there(check(folder, outside([its.path for its in lists]), expected))
    assert not any(name.startswith(its.path) for name in found for its in lists)
    for its in lists:
        for block in its.blocks:
            part = there(check(folder, inside([block]), expected))
            assert part and all(name.startswith(f"{block}.") for name in part)
            found |= part
    assert found == set(tensors(expected))


@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
@pytest.mark.parametrize("end", ["get_input_embeddings", "get_output_embeddings"])
def test_a_tied_weight_is_there_at_both_ends(arch: str, end: str) -> None:
    folder = tiny(arch)
    expected = whole(folder)
    module = getattr(expected, end)()
    path = next(path for path, other in expected.named_modules() if other is module)
    part = check(folder, inside([path]), expected)
    assert part.get_output_embeddings().weight is part.get_input_embeddings().weight
    assert same(part.get_output_embeddings().weight, expected.get_output_embeddings().weight)


def test_a_part_computes_as_the_whole_does() -> None:
    folder = tiny("llama")
    expected = whole(folder)
    block = main_list(expected)
    assert block is not None and block.path == "model.layers"
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    ropes = expected.model.rotary_emb(hidden, torch.arange(5)[None])
    part = load_part(folder, inside([block.blocks[1]]))
    with torch.no_grad():
        one, other = (model.model.layers[1](hidden, position_embeddings=ropes) for model in (part, expected))
    assert same(one, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_dtypes_are_as_the_library_has_them(dtype: str, tmp_path: Path) -> None:
    folder = tiny("mixtral", dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    for named in (config, {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}):
        target = tmp_path / str(len(named))
        target.mkdir()
        (target / "config.json").write_text(json.dumps(named))
        (target / "model.safetensors").symlink_to(folder / "model.safetensors")
        expected = whole(target, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
        part = load_part(target, inside(["model.layers.1"]), dtype=dtype)
        theirs = tensors(expected)
        assert there(part) and all(same(tensors(part)[name], theirs[name]) for name in there(part))


@pytest.mark.parametrize(("arch", "cls"), [("bert", "BertModel"), ("bert_base", "BertForMaskedLM")])
def test_a_prefix_is_added_or_taken_away_as_the_library_does(arch: str, cls: str, tmp_path: Path) -> None:
    """A file of a headless model for one with a head, and the other way round."""
    folder = tiny(arch)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [cls]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    expected = whole(tmp_path)
    its = main_list(expected)
    assert its is not None
    assert there(check(tmp_path, inside([its.path]), expected))


def test_weights_that_a_file_lacks_are_named(tmp_path: Path) -> None:
    folder = tiny("bert_base")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no weights for cls\.predictions"):
        load_part(tmp_path, inside(["cls"]))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    model = whole(tiny("llama"))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no weights in safetensors"):
        load_part(tmp_path, inside(["model.layers.0"]))


def test_what_isnt_there_is_told() -> None:
    with pytest.raises(ConfigError, match="no folder"):
        load_part("./nowhere", inside([]))
    with pytest.raises(ConfigError, match="no dtype"):
        load_part(tiny("llama"), inside([]), dtype="int3")
    with pytest.raises(ModelUnavailable):
        load_part("nobody/nothing", inside([]), local_files_only=True)


def test_only_files_of_the_part_are_opened(tmp_path: Path) -> None:
    folder = in_files(tiny("llama"), tmp_path, "60KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if name.startswith("model.layers.1.")}
    for file in set(index.values()) - needed:
        (folder / file).unlink()
    assert there(load_part(folder, inside(["model.layers.1"])))


def test_from_the_hubs_cache_only_the_parts_files_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a node has it that has fetched its part: of the other files there is nothing."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--org--tiny" / "snapshots" / commit
    in_files(tiny("llama"), folder, "60KB")
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text(commit)
    expected = whole(tiny("llama"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if name.startswith("model.layers.1.")}
    for file in set(index.values()) - needed:
        (folder / file).unlink()
    part = load_part("org/tiny", inside(["model.layers.1"]), local_files_only=True)
    assert there(part) and all(same(tensors(part)[name], tensors(expected)[name]) for name in there(part))
    with pytest.raises(ModelUnavailable, match="org/tiny can't be loaded") as info:
        load_part("org/tiny", inside(["model.layers.0"]), local_files_only=True)
    assert info.value.details == {"reason": "network"}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ModelUnavailable, match="no weights of org/tiny are kept on this machine"):
        load_part("org/tiny", inside(["model.layers.1"]), local_files_only=True)


def test_a_quantised_model_that_this_device_cant_run_is_refused(tmp_path: Path) -> None:
    folder = tiny("llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_part(tmp_path, inside(["model.layers.0"]), device="cpu")


def test_a_quantisation_that_cant_be_had_is_refused() -> None:
    for name, text in [("int3", "no quantization 'int3'; there are"), ("fp8", "FP8 quantization")]:
        if name == "fp8" and torch.cuda.is_available():
            continue
        with pytest.raises(ConfigError, match=text):
            load_part(tiny("llama"), inside(["model.layers.0"]), device="cpu", quantization=name)
        with pytest.raises(ConfigError, match=text):
            load(tiny("llama"), device="cpu", quantization=name)


@pytest.mark.parametrize("scheme", ["bitsandbytes_8bit", "bitsandbytes_4bit"])
def test_a_part_is_quantised_as_the_whole_is(scheme: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ConfigError, match="pip install"):
            load_part(tiny("llama"), inside(["model.layers.1"]), device="cpu", quantization=scheme)
        return
    expected = dict(whole(tiny("llama"), **quantized.scheme(scheme), device_map={"": "cpu"}).named_parameters())
    for keep in (inside(["model.layers.1"]), outside(["model.layers"])):
        for name, param in load_part(tiny("llama"), keep, device="cpu", quantization=scheme).named_parameters():
            assert param.is_meta is not keep(name)
            assert param.is_meta or same(param, expected[name])


@pytest.mark.parametrize(
    ("arch", "paths"),
    [
        ("gpt2", {"transformer.h": 3}),
        ("bert", {"bert.encoder.layer": 3}),
        ("vit", {"layers": 2}),
        ("mamba", {"backbone.layers": 3}),
        ("qwen2_moe", {"model.layers": 3}),
        ("llava", {"model.vision_tower.encoder.layers": 2, "model.language_model.layers": 3}),
        ("clip", {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 2}),
    ],
)
def test_lists_of_blocks_are_told_from_the_config(arch: str, paths: dict[str, int]) -> None:
    model = outline(Source.of(tiny(arch)).config())
    assert {its.path: len(its) for its in block_lists(model)} == paths
    assert all(tensor.is_meta for tensor in tensors(model).values())


MEMORY_BEYOND = 300 << 20
"""Of address space, for threads' stacks and arenas; what is resident beyond the part stays under a third of it."""


@pytest.fixture
def gigabyte(tmp_path: Path) -> Iterator[Path]:
    """A llama of 16 blocks of 67 MB, a file for every other block; gone after the test."""
    _gigabyte(tmp_path)
    yield tmp_path
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()


def _gigabyte(folder: Path) -> None:
    config = LlamaConfig(
        **{"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16},
        **{"num_attention_heads": 8, "num_key_value_heads": 8, "architectures": ["LlamaForCausalLM"]},
    )
    config.save_pretrained(folder)
    shapes = {name: param.shape for name, param in outline(config).named_parameters()}
    noise = torch.randn(4096 * 1024, generator=torch.Generator().manual_seed(0))
    files: dict[str, dict[str, Tensor]] = {}
    for name, shape in shapes.items():
        file = f"model-{int(name.split('.')[2]) // 2 if '.layers.' in name else 'ends'}.safetensors"
        files.setdefault(file, {})[name] = noise[: shape.numel()].view(shape).clone()
    for file, content in files.items():
        save_file(content, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, content in files.items() for name in content}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's figures are read from /proc")
def test_a_process_takes_the_memory_of_its_part(gigabyte: Path) -> None:
    """A model of 1 GB in four processes, each limited to its part and a little: none may hold the whole."""
    script = Path(__file__).with_name("part_processes.py")
    command = [sys.executable, str(script), str(gigabyte), "4", str(MEMORY_BEYOND)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    *parts, all_of_it = [json.loads(line) for line in found.stdout.splitlines()]
    print(*parts, all_of_it, sep="\n")
    assert len(parts) == 4
    for part in parts:
        assert part["real"] == part["part"] > 260_000_000 and part["finite"]
        assert part["peak"] < part["part"] + MEMORY_BEYOND // 3
    assert "memory" in all_of_it["error"].lower()


@pytest.mark.slow
def test_the_real_models_parts_are_the_whole(smollm2: Path) -> None:
    _check_parts(smollm2)
