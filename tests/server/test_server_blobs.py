"""Both blob stores, a folder and a bucket: whole or not there, bounded, gone at their time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from buckets import S3
from interpose.errors import StorageFull
from interpose_server.blobs import BLOCK, BlobKey, Blobs, LocalBlobs, open_blobs, whole
from interpose_server.blobs import read as read_some
from rig import Valkey, make_settings

KEY = BlobKey("ada", "result", "../../etc/passwd")

Opened: TypeAlias = Callable[[int], Blobs]


@pytest.fixture(params=["file", "s3"])
def opened(
    request: pytest.FixtureRequest, valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Opened:
    """Opens the same store again and again, each time as another process would."""
    url = "file"
    if request.param == "s3":
        s3: S3 = request.getfixturevalue("s3")
        for name, value in s3.env().items():
            monkeypatch.setenv(name, value)
        url = s3.bucket()
    return lambda cap: open_blobs(make_settings(valkey, tmp_path, blobs=url, blob_bytes=cap))


def read(blobs: Blobs, key: BlobKey) -> bytes | None:
    data = whole(blobs, key)
    return None if data is None else bytes(data)


def test_parts_are_joined_and_users_apart(opened: Opened) -> None:
    blobs = opened(1 << 20)
    assert blobs.put(KEY, [b"ab", b"", memoryview(b"cd")], 60) == 4
    assert read(blobs, KEY) == b"abcd" == read(opened(1 << 20), KEY)
    assert read(blobs, BlobKey("bob", KEY.kind, KEY.name)) is None
    blobs.delete(KEY)
    blobs.delete(KEY)
    assert read(blobs, KEY) is None


def test_reading_from_an_offset_what_was_deleted_meanwhile(opened: Opened) -> None:
    blobs = opened(1 << 20)
    blobs.put(KEY, [bytes(range(100))], 60)
    reader = blobs.open(KEY)
    assert reader is not None and reader.size == 100
    blobs.delete(KEY)
    blobs.sweep()
    part = bytearray(10)
    assert reader.readinto(95, memoryview(part)) == 5 and part[:5] == bytes(range(95, 100))
    assert reader.readinto(3, memoryview(part)) == 10 and part == bytes(range(3, 13))
    assert reader.readinto(100, memoryview(part)) == 0
    reader.close()


def test_the_cap_holds_over_processes(opened: Opened) -> None:
    one, other = opened(3 * BLOCK), opened(3 * BLOCK)
    one.put(KEY, [b"x" * BLOCK], 60)
    other.put(BlobKey("ada", "result", "b"), [b"x" * (BLOCK + 1)], 60)
    with pytest.raises(StorageFull):
        one.put(BlobKey("ada", "result", "c"), [b"x"], 60)
    one.recount()
    assert one.used() == other.used() == 3 * BLOCK
    other.delete(KEY)
    one.put(KEY, [b"x"], 60)
    assert one.used() == 3 * BLOCK


def test_replacing_frees_what_was_there(opened: Opened) -> None:
    blobs = opened(4 * BLOCK)
    for size in (BLOCK, 3 * BLOCK, 0):
        blobs.put(KEY, [bytes(size)], 60)
        assert blobs.used() == max(size, BLOCK) and read(blobs, KEY) == bytes(size)


def test_what_is_dropped_gives_its_space_back(opened: Opened) -> None:
    blobs = opened(1 << 20)
    with blobs.writer(KEY, 10 * BLOCK, 60) as writer:
        writer.write(b"half")
        with pytest.raises(StorageFull):
            writer.write(bytes(11 * BLOCK))
    assert read(blobs, KEY) is None and blobs.used() == 0
    with blobs.writer(KEY, 10 * BLOCK, 60) as writer:
        writer.write(b"short")
        writer.commit()
    assert read(blobs, KEY) == b"short" and blobs.used() == BLOCK


def test_what_is_there_stays_until_the_new_is_whole(opened: Opened) -> None:
    blobs = opened(1 << 20)
    blobs.put(KEY, [b"old"], 60)
    with blobs.writer(KEY, 3, 60) as writer:
        writer.write(b"new")
        assert read(blobs, KEY) == b"old"
        writer.commit()
    assert read(blobs, KEY) == b"new"


def test_the_sweep_takes_what_is_past_its_time(opened: Opened) -> None:
    blobs = opened(1 << 20)
    kept = BlobKey("ada", "tensor", "kept")
    blobs.put(KEY, [b"old"], -1)
    blobs.put(kept, [b"old"], -1)
    assert blobs.keep(kept, 60) == 3
    assert blobs.keep(BlobKey("bob", "tensor", "kept"), 60) is None
    assert blobs.sweep() == 3
    assert read(blobs, KEY) is None and read(blobs, kept) == b"old" and blobs.used() == BLOCK


def test_keeping_never_shortens(opened: Opened) -> None:
    blobs = opened(1 << 20)
    blobs.put(KEY, [b"long"], 60)
    assert blobs.keep(KEY, -60) == 4
    assert blobs.sweep() == 0


async def test_large_blobs_piece_by_piece_forth_and_back(opened: Opened) -> None:
    blobs = opened(64 << 20)
    digest, written = hashlib.sha256(), 0
    with blobs.writer(KEY, 20 << 20, 60) as writer:
        for index in range(30):
            piece = bytes([index]) * (index * 40_000 + 1)
            digest.update(piece)
            writer.write(piece)
            written += len(piece)
        writer.commit()
    reader = blobs.open(KEY)
    assert reader is not None and reader.size == written
    found, at, buffer = hashlib.sha256(), 0, bytearray(300_001)
    while done := await read_some(reader, at, memoryview(buffer)):
        found.update(buffer[:done])
        at += done
    reader.close()
    assert (at, found.digest()) == (written, digest.digest())


async def test_it_can_be_reached_also_from_an_event_loop(opened: Opened) -> None:
    blobs = opened(1 << 20)
    blobs.reach()
    assert await blobs.ask(blobs.used) == 0
    await blobs.run(lambda: blobs.put(KEY, [b"x"], 60))
    assert await blobs.ask(lambda: blobs.keep(KEY, 1)) == 1


def test_names_stay_inside_the_folder(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path, 1 << 20)
    blobs.put(KEY, [b"abcd"], 60)
    with blobs.writer(KEY, 10, 60) as writer:
        writer.write(b"dropped")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "used"]
    assert [path.name for path in files] == [KEY.hashed]


def test_a_server_that_starts_leaves_alone_what_others_are_writing(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path, 1 << 20)
    with blobs.writer(KEY, 10, 60) as writer:
        writer.write(b"half")
        LocalBlobs(tmp_path, 1 << 20).recount()
        writer.commit()
    assert read(blobs, KEY) == b"half" and blobs.used() == BLOCK
