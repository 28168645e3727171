"""The manifest of a split model, measured part by part, is the manifest of the whole one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from interpose.errors import ConfigError
from interpose.graph.manifest import encode_manifest, fingerprint
from interpose.runtime.loading import Loaded, wrap
from interpose.runtime.split.measuring import measure_split
from interpose.runtime.split.slices import Report, feeding_nest, feeding_of, measured
from transformers import AutoTokenizer

from tests.cutting import block_ranges, cut
from tests.models import tiny
from tests.runtime.split.splitting import whole


def split(arch: str, shards: int, spoil: Any = None) -> Loaded:
    """A model in parts of which each has the weights of its own blocks alone."""
    model = whole(arch)
    groups = block_ranges(model, shards)
    parts = cut(model, groups)

    def ask(feeding: Any, outputs: Any) -> list[Report]:
        reports = [_report(arch, own, groups, feeding_of(feeding_nest(feeding)), outputs) for own in groups]
        return reports if spoil is None else spoil(reports)

    try:
        return measure_split(parts.home, parts.dispatcher, "tiny", AutoTokenizer.from_pretrained(tiny(arch)), ask)
    finally:
        parts.route.close()


def _report(arch: str, own: Sequence[str], groups: Sequence[Sequence[str]], feeding: Any, outputs: Any) -> Report:
    part = whole(arch)
    for path in (path for group in groups for path in group if path not in own):
        part.get_submodule(path).to("meta")
    found = Report.of_nest(measured(part, own, outputs, feeding, "tiny").to_nest())
    assert not any("forward" in vars(module) for module in part.modules()), "every block is as before"
    return found


@pytest.mark.parametrize(
    ("arch", "shards"),
    [
        *[("gpt2", 2), ("llama", 3), ("gemma3", 3), ("mixtral", 2), ("mamba", 3), ("bert", 3), ("vit", 2)],
        *[("mpt", 2), ("falcon", 3), ("qwen3_moe", 2), ("llava", 2), ("bert_classes", 2)],
    ],
)
def test_it_is_the_manifest_of_the_whole(arch: str, shards: int) -> None:
    model = wrap(whole(arch), "tiny", AutoTokenizer.from_pretrained(tiny(arch)))
    found = split(arch, shards)
    expected = encode_manifest(model.manifest)
    differs = [name for name, value in encode_manifest(found.manifest).items() if value != expected[name]]
    assert not differs
    assert fingerprint(found.manifest) == fingerprint(model.manifest)
    assert (found.rewritten, found.first_only) == (model.rewritten, model.first_only)


def test_parts_of_different_models_are_refused() -> None:
    def spoil(reports: list[Report]) -> list[Report]:
        return [reports[0], replace(reports[1], about="another config")]

    with pytest.raises(ConfigError, match="same model"):
        split("gpt2", 2, spoil)


def test_a_part_that_could_not_be_measured_is_told() -> None:
    def spoil(reports: list[Report]) -> list[Report]:
        return [reports[0], replace(reports[1], note="its forward failed while being measured: no such thing")]

    with pytest.raises(ConfigError, match="no such thing"):
        split("gpt2", 2, spoil)


def test_a_point_that_fails_in_one_part_is_offered_by_none() -> None:
    def spoil(reports: list[Report]) -> list[Report]:
        refused = {**reports[1].manifest.refused, "": {"embed": "it doesn't hold"}}
        return [reports[0], replace(reports[1], manifest=replace(reports[1].manifest, refused=refused))]

    manifest = split("gpt2", 2, spoil).manifest
    assert "embed" not in manifest.named[""]
    assert manifest.refused[""]["embed"] == "it doesn't hold"
    assert "logits" in manifest.named[""]


def test_another_order_outside_the_blocks_is_refused() -> None:
    def spoil(reports: list[Report]) -> list[Report]:
        order = [event for event in reports[1].order if event[0] != "transformer.ln_f"]
        return [reports[0], replace(reports[1], order=tuple(order))]

    with pytest.raises(ConfigError, match="outside its blocks"):
        split("gpt2", 2, spoil)
