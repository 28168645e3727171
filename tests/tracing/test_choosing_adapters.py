"""Choosing adapters while recording: by block, session and edit; in files; and those that aren't there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.errors import BadArgument, ConfigError, InvalidGraph, UnknownAdapter
from interpose.graph.codec import decode_graph, encode_graph
from interpose.graph.manifest import decode_manifest, encode_manifest, fingerprint
from interpose.program import Program
from lora import lora
from models import tiny
from recording import recorded

ROW = [5, 9, 33, 7]


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel(str(tiny("gpt2")), adapters={"french": lora("gpt2"), "legal": lora("gpt2", 1)})


def logits(model: Any, **options: Any) -> torch.Tensor:
    with model.trace(ROW, **options):
        found = model.logits.save()
    return found.detach()


def test_one_that_isnt_there_is_told_at_the_line(model: Any) -> None:
    for opened in (model.trace, model.generate, model.scan):
        with pytest.raises(UnknownAdapter, match=r"it has french, legal; did you mean 'french'\?") as raised:
            opened(ROW, adapter="frensh")
        assert raised.value.source is not None and raised.value.source.file == __file__
        assert raised.value.code == "unknown_adapter"
    with pytest.raises(UnknownAdapter):
        model.session(adapter="x")
    with pytest.raises(UnknownAdapter):
        model.edit(adapter="x")


def test_graphs_say_it_and_older_readers_refuse_them(model: Any) -> None:
    plain = recorded(model.trace(ROW), lambda tracer: model.logits.save())
    chosen = recorded(model.trace(ROW, adapter="legal"), lambda tracer: model.logits.save())
    assert (encode_graph(plain)["version"], encode_graph(chosen)["version"]) == (1, 2)
    assert decode_graph(encode_graph(chosen)) == chosen and decode_graph(encode_graph(plain)) == plain
    with pytest.raises(InvalidGraph, match="a run is a mapping of invokes, kind, options"):
        decode_graph(encode_graph(chosen) | {"version": 1})
    for version in (0, 3, True, "2", None):
        with pytest.raises(InvalidGraph, match="this side reads 1 to 2"):
            decode_graph(encode_graph(chosen) | {"version": version})


def test_manifests_carry_them_and_those_of_older_servers_have_none(model: Any) -> None:
    manifest = model.manifest
    plain = encode_manifest(manifest)
    assert decode_manifest(plain).adapters == manifest.adapters
    assert fingerprint(decode_manifest(plain)) == fingerprint(manifest)
    del plain["adapters"]
    assert decode_manifest(plain).adapters == {}
    for broken in ([], {"x": {}}, {"x": None}, "x", {"x": {"rank": "many"}}):
        with pytest.raises(InvalidGraph):
            decode_manifest(plain | {"adapters": broken})


def test_sessions_and_edits_choose_for_their_blocks(model: Any) -> None:
    base, french, legal = (logits(model, adapter=name) for name in (None, "french", "legal"))
    with model.session(adapter="french"):
        with model.trace(ROW):
            one = model.logits.save()
        with model.trace(ROW, adapter="legal"):
            two = model.logits.save()
    assert torch.equal(one, french) and torch.equal(two, legal)
    with model.edit(adapter="french") as edited:
        edited.transformer.h[0].output[:] *= 1.0
    assert torch.equal(logits(edited), french) and torch.equal(logits(edited, adapter="legal"), legal)
    assert torch.equal(logits(model), base)
    with edited.edit() as twice:
        twice.transformer.h[0].output[:] *= 1.0
    assert torch.equal(logits(twice), french)
    twice.clear_edits()
    assert torch.equal(logits(twice), base)


def test_a_block_has_one(model: Any) -> None:
    with pytest.raises(BadArgument, match="has chosen its adapter"), model.trace(ROW):
        model.generate(max_new_tokens=2, adapter="french")


def test_programs_hold_it(model: Any, tmp_path: Path) -> None:
    with model.trace(ROW, adapter="french") as tracer:
        expected = tracer.name("logits", model.logits)
    program = Program.load(tracer.graph.save(tmp_path / "french.json"))
    assert "trace with adapter 'french'" in str(program)
    assert torch.equal(program.run(model)["logits"], expected)
    assert torch.equal(program.run(model, adapter="legal")["logits"], logits(model, adapter="legal"))
    with pytest.raises(UnknownAdapter, match="none at all"):
        program.run(LanguageModel(str(tiny("gpt2"))))


def test_caches_and_spellings_of_other_libraries_take_it(model: Any) -> None:
    found, cache = model.run_with_cache(ROW, adapter="french")
    torch.testing.assert_close(found, logits(model, adapter="french"), rtol=0, atol=1e-4)
    assert cache["blocks.1.hook_resid_post"].shape == (1, 4, 64)


def test_more_may_come_later(model: Any, tmp_path: Path) -> None:
    own = LanguageModel(str(tiny("gpt2")))
    own.load_adapter(lora("gpt2"), adapter_name="late")
    assert list(own.adapters) == ["late"] and own.adapters["late"].targets == ("c_attn", "c_fc", "c_proj")
    assert torch.equal(logits(own, adapter="late"), logits(model, adapter="french"))
    with pytest.raises(ConfigError, match="no folder"):
        own.load_adapter(tmp_path / "none", "other")
    assert list(own.adapters) == ["late"]
