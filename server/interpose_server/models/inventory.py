"""The devices of a cluster, and what holds them: as the keeper last saw them, for operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Node:
    """Attributes: total, free: devices, also parts of one."""

    name: str
    total: float
    free: float


@dataclass(frozen=True, slots=True)
class HeldBack:
    """Why there can be no copy of a model as its entry is now, nor on the nodes there are.

    Attributes:
        reason: as of a failure to load.
        detail: for operators.
        served: whether what was deployed before is served on.
    """

    reason: str
    detail: str
    served: bool


@dataclass(frozen=True, slots=True)
class Inventory:
    """Attributes:
    kind: "GPU", or "core" where no node has a GPU.
    takes: model -> devices of each part of one copy.
    holds: worker -> for each part of its copy, the node and how many devices of that.
    pending: model -> copies that wait for room, or for their processes to start.
    held_back: model -> why it can't have copies, or none as its entry says.
    """

    kind: str
    nodes: Sequence[Node]
    takes: Mapping[str, Sequence[float]]
    holds: Mapping[str, Sequence[tuple[str, float]]]
    pending: Mapping[str, int]
    held_back: Mapping[str, HeldBack] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Inventory:
        nodes = [Node(**node) for node in plain["nodes"]]
        held_back = {model: HeldBack(**why) for model, why in plain.get("held_back", {}).items()}
        return cls(**{**plain, "nodes": nodes, "held_back": held_back})

    @property
    def total(self) -> float:
        return sum(node.total for node in self.nodes)

    @property
    def free(self) -> float:
        return sum(node.free for node in self.nodes)

    def summary(self) -> dict[str, Any]:
        """Without what is of a model."""
        return {
            "kind": self.kind,
            "total": round(self.total, 2),
            "free": round(self.free, 2),
            "nodes": [asdict(node) for node in self.nodes],
        }


def count(number: float, kind: str) -> str:
    """As "1 GPU", "0.25 of a core"."""
    if 0 < number < 1:
        return f"{number:g} of a {kind}"
    return f"{number:g} {kind}{'' if number == 1 else 's'}"


def copies(parts: Sequence[float], kind: str) -> str:
    """What a copy takes, as "2 GPUs", "3 parts of 1 GPU"."""
    if len(parts) == 1:
        return count(parts[0], kind)
    if len(set(parts)) == 1:
        return f"{len(parts)} parts of {count(parts[0], kind)}"
    return f"{len(parts)} parts, of {', '.join(f'{part:g}' for part in parts)} {kind}s"


def outgrown(parts: Sequence[float], nodes: Sequence[float], kind: str) -> str:
    """What is said of a copy for which a cluster is too small, however empty. `nodes`: the devices of each."""
    asked = f"a copy takes {copies(parts, kind)}" + (f", {sum(parts):g} in all" if len(parts) > 1 else "")
    there = f"{count(sum(nodes), kind)}, its largest node {max(nodes):g}" if nodes else f"no {kind}"
    return f"{asked}; the cluster has {there}"
