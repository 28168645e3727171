import hashlib
import io
import json
import sys

import msgpack
import pytest
from interpose import catalog
from interpose.catalog import doubting
from interpose.client import fetch_manifest, fetch_tokenizer
from interpose.config import CONFIG
from interpose.errors import InvalidGraph, InvalidPayload, ModelFailed, ModelLoading, ModelUpdated
from interpose.graph.manifest import Leaf, Manifest, ModuleInfo, encode_manifest, fingerprint
from interpose.progress import Progress
from interpose.tracing import notes
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


def cold(state: str = "cold") -> ModelLoading:
    return ModelLoading("it is being loaded; try again", details={"state": state, "retry_after_s": 0.1})


def test_a_model_that_is_loaded_first_is_waited_for(lab: Lab, capsys):
    manifest = serve(lab)
    lab.cold = [cold(), cold("loading"), cold("loading")]
    assert fetch_manifest(MODEL) == manifest
    assert len(lab.calls) == 4 and capsys.readouterr().err == ""


def test_waiting_is_shown_or_said_once(lab: Lab, monkeypatch, capsys):
    serve(lab)
    monkeypatch.setattr(notes, "_told", set())
    CONFIG.PROGRESS = True
    lab.cold = [cold(), cold()]
    fetch_manifest(MODEL)
    assert capsys.readouterr().err == f"interpose: {MODEL} isn't loaded yet; waiting up to 900 s for that\n"
    for name in ("_PATIENCE_S", "_EVERY_S"):
        monkeypatch.setattr(f"interpose.progress.{name}", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    lab.cold = [cold(), cold("loading")]
    fetch_manifest(MODEL)
    drawn = [text for text in terminal.getvalue().split("\r\x1b[2K") if text]
    assert drawn == [
        f"interpose: {MODEL} is cold and being loaded, 0 s",
        f"interpose: {MODEL} is being loaded, 0 s",
    ]


def test_waiting_has_an_end(lab: Lab):
    lab.cold = [cold()] * 50
    CONFIG.LOAD_TIMEOUT = 0.3
    with pytest.raises(ModelLoading, match=r"waited 0\.3 s, as CONFIG\.LOAD_TIMEOUT"):
        fetch_manifest(MODEL)
    assert len(lab.calls) < 6


def test_a_model_that_cannot_be_loaded_is_told_at_once(lab: Lab):
    lab.cold = [cold(), ModelFailed("the hub keeps it", details={"state": "failed", "reason": "gated"})]
    with pytest.raises(ModelFailed, match="the hub keeps it") as told:
        fetch_manifest(MODEL)
    assert told.value.details["reason"] == "gated" and len(lab.calls) == 2


def test_a_changed_manifest_is_seen(lab: Lab):
    serve(lab)
    fetch_manifest(MODEL)
    assert fetch_manifest(MODEL) != serve(lab, revision="r2") == fetch_manifest(MODEL)


@pytest.mark.parametrize("refusal", [ModelUpdated("it has changed"), cold("loading")])
def test_what_a_refused_job_was_recorded_against_is_asked_for_anew(lab: Lab, monkeypatch, refusal):
    monkeypatch.setattr(catalog, "FRESH_S", 60.0)
    old = serve(lab)
    assert fetch_manifest(MODEL) == old
    new = serve(lab, revision="r2")
    assert fetch_manifest(MODEL) == old
    with pytest.raises(type(refusal)), doubting(MODEL):
        raise refusal
    assert fetch_manifest(MODEL) == new


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


@pytest.mark.parametrize("stated", [float("nan"), float("inf"), "soon", None])
def test_a_server_that_states_no_time_is_asked_again_after_a_second(
    stated: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(catalog.time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(catalog.time, "sleep", slept.append)
    catalog._pause(Progress(), "tiny", ModelLoading("it loads", details={"retry_after_s": stated}))
    assert 0.9 <= sum(slept) <= 1.1
