"""The local blob store: whole or not there, bounded, gone at its time."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpose.errors import StorageFull
from interpose_server.blobs import BLOCK, BlobKey, LocalBlobs

KEY = BlobKey("ada", "result", "../../etc/passwd")


def read(blobs: LocalBlobs, key: BlobKey) -> bytes | None:
    reader = blobs.open(key)
    if reader is None:
        return None
    data = bytearray(reader.size)
    assert reader.readinto(0, memoryview(data)) == reader.size
    reader.close()
    return bytes(data)


def test_parts_are_joined_and_names_stay_inside(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path, 1 << 20)
    assert blobs.put(KEY, [b"ab", b"", memoryview(b"cd")], 60) == 4
    assert read(blobs, KEY) == b"abcd"
    assert read(blobs, BlobKey("bob", KEY.kind, KEY.name)) is None
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "used"]
    assert [path.name for path in files] == [KEY.hashed]


def test_reading_from_an_offset(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path, 1 << 20)
    blobs.put(KEY, [bytes(range(100))], 60)
    reader = blobs.open(KEY)
    assert reader is not None
    blobs.delete(KEY)
    part = bytearray(10)
    assert reader.readinto(95, memoryview(part)) == 5 and part[:5] == bytes(range(95, 100))
    reader.close()


def test_the_cap_holds_over_processes(tmp_path: Path) -> None:
    one, other = LocalBlobs(tmp_path, 3 * BLOCK), LocalBlobs(tmp_path, 3 * BLOCK)
    one.put(KEY, [b"x" * BLOCK], 60)
    other.put(BlobKey("ada", "result", "b"), [b"x" * (BLOCK + 1)], 60)
    with pytest.raises(StorageFull):
        one.put(BlobKey("ada", "result", "c"), [b"x"], 60)
    assert one.used() == other.used() == 3 * BLOCK == one.recount()
    other.delete(KEY)
    one.put(KEY, [b"x"], 60)
    assert one.used() == 3 * BLOCK


def test_replacing_frees_what_was_there(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path, 4 * BLOCK)
    for size in (BLOCK, 3 * BLOCK, 0):
        blobs.put(KEY, [bytes(size)], 60)
        assert blobs.used() == max(size, BLOCK)


def test_what_is_dropped_gives_its_space_back(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path, 1 << 20)
    with blobs.writer(KEY, 10 * BLOCK, 60) as writer:
        writer.write(b"half")
        with pytest.raises(StorageFull):
            writer.write(bytes(11 * BLOCK))
    assert read(blobs, KEY) is None and blobs.used() == 0
    with blobs.writer(KEY, 10 * BLOCK, 60) as writer:
        writer.write(b"short")
        writer.commit()
    assert read(blobs, KEY) == b"short" and blobs.used() == BLOCK
    assert list((tmp_path / "new").iterdir()) == []


def test_the_sweep_takes_what_is_past_its_time(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path, 1 << 20)
    kept = BlobKey("ada", "tensor", "kept")
    blobs.put(KEY, [b"old"], -1)
    blobs.put(kept, [b"old"], -1)
    assert blobs.keep(kept, 60) == 3
    assert blobs.keep(BlobKey("bob", "tensor", "kept"), 60) is None
    assert blobs.sweep() == 3
    assert read(blobs, KEY) is None and read(blobs, kept) == b"old" and blobs.used() == BLOCK
