"""Standard names on real weights: SmolLM2 and a BERT encoder, against hooks by hand; and beside other jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
from by_hand import Spot, heads, llama, spotted
from interpose import LanguageModel
from interpose.runtime.engine import EngineJob
from interpose.runtime.loading import load
from models import tiny
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from twins import alive, close, same

TEXT = "The capital of France is Paris, and"
LAYER = 12

SMOL = llama(64, 3) | {
    "q": Spot("self_attn.q_proj", "out", heads(9, 64)),
    "z": Spot("self_attn.o_proj", "in", heads(9, 64)),
}


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Any:
    return LanguageModel(str(smollm2))


@pytest.fixture(scope="module")
def twin(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2).eval()


def ids(folder: Path) -> Tensor:
    return AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids


def test_every_block_offers_every_name(smol: Any) -> None:
    manifest = smol.manifest
    assert len(manifest.blocks) == 30
    assert all(set(manifest.named[path]) == {*SMOL, *by_hand.TAPS, "head_out"} for path in manifest.blocks)
    assert set(manifest.named[""]) == {"embed", "final_norm", "logits"}


@torch.no_grad()
@pytest.mark.parametrize("name", SMOL)
def test_smollm2(name: str, smol: Any, twin: Any, smollm2: Path) -> None:
    path = f"model.layers.{LAYER}.{SMOL[name].module}".rstrip(".")

    def edit(value: Any) -> None:
        value[:, 3, ..., :20] *= 1.5

    with smol.trace(TEXT):
        value, before = getattr(smol.layers[LAYER], name).save(), smol.logits.save()
    with spotted(twin, path, SMOL[name]) as caught:
        same(before, twin(ids(smollm2)).logits)
    same(value, caught[0])
    with smol.trace(TEXT):
        edit(getattr(smol.layers[LAYER], name))
        after = smol.logits.save()
    with spotted(twin, path, SMOL[name], edit):
        expected = twin(ids(smollm2)).logits
    assert not torch.equal(expected, before)
    same(after, expected)


@torch.no_grad()
def test_the_inside_of_attention(smol: Any, smollm2: Path) -> None:
    eager = AutoModelForCausalLM.from_pretrained(smollm2, attn_implementation="eager").eval()
    with smol.trace(TEXT):
        patterns = [layer.pattern.save() for layer in smol.layers]
        sums = [(layer.head_out.sum(2) - layer.attn_out).save() for layer in smol.layers]
        outs = [layer.attn_out.save() for layer in smol.layers]
    found = eager(ids(smollm2), output_attentions=True).attentions
    for pattern, expected, apart, out in zip(patterns, found, sums, outs, strict=True):
        same(pattern, expected)
        assert float(apart.norm() / out.norm()) < 1e-5


@torch.no_grad()
def test_an_encoder(minilm: Path) -> None:
    model, twin = LanguageModel(str(minilm)), AutoModel.from_pretrained(minilm).eval()
    spots = by_hand.bert() | {name: Spot(f"attention.self.{long}", "out", heads(12, 32)) for name, long in _QKV}
    spots["z"] = Spot("attention.output.dense", "in", heads(12, 32))
    given = AutoTokenizer.from_pretrained(minilm)(TEXT, return_tensors="pt")
    row = given.input_ids[0].tolist()
    for name, spot in spots.items():
        with model.trace(row):
            value = getattr(model.layers[2], name).save()
        with spotted(twin, f"encoder.layer.2.{spot.module}".rstrip("."), spot) as caught:
            twin(**given)
        same(value, caught[0])


_QKV = (("q", "query"), ("k", "key"), ("v", "value"))


class Kept(dict[int, Tensor]):
    """A sink."""

    def save(self, node: int, value: Any) -> None:
        self[node] = value.clone()

    def log(self, node: int, text: str) -> None:
        raise AssertionError

    def cancelled(self) -> bool:
        return False


@pytest.mark.parametrize("arch", ["gpt2", "llama", "olmo2", "opt", "granite", "mixtral", "bloom", "falcon"])
def test_beside_other_jobs(arch: str) -> None:
    """Jobs that write the same names in one forward get what each gets alone, residual in place or not."""
    model = LanguageModel(str(tiny(arch)))
    engine = model._access.local.engine
    graphs = []
    for row in ([5, 6, 7, 8, 9], [21, 22, 23], [40, 41, 42, 43, 44, 45, 46]):
        with model.scan(row) as tracer:
            for name in [n for n in by_hand.HANDS[arch][1] if n != "expert_ids"]:
                value = getattr(model.layers[1], name)
                value[:, -1] *= 1 + len(row) / 10
                value.save()
            model.logits.save()
        graphs.append(tracer.recorder.finish()[0])
    alone, together = [Kept() for _ in graphs], [Kept() for _ in graphs]
    for graph, sink in zip(graphs, alone, strict=True):
        assert engine.run([EngineJob(graph, {}, sink)]) == [None]
    jobs = [EngineJob(graph, {}, sink) for graph, sink in zip(graphs, together, strict=True)]
    assert engine.run(jobs) == [None] * len(jobs)
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        for node, value in one.items():
            alive(value)
            close(other[node], value)


def test_half_precision_real_weights(smollm2: Path) -> None:
    full, half = load(smollm2).manifest, load(smollm2, dtype="bfloat16").manifest
    assert {owner: set(points) for owner, points in full.named.items()} == {
        owner: set(points) for owner, points in half.named.items()
    }
