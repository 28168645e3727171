"""A worker's shelf of attachments: read once, one user's alone, bounded, and never what somebody wrote into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interpose.errors import InvalidPayload, MissingAttachment
from interpose.graph.model import Graph, Node
from interpose.graph.values import TensorSpec
from interpose.runtime.engine import EngineJob
from interpose.wire.tensors import Encoded, encode_tensor
from interpose_server import attachments, blob_keys
from interpose_server.blobs import LocalBlobs
from interpose_server.settings import Settings
from interpose_server.worker.shelf import Shelf
from rig import run_gateway, submission, tiny_graph
from test_server_worker import Obedient, ended, working


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "blobs", 1 << 30)


def store(blobs: LocalBlobs, user: str, tensor: torch.Tensor) -> Encoded:
    encoded = encode_tensor(tensor)
    attachments.store(blobs, user, encoded.sha, encoded.spec, encoded.data, 60)
    return encoded


def test_read_and_placed_once(blobs: LocalBlobs) -> None:
    one, placed = store(blobs, "ada", torch.arange(5.0)), list[Any]()

    def place(tensor: torch.Tensor) -> torch.Tensor:
        placed.append(tensor)
        return tensor + 0

    shelf = Shelf(blobs, 1000, place)
    first, again = (shelf.get("ada", one.sha, one.spec, placed=True) for _ in range(2))
    assert torch.equal(first, torch.arange(5.0))
    assert first.data_ptr() == again.data_ptr()
    assert first is not again  # what autograd notes on the one isn't on the other
    assert len(placed) == 1
    given = shelf.get("ada", one.sha, one.spec, placed=False)
    assert given.data_ptr() != first.data_ptr()
    assert len(placed) == 1


def test_a_device_without_room_leaves_it_to_the_job(blobs: LocalBlobs) -> None:
    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("another batch has it")

    one = store(blobs, "ada", torch.arange(5.0))
    assert torch.equal(Shelf(blobs, 1000, full).get("ada", one.sha, one.spec, placed=True), torch.arange(5.0))


def test_users_do_not_share(blobs: LocalBlobs) -> None:
    one = store(blobs, "ada", torch.ones(5))
    shelf = Shelf(blobs, 1000, lambda tensor: tensor)
    mine = shelf.get("ada", one.sha, one.spec, placed=True)
    with pytest.raises(MissingAttachment):
        shelf.get("bob", one.sha, one.spec, placed=True)
    store(blobs, "bob", torch.ones(5))
    assert shelf.get("bob", one.sha, one.spec, placed=True).data_ptr() != mine.data_ptr()


def test_what_was_written_into_is_read_anew(blobs: LocalBlobs) -> None:
    one = store(blobs, "ada", torch.ones(5))
    shelf = Shelf(blobs, 1000, lambda tensor: tensor)
    shelf.get("ada", one.sha, one.spec, placed=True)[1:].view(2, 2).add_(1)
    assert torch.equal(shelf.get("ada", one.sha, one.spec, placed=True), torch.ones(5))


def test_another_dtype_or_shape_is_refused_on_the_shelf_too(blobs: LocalBlobs) -> None:
    one = store(blobs, "ada", torch.ones(6))
    shelf = Shelf(blobs, 1000, lambda tensor: tensor)
    shelf.get("ada", one.sha, one.spec, placed=True)
    for wrong in (TensorSpec((2, 3), "float32"), TensorSpec((6,), "int32")):
        with pytest.raises(InvalidPayload):
            shelf.get("ada", one.sha, wrong, placed=True)


def test_it_keeps_what_was_used_last_and_no_more_than_allowed(blobs: LocalBlobs) -> None:
    stored = [store(blobs, "ada", torch.full((10,), float(number))) for number in range(3)]
    large = store(blobs, "ada", torch.zeros(1000))
    shelf = Shelf(blobs, 80, lambda tensor: tensor)

    def get(one: Encoded) -> int:
        return shelf.get("ada", one.sha, one.spec, placed=True).data_ptr()

    held = [shelf.get("ada", one.sha, one.spec, placed=True) for one in stored[:2]]
    assert get(stored[0]) == held[0].data_ptr()
    third = get(stored[2])  # the second goes: the first was used since
    assert get(stored[0]) == held[0].data_ptr()
    assert get(stored[2]) == third
    assert get(stored[1]) != held[1].data_ptr()
    get(large)
    assert (shelf._bytes, len(shelf._kept)) == (0, 0)
    off = Shelf(blobs, 0, lambda tensor: tensor)
    assert torch.equal(off.get("ada", large.sha, large.spec, placed=True), torch.zeros(1000))


async def test_batch_mates_and_later_jobs_have_the_same_memory(settings: Settings) -> None:
    seen: list[int] = []

    def step(job: EngineJob) -> None:
        (tensor,) = job.attachments.values()
        seen.append(tensor.data_ptr())
        job.sink.save(1, tensor * 2)

    one = encode_tensor(torch.arange(4.0))
    plain = tiny_graph()
    graph = Graph(plain.runs, (*plain.nodes, Node(2, "attachment", args=(one.sha,))), {one.sha: one.spec})
    async with run_gateway(settings) as gateway:
        jobs = [submission(graph, attachments={one.sha: one.data}) for _ in range(3)]
        for job in jobs[:2]:
            assert (await gateway.post(job)).status_code == 202
        async with working(gateway, Obedient(step)):
            for job in jobs[:2]:
                await ended(gateway, job)
            gateway.blobs.delete(blob_keys.tensor("ada", one.sha))
            await gateway.post(jobs[2])
            found = await ended(gateway, jobs[2])
            assert found[2].data == (torch.arange(4.0) * 2).numpy().tobytes()
    assert len(seen) == 3
    assert len(set(seen)) == 1
