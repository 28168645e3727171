"""What only a bucket has: objects nobody points to, parts of uploads, keys to hide, a service that may be away."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import obstore
import pytest
from buckets import S3
from interpose.errors import ConfigError, StorageUnavailable
from interpose_server.blobs import BlobKey, Blobs, open_blobs, whole
from interpose_server.blobs import s3 as bucket_module
from interpose_server.broker import store as index_module
from interpose_server.settings import Settings
from proxies import proxied
from rig import Valkey, make_settings, run_gateway, submission

KEY = BlobKey("ada", "result", "a")
SECRET = "not-to-be-shown"


@pytest.fixture
def url(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3.env().items():
        monkeypatch.setenv(name, value)
    return s3.bucket()


@pytest.fixture
def stored(url: str, valkey: Valkey, tmp_path: Path) -> Settings:
    return make_settings(valkey, tmp_path, blobs=url)


@pytest.fixture
def blobs(stored: Settings) -> Blobs:
    return open_blobs(stored)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is given time."""
    monkeypatch.setattr(index_module, "GRACE_MS", 0)
    monkeypatch.setattr(index_module, "WRITE_MS", 0)
    monkeypatch.setattr(bucket_module, "ORPHANED_S", -60.0)


@pytest.mark.usefixtures("at_once")
def test_objects_of_blobs_that_are_gone_are_deleted(blobs: Blobs, s3: S3, url: str) -> None:
    for index in range(3):
        blobs.put(KEY, [b"version", bytes([index])], 60)
    assert len(s3.list(url)) == 3
    blobs.sweep()
    assert len(s3.list(url)) == 1 and whole(blobs, KEY) == b"version\2"
    blobs.delete(KEY)
    blobs.sweep()
    assert s3.list(url) == [] and blobs.used() == 0


@pytest.mark.usefixtures("at_once")
def test_what_nothing_knows_of_is_deleted_but_not_what_is_anothers(
    blobs: Blobs, stored: Settings, s3: S3, url: str, valkey: Valkey
) -> None:
    blobs.put(KEY, [b"lost"], 60)
    valkey.clear()  # as a Redis that kept nothing
    other = open_blobs(stored)
    other.put(KEY, [b"known"], 60)
    valkey_index: Any = blobs._index  # type: ignore[attr-defined]
    assert valkey_index.id() != blobs._mine()  # type: ignore[attr-defined]
    other.sweep()
    assert len(s3.list(url)) == 2
    # The first one's index comes back, without its last entry.
    valkey_index._redis.set("ip:store", blobs._mine())  # type: ignore[attr-defined]
    valkey_index._redis.delete("ip:tidied")
    blobs.sweep()
    assert len(s3.list(url)) == 1 and whole(other, KEY) == b"known"


@pytest.mark.usefixtures("at_once")
def test_who_takes_too_long_to_write_is_told_and_charged_nothing(blobs: Blobs) -> None:
    with blobs.writer(KEY, 1 << 20, 60) as writer:
        writer.write(b"late")
        blobs.sweep()
        assert blobs.used() == 0
        with pytest.raises(StorageUnavailable):
            writer.commit()
    assert blobs.used() == 0 and whole(blobs, KEY) is None


def test_nothing_of_an_upload_that_was_given_up_stays(blobs: Blobs, s3: S3, url: str) -> None:
    with suppress(ZeroDivisionError), blobs.writer(KEY, 40 << 20, 60) as writer:
        writer.write(bytes(30 << 20))
        raise ZeroDivisionError
    assert s3.list(url) == [] and s3.uploads(url) == [] and blobs.used() == 0


def test_a_large_blob_goes_in_parts_and_is_there_as_a_whole(blobs: Blobs, s3: S3, url: str) -> None:
    data = bytes(range(256)) * (100 << 10)
    blobs.put(KEY, [data], 60)
    (name,) = s3.list(url)
    assert obstore.head(blobs._store, name.removeprefix("some/folder/"))["e_tag"].endswith('-4"')  # type: ignore
    assert whole(blobs, KEY) == data


def test_what_was_deleted_behind_our_back_is_not_there(blobs: Blobs, s3: S3, url: str) -> None:
    blobs.put(KEY, [b"data"], 60)
    (name,) = s3.list(url)
    obstore.delete(blobs._store, name.removeprefix("some/folder/"))  # type: ignore[attr-defined]
    assert whole(blobs, KEY) is None
    assert blobs.keep(KEY, 60) is None
    assert blobs.open(KEY) is None and blobs.used() == 0


@pytest.fixture
def unreachable(s3: S3, url: str, valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A bucket of which one blob is known, whose service is away."""
    open_blobs(make_settings(valkey, tmp_path, blobs=url)).put(KEY, [b"data"], 60)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    return make_settings(valkey, tmp_path, blobs=url, inline_bytes=0)


def test_a_service_that_is_away(unreachable: Settings, caplog: pytest.LogCaptureFixture) -> None:
    blobs = open_blobs(unreachable)
    for call in (
        blobs.reach,
        lambda: blobs.put(KEY, [b"x"], 60),
        lambda: blobs.keep(KEY, 60),
        lambda: whole(blobs, KEY),
    ):
        with pytest.raises(StorageUnavailable) as caught:
            call()
        assert caught.value.status == 503 and caught.value.details["retry_after_s"]
    assert blobs.used() == 4096
    assert SECRET not in caplog.text and "the bucket failed" in caplog.text


async def test_a_submission_is_told_to_come_again(unreachable: Settings) -> None:
    async with run_gateway(unreachable) as gateway:
        answer = await gateway.post(submission())
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
        assert int(answer.headers["retry-after"]) > 0
        assert (await gateway.client.get("/v1/jobs")).json()["jobs"] == []


def test_an_index_that_is_away(stored: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = open_blobs(stored.model_copy(update={"redis_url": "redis://:secret@127.0.0.1:1"}))
    with pytest.raises(StorageUnavailable) as caught:
        blobs.used()
    assert "secret" not in str(caught.value)


def test_what_the_index_did_not_take_is_charged_nothing(blobs: Blobs, valkey: Valkey) -> None:
    """Redis is away at a commit; then it is back."""
    with pytest.raises(StorageUnavailable), blobs.writer(KEY, 1 << 20, 60) as writer:
        writer.write(bytes(1 << 20))
        assert blobs.used() >= 1 << 20
        valkey.kill()
        writer.commit()
    valkey.start()
    blobs.put(BlobKey("ada", "result", "b"), [b"x"], 60)
    assert blobs.used() == 4096 and whole(blobs, KEY) is None


def test_a_bucket_that_is_not_there(stored: Settings, caplog: pytest.LogCaptureFixture) -> None:
    blobs = open_blobs(stored.model_copy(update={"blobs": "s3://nobody-has-made-this"}))
    with pytest.raises(StorageUnavailable):
        blobs.reach()
    with pytest.raises(StorageUnavailable):
        blobs.put(KEY, [b"x"], 60)
    assert SECRET not in caplog.text


@pytest.fixture
def cut_off(s3: S3, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes after which the next connections that ask for an object break."""
    cut: list[int] = []
    with proxied(s3.endpoint, cut, b"/result/") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
        yield cut


async def test_reading_goes_on_where_a_connection_broke(cut_off: list[int], stored: Settings) -> None:
    blobs = open_blobs(stored)
    data = bytes(range(251)) * (80 << 10)
    blobs.put(KEY, [data], 60)
    cut_off += [5 << 20, 300, 1 << 20]
    blobs = open_blobs(stored)  # another, as its connections are kept
    assert whole(blobs, KEY) == data
    assert cut_off == []


@pytest.mark.parametrize(
    "value", ["s3://", "s3://key:secret@bucket/x", "https://bucket", "folder", "s3://bucket?key=secret", "s3://a"]
)
def test_addresses_that_are_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERPOSE_SERVER_BLOBS", value)
    with pytest.raises(ConfigError) as caught:
        Settings.read()
    assert "INTERPOSE_SERVER_BLOBS" in str(caught.value) and "secret" not in str(caught.value)


def test_a_missing_extra_is_named(stored: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("interpose_server.blobs.s3")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"interpose\[s3\]"):
        open_blobs(stored)


def test_keys_are_in_no_setting(stored: Settings) -> None:
    settings = stored.model_copy(update={"redis_url": "redis://:secret@host"})
    assert "secret" not in repr(settings) and SECRET not in repr(settings)
    own = {name: value for name, value in settings.environment().items() if name.startswith("INTERPOSE_SERVER_")}
    assert SECRET not in str(own)


async def test_many_at_once_do_not_wait_for_one_another(blobs: Blobs) -> None:
    keys = [BlobKey("ada", "result", str(index)) for index in range(40)]
    await asyncio.gather(*(blobs.run(lambda key=key: blobs.put(key, [key.name.encode()], 60)) for key in keys))  # type: ignore[misc]
    assert [whole(blobs, key) for key in keys] == [key.name.encode() for key in keys]
