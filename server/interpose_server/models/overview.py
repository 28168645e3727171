"""Everything an operator wants to know of the models, from the broker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ..broker.connect import Broker
from ..broker.states import ModelState
from .inventory import Inventory


async def overview(broker: Broker) -> list[dict[str, Any]]:
    """All models, by name: their entry in the catalogue, state, copies, queue, devices, why loading failed, and why
    the entry isn't what is served."""
    devices = await broker.specs.shown()
    entries = {entry.spec.name: entry.spec for entry in await broker.specs.entries()}
    found = []
    for hosted in await broker.models.list():
        demand, spec, failure = await broker.queue.demand(hosted.name), entries.get(hosted.name), hosted.failure
        waited_ms = hosted.now_ms - demand.oldest_ms if demand.oldest_ms else 0
        found.append(
            {
                **hosted.to_plain(),
                "spec": None if spec is None else spec.model_dump(mode="json", exclude_defaults=True),
                "removed": hosted.removed,
                "pinned": spec is not None and spec.pinned,
                "wished": hosted.wished,
                "copies": {str(state): count for state in ModelState if (count := hosted.count(state))},
                "workers": {worker: str(state) for worker, state in sorted(hosted.copies.items())},
                "takes": list(devices.takes.get(hosted.name, ())) if devices else [],
                "holds": _holds(hosted.copies, devices),
                "pending": devices.pending.get(hosted.name, 0) if devices else 0,
                "held_back": asdict(why) if devices and (why := devices.held_back.get(hosted.name)) else None,
                "waiting": demand.waiting,
                "running": demand.running,
                "oldest_wait_s": max(waited_ms, 0) / 1000,
                "jobs": hosted.jobs,
                "busy_s": hosted.busy_s,
                "note": hosted.note,
                "failure": None
                if failure is None
                else {**failure.to_plain(), "detail": failure.detail, "tries": failure.tries},
            }
        )
    return found


def _holds(workers: Iterable[str], devices: Inventory | None) -> list[dict[str, Any]]:
    """Which devices each copy's parts have."""
    held = devices.holds if devices else {}
    return [
        {"worker": worker, "node": node, "devices": number}
        for worker in sorted(workers)
        for node, number in held.get(worker, ())
    ]


async def take_out(broker: Broker, name: str, *, now: bool) -> int:
    """Remove a model from the catalogue; with `now` the jobs that wait for it end at once. Returns how many did.

    Raises UnknownModel.
    """
    await broker.specs.remove(name)
    return len(await broker.models.give_up(name, broker.specs.gone(name))) if now else 0
