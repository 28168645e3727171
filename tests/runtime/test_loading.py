"""Loading: names, devices, dtypes, tokenizers, revisions, and clear words where it can't be done."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.errors import ConfigError, ModelUnavailable
from interpose.runtime import sources
from interpose.runtime.loading import load, wrap
from models import ARCHITECTURES, tiny
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ("The capital of France is", " Süße 你好", "")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_file_handed_out_tokenizes_as_the_library_does(arch: str) -> None:
    loaded = load(tiny(arch))
    assert loaded.tokenizer_bytes is not None
    assert loaded.manifest.tokenizer == hashlib.sha256(loaded.tokenizer_bytes).hexdigest()
    ours = Tokenizer.from_str(loaded.tokenizer_bytes.decode())
    theirs = AutoTokenizer.from_pretrained(tiny(arch))
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids
    config = loaded.manifest.tokenizer_config
    assert config.get("bos_token_id") == theirs.bos_token_id
    assert config["add_bos_token"] == (arch in ("llama", "mistral", "mixtral", "gemma2", "gemma3", "opt"))


def test_what_loaded_holds() -> None:
    loaded = load(tiny("llama"), device="cpu", dtype="bfloat16", name="org/llama")
    assert loaded.manifest.model == "org/llama"
    assert loaded.manifest.dtype == "bfloat16"
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    assert not loaded.model.training
    assert not any(param.requires_grad for param in loaded.model.parameters())
    assert list(loaded.modules) == list(loaded.manifest.modules)
    assert all(loaded.modules[path] is module for module, path in loaded.names.items())
    assert loaded.manifest.positions == 128 and loaded.manifest.vocab == 400
    json.dumps([dict(loaded.manifest.config), dict(loaded.manifest.tokenizer_config)])


def test_a_folder_is_served_under_its_base_name() -> None:
    assert load(tiny("gpt2")).manifest.model == "tiny-gpt2"
    assert load(str(tiny("gpt2"))).manifest.model == "tiny-gpt2"


def test_a_live_model_is_as_if_loaded() -> None:
    live = wrap(AutoModelForCausalLM.from_pretrained(tiny("gpt2")), "mine")
    saved = load(tiny("gpt2"))
    assert live.manifest.modules == saved.manifest.modules
    assert live.manifest.revision == saved.manifest.revision
    assert live.tokenizer_bytes is None and live.manifest.tokenizer is None
    assert wrap(live.model, "mine").manifest == live.manifest


@torch.no_grad()
def test_the_revision_follows_weights_config_and_dtype() -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    first = wrap(model, "one").manifest.revision
    model.transformer.wte.weight[3, 5] += 0.01
    edited = wrap(model, "one").manifest.revision
    others = [load(tiny("gpt2"), dtype="bfloat16"), load(tiny("gpt2", layer_norm_epsilon=1e-4))]
    revisions = {first, edited, *(other.manifest.revision for other in others)}
    assert len(revisions) == 4
    assert load(tiny("gpt2")).manifest.revision == first


@pytest.mark.parametrize("source", ["/no/such/folder", "./model", "a/b/c", Path("model")])
def test_a_missing_folder(source: str | Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        load(source)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    shutil.copy(tiny("gpt2") / "config.json", tmp_path)
    with pytest.raises(ModelUnavailable, match="can't be loaded"):
        load(tmp_path)


def test_a_hub_model_that_is_not_there() -> None:
    with pytest.raises(ModelUnavailable, match="Check the name"):
        load("interpose-tests/nothing-of-this-name", local_files_only=True)


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config"}, "architectures": ["Homemade"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(ConfigError, match="can't be loaded"):
        load(tmp_path)


def test_devices_and_dtypes_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="no dtype 'float12'"):
        load(tiny("gpt2"), dtype="float12")
    with pytest.raises(ConfigError, match="device 'abacus'"):
        load(tiny("gpt2"), device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device 'cuda'"):
            load(tiny("gpt2"), device="cuda")


def test_a_model_spread_over_devices() -> None:
    assert load(tiny("llama"), device="auto").manifest.attention == "interpose"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model(smollm2: Path, dtype: str) -> None:
    loaded = load(smollm2, dtype=dtype)
    found = loaded.manifest
    assert (len(found.blocks), found.vocab, found.attention) == (30, 49152, "interpose")
    assert found.row_independent, found.row_note
    assert loaded.tokenizer_bytes is not None
    ids = Tokenizer.from_str(loaded.tokenizer_bytes.decode()).encode("The capital of France is").ids
    with torch.no_grad():
        best = loaded.model(torch.tensor([ids])).logits[0, -1].argmax()
    assert AutoTokenizer.from_pretrained(smollm2).decode(best) == " Paris"


def test_a_name_that_is_nothing_here_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hub can't be asked, and where it has no such model: no folder, perhaps a server's."""
    for name in ("INTERPOSE_HOST", "NDIF_HOST"):
        monkeypatch.delenv(name, raising=False)
    began = time.monotonic()
    with pytest.raises(ModelUnavailable, match=r"no folder 'SmolLM2-135M-Chat' here.*INTERPOSE_HOST.*remote=True"):
        LanguageModel("SmolLM2-135M-Chat").dispatch()
    assert time.monotonic() - began < 30

    def away(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no such host")

    monkeypatch.setattr(sources.HfApi, "model_info", away)
    with pytest.raises(ModelUnavailable, match=r"the hub \(.*\) can't be asked for it: no such host"):
        load("org/name")
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda *args, **kwargs: "kept")
    assert sources.Source.of("org/name").hub["local_files_only"] is True
    assert sources.Source.of("org/name", "v1").hub["revision"] == "v1"
