"""Standard names through a server: the same numbers as the same lines give in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from twins import same

NAME = "tiny-gpt2"
PROMPT = "The capital of France is"


def script(model: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    saved = {}
    names = [name for name in model.manifest.named[model.manifest.blocks[1]] if name not in ("scores", "pattern")]
    with model.trace(PROMPT, **options):
        for name in names:
            saved[name] = getattr(model.layers[1], name).save()
        model.layers[0].resid_mid[:, -1] *= 1.5
        model.layers[1].head_out[:, :, 2] = 0
        model.layers[2].k[:, 1] = model.layers[2].k[:, 0]
        saved["logits"] = model.logits.save()
        saved["lens"] = model.points["blocks.2.attn.hook_pattern"].save()
    return saved


def test_the_same_numbers(place: Any, folders: dict[str, Path]) -> None:
    found = script(place.open(NAME), place.options)
    expected = script(LanguageModel(str(folders[NAME])), {})
    assert found.keys() == expected.keys()
    for name, value in found.items():
        same(value, expected[name])


@pytest.mark.parametrize("name", ["router_logits", "mlp_pre_linear"])
def test_a_refusal_travels(place: Any, name: str) -> None:
    model = place.open(NAME)
    reason = model.manifest.refused[""][name]
    with pytest.raises(AttributeError, match=reason.split(":")[0]), model.trace(PROMPT, **place.options):
        getattr(model.layers[0], name)
