"""Models some of whose weights lie on disk until their module runs: the numbers of the model that has them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from interpose import LanguageModel
from interpose.runtime.blocklists import main_list
from interpose.runtime.offloaded import parameter, present
from models import ARCHITECTURES, tiny

ARCHS = ["gpt2", "llama", "mixtral", "bloom"]


def whole(arch: str) -> Any:
    return getattr(transformers, ARCHITECTURES[arch][0]).from_pretrained(tiny(arch)).eval()


def offloaded(arch: str, folder: Path) -> Any:
    """All blocks but the first on disk, and the norm after them."""
    model = whole(arch)
    found = main_list(model)
    assert found is not None
    base = found.path.rpartition(".")[0]
    placed = {name: "cpu" for name, _ in model.named_children() if name != base.partition(".")[0]}
    for name, _ in model.get_submodule(base).named_children():
        placed[f"{base}.{name}"] = "disk" if name in ("norm", "ln_f", "final_layer_norm") else "cpu"
    del placed[found.path]
    placed |= {path: "disk" if index else "cpu" for index, path in enumerate(found.blocks)}
    return type(model).from_pretrained(tiny(arch), device_map=placed, offload_folder=folder).eval()


def blocks(model: LanguageModel, arch: str) -> list[Any]:
    found = main_list(whole(arch))
    assert found is not None
    module: Any = model
    for part in found.path.split("."):
        module = getattr(module, part)
    return [*module]


def asked(model: LanguageModel, arch: str) -> list[torch.Tensor]:
    """Everything that touches a weight."""
    last, found = blocks(model, arch)[-1], []
    norm = {"gpt2": "transformer.ln_f", "bloom": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm"}
    final: Any = model
    for part in norm.get(arch, "model.norm").split("."):
        final = getattr(final, part)
    with model.trace([5, 9, 33, 7, 8]):
        hidden = blocks(model, arch)[1].output
        hidden[:, -1] *= 1.5
        lens = final(hidden)
        found += [final.weight.save(), lens.save(), hidden.save(), (lens @ final.weight).save()]
        found += [last.head_out.save(), model.output.save()]
    with model.trace([5, 9, 33, 7]):
        watched = blocks(model, arch)[0].output
        later = last.output
        with model.output.logits[:, -1].sum().backward():
            found += [later.grad.save(), watched.grad.save()]
    with model.generate([5, 9, 33], max_new_tokens=4) as tracer:
        found.append(tracer.result.save())
    return [each.value if hasattr(each, "value") else each for each in found]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_manifest_and_every_number_are_the_whole_models(arch: str, tmp_path: Path) -> None:
    one, other = LanguageModel(whole(arch)), LanguageModel(offloaded(arch, tmp_path))
    manifests = [model._access.local.engine.manifest for model in (one, other)]
    assert manifests[0] == manifests[1]
    loaded = other._access.local.engine.loaded
    assert any(param.is_meta for param in loaded.model.parameters())
    for expected, found in zip(asked(one, arch), asked(other, arch), strict=True):
        assert torch.equal(torch.as_tensor(expected), torch.as_tensor(found))
    assert any(param.is_meta for param in loaded.model.parameters()), "weights go back after every run"


def test_a_weight_is_here_as_long_as_it_is_needed(tmp_path: Path) -> None:
    model, stock = offloaded("llama", tmp_path), whole("llama")
    module, same = (each.model.layers[2].mlp.up_proj for each in (model, stock))
    assert module.weight.is_meta
    with present(module):
        assert torch.equal(module.weight, same.weight)
    assert module.weight.is_meta
    assert torch.equal(parameter(module, "weight"), same.weight)
    assert parameter(same, "weight").data_ptr() == same.weight.data_ptr()
    with pytest.raises(AttributeError):
        parameter(module, "bias")
