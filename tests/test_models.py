"""The tiny models are what other tests take them for: whole folders of lively models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, TEXT, tiny
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

LINE = TEXT.splitlines()[0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_tiny_model_loads_and_every_part_of_it_matters(arch: str) -> None:
    folder = tiny(arch)
    assert folder.name == f"tiny-{arch}"
    auto = AutoModelForMaskedLM if arch == "bert" else AutoModelForCausalLM
    model = auto.from_pretrained(folder, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer([LINE, LINE], return_tensors="pt").input_ids
    ids[1, 2] += 1
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)

    assert out.logits.isfinite().all()
    assert out.logits.std(-1).min() > 0.1
    assert not torch.allclose(out.logits[0, -1], out.logits[1, -1], atol=1e-3), "no token sees another"
    for before, after in zip(out.hidden_states, out.hidden_states[1:], strict=False):
        assert 0.05 < (after - before).norm() / before.norm() < 50, "a block adds too little or too much"
    if "attentions" in out:
        assert out.attentions[0].std(-1).mean() > 0.02, "attention is uniform"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_tokenizer_file_alone_gives_the_same_ids(arch: str) -> None:
    folder = tiny(arch)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for line in TEXT.splitlines():
        ids = tokenizer(line).input_ids
        assert ids == alone.encode(line).ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == line
        assert len(ids) < len(line.encode()) - 3, "the tokenizer has learned nothing"


def test_the_same_arguments_give_the_same_folder_and_others_another() -> None:
    assert tiny("llama") == tiny("llama")
    wide = tiny("llama", hidden_size=96, dtype="bfloat16")
    assert wide != tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(wide)
    assert model.config.hidden_size == 96
    assert model.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_real_model_knows_a_capital(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
