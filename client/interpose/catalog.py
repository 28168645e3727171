"""What a server says of its models: manifests and tokenizers, kept in memory and on disk.

A manifest is kept under its fingerprint and asked for again with it, so that an unchanged one crosses the network
once. Nothing a server names becomes a path before it is known to be a hash.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .config import CONFIG, Endpoint, cache_folder, endpoint
from .errors import InterposeError, InvalidPayload, ModelLoading, ModelUnavailable, ModelUpdated
from .graph.manifest import Manifest, decode_manifest
from .progress import Progress
from .tracing.notes import note
from .wire.fields import HEX, unpack
from .wire.protocol import MSGPACK

if TYPE_CHECKING:
    import httpx

FRESH_S = 10.0
"""For so long a manifest isn't asked for again: a notebook traces the same model many times a minute."""

_known: dict[tuple[Endpoint, str], tuple[float, str, Manifest]] = {}
"""(server, model) -> when it was checked, its fingerprint, and itself."""


def fetch_manifest(model: str, host: str | None = None, api_key: str | None = None) -> Manifest:
    """What the server says of a model. Waits, and shows that, while the server loads it for the first time.

    Raises:
        UnknownModel: it isn't served there.
        ModelLoading: it isn't loaded after `CONFIG.LOAD_TIMEOUT`.
        ModelFailed: the server can't load it.
        InterposeError: the server refuses or can't be reached.
    """
    server = endpoint(host, api_key)
    known = _known.get((server, model)) or _stored(server, model)
    if known is not None and time.monotonic() - known[0] < FRESH_S:
        return known[2]
    asked = {"Accept": MSGPACK}
    if known is not None:
        asked["If-None-Match"] = f'"{known[1]}"'
    answer = _get_loaded(server, model, asked)
    if answer.status_code == 304 and known is not None:
        tag, manifest = known[1], known[2]
    else:
        tag, manifest = _fingerprint(answer.headers.get("etag", "")), _decode(answer.content)
        if tag:
            _store(_body(server, tag), answer.content)
            _store(_head(server, model), tag.encode())
    _known[server, model] = time.monotonic(), tag, manifest
    return manifest


@contextmanager
def doubting(model: str, host: str | None = None, api_key: str | None = None) -> Iterator[None]:
    """Has the server asked for a model's manifest anew, however fresh that is, once it refuses what is sent within.

    That is refused where the model has changed since.
    """
    try:
        yield
    except (ModelUpdated, ModelUnavailable):
        server = endpoint(host, api_key)
        if (known := _known.get((server, model))) is not None:
            _known[server, model] = -math.inf, *known[1:]
        raise


def fetch_tokenizer(model: str, host: str | None = None, api_key: str | None = None) -> bytes | None:
    """The model's tokenizer.json; None if it has no tokenizer. Checked against the manifest's SHA-256."""
    sha = fetch_manifest(model, host, api_key).tokenizer
    if sha is None:
        return None
    if not _fingerprint(sha):
        raise InvalidPayload("the manifest names its tokenizer by something that isn't a SHA-256")
    kept = _load(Path("tokenizers", sha))
    if kept is not None and hashlib.sha256(kept).hexdigest() == sha:
        return kept
    body = _get(endpoint(host, api_key), f"/v1/models/{quote(model, safe='/')}/tokenizer", {}).content
    if hashlib.sha256(body).hexdigest() != sha:
        raise InvalidPayload("the tokenizer the server sent isn't the one its manifest names; try again")
    _store(Path("tokenizers", sha), body)
    return body


def fetch_models(host: str | None = None, api_key: str | None = None) -> list[Mapping[str, Any]]:
    """The models the server lists: "id", "state", "revision", "fingerprint" and more."""
    from .transports.http import body_of

    plain = body_of(_get(endpoint(host, api_key), "/v1/models", {}))
    models = plain.get("models") if isinstance(plain, dict) else None
    if not isinstance(models, list):
        raise InvalidPayload("the server lists its models in an unknown form")
    return models


def _get_loaded(server: Endpoint, model: str, extra: Mapping[str, str]) -> httpx.Response:
    """The answer about a model, asked again until the server has loaded it."""
    path, began = f"/v1/models/{quote(model, safe='/')}", time.monotonic()
    with Progress() as progress:
        while True:
            try:
                return _get(server, path, extra)
            except ModelLoading as error:
                if CONFIG.PROGRESS and not progress.seen:
                    note(f"{model} isn't loaded yet; waiting up to {CONFIG.LOAD_TIMEOUT:g} s for that")
                if time.monotonic() - began > CONFIG.LOAD_TIMEOUT:
                    raise ModelLoading(
                        f"{error.message}: waited {CONFIG.LOAD_TIMEOUT:g} s, as CONFIG.LOAD_TIMEOUT says",
                        details=error.details,
                    ) from None
                _pause(progress, model, error)


def _pause(progress: Progress, model: str, error: ModelLoading) -> None:
    """Sleep as long as the server asks for, with the progress line alive."""
    stated = error.details.get("retry_after_s")
    wait_s = stated if isinstance(stated, (int, float)) and math.isfinite(stated) else 1.0
    until = time.monotonic() + min(max(wait_s, 0.1), 10.0)
    while (left := until - time.monotonic()) > 0:
        progress.loading(model, str(error.details.get("state", "loading")))
        time.sleep(min(left, 0.2))


def _get(server: Endpoint, path: str, extra: Mapping[str, str]) -> httpx.Response:
    # Its libraries take long to import, and a local user needs none of them.
    from .transports.remote import get

    return get(server, path, extra)


def _decode(body: bytes) -> Manifest:
    plain = unpack(body, longest=1 << 20, containers=1 << 22)
    if not isinstance(plain, dict):
        raise InvalidPayload("a manifest isn't a map")
    return decode_manifest(plain)


def _fingerprint(tag: str) -> str:
    """The SHA-256 within an ETag, "" if it isn't one."""
    bare = tag.removeprefix("W/").strip('"')
    return bare if len(bare) == 64 and set(bare) <= HEX else ""


def _head(server: Endpoint, model: str) -> Path:
    """Where the fingerprint last seen for a model of a server is kept."""
    return Path("heads", hashlib.sha256(f"{server.url}\n{model}".encode()).hexdigest())


def _body(server: Endpoint, tag: str) -> Path:
    """Where a manifest is kept: a server's own, lest one server's take the place of another's of the same tag."""
    return Path("manifests", hashlib.sha256(f"{server.url}\n{tag}".encode()).hexdigest())


def _stored(server: Endpoint, model: str) -> tuple[float, str, Manifest] | None:
    """From the disk, and due to be asked for again."""
    tag = _fingerprint((_load(_head(server, model)) or b"").decode("ascii", "replace"))
    body = _load(_body(server, tag)) if tag else None
    if body is None:
        return None
    try:
        return float("-inf"), tag, _decode(body)
    except InterposeError:
        return None


def _load(name: Path) -> bytes | None:
    try:
        return (cache_folder() / name).read_bytes()
    except OSError:
        return None


def _store(name: Path, body: bytes) -> None:
    """Whole or not at all; a disk that can't be written to costs only a download next time."""
    path = cache_folder() / name
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(body)
            Path(scratch).replace(path)
        except OSError:
            Path(scratch).unlink()
            raise
