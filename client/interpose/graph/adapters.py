"""What a manifest says of adapters: weights that a run may choose to run with beside the model's own."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ModelUpdated, UnknownAdapter

if TYPE_CHECKING:
    from .manifest import Manifest
    from .model import Run

_NAMED = re.compile(r"[A-Za-z0-9][\w.\-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One adapter.

    Attributes:
        rank: the largest of its layers.
        targets: last names of the modules whose output it changes.
        modules: how many these are.
        revision: hash of its settings and weights.
        refused: owner -> standard name -> why that point isn't offered in runs with this adapter.
    """

    rank: int
    targets: tuple[str, ...]
    modules: int
    revision: str
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def check_name(name: str) -> str:
    """The name of an adapter. Raises ConfigError for what is none."""
    if not _NAMED.fullmatch(name):
        raise ConfigError(f"an adapter is named by letters, digits, '.', '-' and '_', not {name!r}")
    return name


def check_adapter(name: str | None, manifest: Manifest) -> None:
    """Raises UnknownAdapter, with those there are."""
    if name is None or name in manifest.adapters:
        return
    if not manifest.adapters:
        raise UnknownAdapter(f"{manifest.model} has no adapter {name!r}: it has none at all")
    close = difflib.get_close_matches(name, manifest.adapters, 1, 0.6)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UnknownAdapter(
        f"{manifest.model} has no adapter {name!r}; it has {', '.join(sorted(manifest.adapters))}{hint}",
        details={"adapters": sorted(manifest.adapters)},
    )


def check_revision(revision: str, runs: Iterable[Run], manifest: Manifest) -> None:
    """Whether a graph was recorded against what is served: the model, and the adapters that its runs choose.

    Raises:
        UnknownAdapter: one isn't there any more.
        ModelUpdated: something else is.
    """
    runs = tuple(runs)
    for run in runs:
        check_adapter(run.adapter, manifest)
    now = revision_of(runs, manifest)
    if revision != now:
        raise ModelUpdated(
            f"{manifest.model} is served at revision {_short(now)}, the graph was recorded against "
            f"{_short(revision)}; record it again"
        )


def revision_of(runs: Iterable[Run], manifest: Manifest) -> str:
    """Of all that decides what runs give: the model's own, and those of the adapters that they choose.

    So a new adapter, or another's new weights, is nothing to jobs that don't use it.
    """
    return _revision({run.adapter for run in runs if run.adapter is not None}, manifest)


def revision_of_all(manifest: Manifest) -> str:
    """Of all that a copy of a model serves: the model's own, and those of all its adapters."""
    return _revision(manifest.adapters, manifest)


def _revision(adapters: Iterable[str], manifest: Manifest) -> str:
    used = sorted(adapters)
    if not used:
        return manifest.revision
    marks = [f"{name}={manifest.adapters[name].revision}" for name in used if name in manifest.adapters]
    return f"{manifest.revision}+{hashlib.sha256(' '.join(marks).encode()).hexdigest()[:16]}"


def _short(revision: str) -> str:
    own, plus, adapters = revision.partition("+")
    return own[:12] + plus + adapters[:6]


def encode_adapters(adapters: Mapping[str, AdapterInfo]) -> dict[str, Any]:
    """The plain form of adapters by name."""
    return {
        name: {
            "rank": info.rank,
            "targets": list(info.targets),
            "modules": info.modules,
            "revision": info.revision,
            "refused": {owner: dict(reasons) for owner, reasons in info.refused.items()},
        }
        for name, info in adapters.items()
    }


def decode_adapters(plain: Any) -> dict[str, AdapterInfo]:
    """Raises KeyError, TypeError, ValueError or AttributeError if malformed."""
    return {
        str(name): AdapterInfo(
            rank=int(entry["rank"]),
            targets=tuple(map(str, entry["targets"])),
            modules=int(entry["modules"]),
            revision=str(entry["revision"]),
            refused={
                str(owner): {str(point): str(reason) for point, reason in reasons.items()}
                for owner, reasons in entry["refused"].items()
            },
        )
        for name, entry in plain.items()
    }
