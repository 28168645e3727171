import hashlib
import json

import msgpack
import pytest
from interpose import catalog
from interpose.client import fetch_manifest, fetch_tokenizer
from interpose.errors import InvalidGraph, InvalidPayload
from interpose.graph.manifest import Leaf, Manifest, ModuleInfo, encode_manifest, fingerprint
from scripted_lab import Lab

MODEL = "org/a model"


def serve(lab: Lab, tokenizer: bytes | None = b"{}", revision: str = "r1") -> Manifest:
    sha = hashlib.sha256(tokenizer).hexdigest() if tokenizer else None
    modules = {"": ModuleInfo("", "Tiny", {"exit": (1,)}, {"output": Leaf(("batch", "seq", 8), "float32")})}
    manifest = Manifest(MODEL, revision, "Tiny", "float32", modules, tokenizer=sha)
    lab.models[MODEL] = fingerprint(manifest), msgpack.packb(encode_manifest(manifest))
    if tokenizer:
        lab.tokenizers[MODEL] = tokenizer
    return manifest


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """As a new process would start: nothing in memory, and nothing fresh."""
    monkeypatch.setattr(catalog, "_known", {})
    monkeypatch.setattr(catalog, "FRESH_S", 0.0)


def test_an_unchanged_manifest_crosses_once(lab: Lab, monkeypatch):
    manifest = serve(lab)
    assert fetch_manifest(MODEL) == manifest
    catalog._known.clear()
    lab.models[MODEL] = (lab.models[MODEL][0], b"not sent again")
    assert fetch_manifest(MODEL) == manifest
    asked = len(lab.calls)
    monkeypatch.setattr(catalog, "FRESH_S", 60.0)
    assert fetch_manifest(MODEL) == manifest
    assert len(lab.calls) == asked


def test_a_changed_manifest_is_seen(lab: Lab):
    serve(lab)
    fetch_manifest(MODEL)
    assert fetch_manifest(MODEL) != serve(lab, revision="r2") == fetch_manifest(MODEL)


def test_a_damaged_cache_is_fetched_anew(lab: Lab, tmp_path):
    manifest = serve(lab)
    fetch_manifest(MODEL)
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file() and path.parent.name == "manifests":
            path.write_bytes(path.read_bytes()[:-9])
    catalog._known.clear()
    assert fetch_manifest(MODEL) == manifest


@pytest.mark.parametrize("tag", ["../../escape", "x" * 64, "A" * 64])
def test_a_server_names_no_files(lab: Lab, tmp_path, tag):
    manifest = serve(lab)
    lab.models[MODEL] = (tag, lab.models[MODEL][1])
    assert fetch_manifest(MODEL) == manifest
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "none.toml"]


@pytest.mark.parametrize("body", [b"", b"\x80", b"\x90", b"\x81\xa7layouts\x90", b"\xff" * 100])
def test_malformed_manifests_are_refused(lab: Lab, body):
    lab.models[MODEL] = ("0" * 64, body)
    with pytest.raises((InvalidPayload, InvalidGraph)):
        fetch_manifest(MODEL)


def test_tokenizers_are_checked_and_kept(lab: Lab):
    data = json.dumps({"model": "x"}).encode()
    serve(lab, data)
    assert fetch_tokenizer(MODEL) == data
    lab.tokenizers[MODEL] = b"another"
    assert fetch_tokenizer(MODEL) == data
    serve(lab, b"newer")
    lab.tokenizers[MODEL] = b"another"
    with pytest.raises(InvalidPayload, match="manifest names"):
        fetch_tokenizer(MODEL)
    serve(lab, None)
    assert fetch_tokenizer(MODEL) is None
