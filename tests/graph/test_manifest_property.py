"""A manifest comes back as it was, and a malformed one is refused with a code: clients trust no server either."""

from __future__ import annotations

import json
import random

import msgpack
import pytest
from graphs import JUNK, _sites, gpt2
from hypothesis import given, settings
from hypothesis import strategies as st
from interpose.errors import InvalidGraph, UnknownModule
from interpose.graph.manifest import Leaf, decode_manifest, encode_manifest, fingerprint, leaves, walk


def test_a_manifest_survives_both_encodings() -> None:
    manifest = gpt2()
    plain = encode_manifest(manifest)
    for again in (msgpack.unpackb(msgpack.packb(plain)), json.loads(json.dumps(plain))):
        found = decode_manifest(again)
        assert found == manifest
        assert fingerprint(found) == fingerprint(manifest)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_a_damaged_manifest_is_a_manifest_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    plain = json.loads(json.dumps(encode_manifest(gpt2())))
    home, key = rng.choice(_sites(plain))
    if rng.random() < 0.3:
        del home[key]
    else:
        home[key] = rng.choice(JUNK)
    try:
        found = decode_manifest(plain)
    except InvalidGraph:
        return
    for info in found.modules.values():
        for layout in info.points.values():
            leaves(layout)
    assert set(found.children) == set(found.modules)


def test_paths_lead_to_one_place_by_one_name() -> None:
    layout = (Leaf(("batch",), "float32"), {"a": None})
    assert walk(layout, (0,)) == layout[0]
    assert walk(layout, (1, "a")) is None
    for path in ((2,), ("0",), (0, 0), (1, "b"), (True,)):
        with pytest.raises(KeyError):
            walk(layout, path)


def test_unknown_modules_come_with_near_ones() -> None:
    with pytest.raises(UnknownModule, match=r"transformer\.h\.0\.attn"):
        gpt2().module("transformer.h.0.atn")
    with pytest.raises(UnknownModule, match="lm_head"):
        gpt2().module("head")
