"""The named points of a loaded model: found by its family's entry, tried on numbers, kept if they hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import InterposeError
from ...graph.manifest import Manifest, ModuleInfo
from ...graph.named import BLOCK, MODEL, Named, encode_named
from ..adapters import chosen
from ..feeding import examples, places
from ..inputs import text_config
from ..pieces import Piece, joined
from .block import Block, figure
from .build import build
from .checks import Bench
from .ends import chain, ends, whole
from .families import MAMBA, Family, find
from .verify import ANCHORS, Trial

if TYPE_CHECKING:
    from ..loading import Loaded

LENGTH = 6
"""Tokens of the run that proves the points."""

_UNKNOWN = "no family known here is built like this model; its modules' own points are there"

GENERIC = replace(
    MAMBA, name="", types=(), attn_norm=(), final_norm="", says={"attention": _UNKNOWN, "mlp": _UNKNOWN}
)
"""For models of no known family: what enters and leaves the blocks is measured for every model."""

_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")
"""What norms after the last block are called, to be tried where no entry says."""


@dataclass(frozen=True)
class Tower:
    """One list of blocks while its points are found.

    Attributes:
        sample: what it is tried on.
        main: whether it is the list that `layers` means, so that the model's own points hang together with it.
    """

    blocks: Sequence[Block]
    family: Family
    config: Any
    sample: Piece
    main: bool


@dataclass(frozen=True)
class Findings:
    """Owner -> name -> point that holds, and the reasons of the rest."""

    named: Mapping[str, Mapping[str, Named]]
    refused: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Refused:
    """Points that don't hold with an adapter.

    Attributes:
        points: owner -> name -> why.
        written: of these, what came of writing the first block of a kind, by that block; it holds for all `alike`.
    """

    points: Mapping[str, Mapping[str, str]]
    written: Mapping[str, Mapping[str, str]]


def settle(loaded: Loaded) -> Loaded:
    """The model with those named points in its manifest that hold, and the reasons of the rest."""
    return offering(loaded, search(loaded))


def offering(loaded: Loaded, found: Findings) -> Loaded:
    """The model with these points in its manifest."""
    return _kept(loaded, found.named, found.refused, _roles(loaded.model, found.named))


@torch.no_grad()
def search(loaded: Loaded, absent: Collection[str] = ()) -> Findings:
    """Try every named point of a model's blocks and of the model itself.

    Args:
        absent: blocks that only hand on what they are given: of these no more is tried than that they do.
    """
    manifest = loaded.manifest
    if not manifest.stream or not loaded.feeding.works:
        reason = (
            "it has no list of blocks that hand on hidden states" if loaded.feeding.works else loaded.feeding.note
        )
        return Findings({}, {"": dict.fromkeys((*MODEL, *BLOCK), reason)})
    towers = [_tower(loaded, paths) for paths in manifest.towers.values() or (manifest.blocks,)]
    blocks = [block for tower in towers for block in tower.blocks]
    named: dict[str, dict[str, Named]] = {"": {}, **{block.path: block.named for block in blocks}}
    refused: dict[str, dict[str, str]] = {"": {}, **{block.path: block.refused for block in blocks}}
    for name, found in _whole(loaded, towers):
        if isinstance(found, Named):
            named[""][name] = found
        else:
            refused[""][name] = found
    trying = _kept(loaded, named, refused, {})
    for tower in towers:
        kinds = [[owner for owner in kind if owner not in absent] for kind in alike(trying.manifest)]
        for (owner, name), reason in _tried(trying, tower, kinds, absent=absent).failed.items():
            del named[owner][name]
            refused[owner][name] = reason
    return Findings(named, refused)


@torch.no_grad()
def refused_with(loaded: Loaded, adapter: str, absent: Collection[str] = ()) -> Refused:
    """Which of a model's named points don't hold in runs with an adapter.

    Args:
        absent: as of `search`. Of each kind of block the first alone is written, as in a whole model, so that where
            it is absent none is.
    """
    manifest = loaded.manifest
    points: dict[str, dict[str, str]] = {}
    written: dict[str, dict[str, str]] = {}
    if not manifest.named:
        return Refused(points, written)
    kinds = [[owner for owner in kind if owner not in absent] for kind in alike(manifest) if kind[0] not in absent]
    with chosen(loaded.adapters, adapter):
        for tower in [_tower(loaded, paths) for paths in manifest.towers.values() or (manifest.blocks,)]:
            trial = _tried(loaded, tower, kinds, adapter, absent)
            for into, found in ((points, trial.failed), (written, trial.written)):
                for (owner, name), reason in found.items():
                    into.setdefault(owner, {})[name] = reason
    return Refused(points, written)


def _tower(loaded: Loaded, paths: tuple[str, ...]) -> Tower:
    manifest, feeding = loaded.manifest, loaded.feeding
    main = paths == manifest.blocks
    config = text_config(loaded.model) if main else _config(loaded, paths[0])
    family = _family(loaded, paths[0], config)
    blocks = [
        build(Block(path, family, config, manifest.modules, loaded.modules, manifest.attention)) for path in paths
    ]
    images = [1] if not main and feeding.image_token is not None else None
    length = LENGTH + (places(loaded.model, feeding) if images else 0)
    (sample,) = examples(loaded.model, feeding, [length], images)
    return Tower(blocks, family, config, sample, main)


def _config(loaded: Loaded, path: str) -> Any:
    """The config of a block: that of the first module in it which has one, else the model's."""
    inside = (module for name, module in loaded.modules.items() if f"{name}.".startswith(f"{path}."))
    found = next((config for module in inside if (config := getattr(module, "config", None)) is not None), None)
    return found if found is not None else text_config(loaded.model)


def _whole(loaded: Loaded, towers: Sequence[Tower]) -> Iterator[tuple[str, Named | str]]:
    """The model's own points, or why there is none."""
    tower = next((tower for tower in towers if tower.main), None)
    if tower is not None:
        yield from whole(loaded.model, tower.family, _base(loaded.manifest), loaded.manifest.modules)
        return
    for name in MODEL:
        yield (
            name,
            f"it has several lists of blocks, {', '.join(loaded.manifest.towers)}; their modules' points are there",
        )


def _family(loaded: Loaded, first: str, config: Any) -> Family:
    found = find(getattr(config, "model_type", ""), lambda name: f"{first}.{name}" in loaded.modules)
    if found is not None:
        return found
    if first not in loaded.manifest.blocks:
        return GENERIC
    base = _base(loaded.manifest)
    norms = (name for name in _NORMS if (f"{base}.{name}" if base else name) in loaded.modules)
    return replace(GENERIC, final_norm=next(norms, ""))


def _base(manifest: Manifest) -> str:
    """Path of the module that holds the list of blocks."""
    return manifest.blocks[0].rpartition(".")[0].rpartition(".")[0]


def _kept(
    loaded: Loaded,
    named: Mapping[str, Mapping[str, Named]],
    refused: Mapping[str, Mapping[str, str]],
    roles: Mapping[str, str],
) -> Loaded:
    """The model with a manifest that offers these points; a reason that holds for every block is told once."""
    manifest = loaded.manifest
    shared = {
        name: reason
        for name, reason in refused.get(manifest.blocks[0] if manifest.blocks else "", {}).items()
        if all(refused.get(path, {}).get(name) == reason for path in manifest.blocks)
    }
    told = {
        owner: {name: reason for name, reason in reasons.items() if not owner or shared.get(name) != reason}
        for owner, reasons in refused.items()
    }
    told[""] = {**told.get("", {}), **shared}
    kept = replace(
        manifest,
        modules=_streams(manifest.modules, named),
        named={owner: dict(points) for owner, points in named.items() if points},
        refused={owner: reasons for owner, reasons in told.items() if reasons},
        roles=dict(roles),
    )
    return replace(loaded, manifest=kept)


def _streams(modules: Mapping[str, ModuleInfo], named: Mapping[str, Mapping[str, Named]]) -> dict[str, ModuleInfo]:
    """The modules, with "stream" points where named points lie in them and nowhere else."""
    wanted = {p.point.module for points in named.values() for p in points.values() if p.point.name == "stream"}
    found = dict(modules)
    for path in wanted:
        info = modules[path]
        found[path] = replace(
            info,
            points={**info.points, "stream": info.points["inputs"]},
            events={**info.events, "stream": info.events["enter"]},
        )
    return found


def _tried(
    loaded: Loaded,
    tower: Tower,
    kinds: Sequence[Sequence[str]],
    adapter: str | None = None,
    absent: Collection[str] = (),
) -> Trial:
    """Try the points of one list of blocks. `kinds`: owners that are alike, of any list."""
    from ..engine import Engine  # it runs what is loaded, and this is part of loading

    manifest = loaded.manifest
    rotations = _rotations(loaded, tower)
    benches = [Bench(block, rotations.get(block.path)) for block in tower.blocks if block.path not in absent]
    identities = [identity for bench in benches for identity in bench.identities()]
    identities += chain([block.path for block in tower.blocks])
    if tower.main:
        identities += ends(loaded, tower.family, tower.config, tower.sample)
    owners = {block.path for block in tower.blocks} | ({""} if tower.main else set())
    points = {
        (owner, name): point
        for owner, points in manifest.named.items()
        if owner in owners
        for name, point in points.items()
        if owner not in absent or name in ANCHORS
    }
    there = [
        identity
        for identity in identities
        if identity.output in points and all(name in points for name in identity.inputs)
    ]
    own = [[owner for owner in kind if owner in owners] for kind in kinds]
    dtype = getattr(torch, manifest.dtype, torch.float32)
    experts = figure(tower.config, "num_local_experts", "num_experts", "n_routed_experts") or 2
    trial = Trial(
        Engine(loaded),
        tower.sample,
        points,
        there,
        dtype,
        list(filter(None, own)),
        experts,
        adapter,
        bool(absent),
    )
    try:
        trial.run()
    except InterposeError as error:
        trial.failed |= dict.fromkeys(trial.points, f"it can't be tried: {error.message}")
    return trial


def alike(manifest: Manifest) -> list[list[str]]:
    """Owners in groups whose points are alike but for their paths."""
    found: dict[int, list[str]] = {}
    for owner, index in encode_named(manifest.named)["owners"].items():
        found.setdefault(index, []).append(owner)
    return list(found.values())


def _rotations(loaded: Loaded, tower: Tower) -> dict[str, tuple[Tensor, Tensor]]:
    """Block -> the cosines and sines its attention is given on the sample, where it is given any."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for block in tower.blocks:
        if not block.has(block.family.attn):
            continue

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = block.path) -> None:
            given = kwargs.get("position_embeddings")
            if isinstance(given, tuple) and len(given) == 2:
                found[path] = given

        handles.append(block.module(block.family.attn).register_forward_pre_hook(watch, with_kwargs=True))
    try:
        inputs = joined([[tower.sample]], loaded.feeding.inputs, loaded.device)
        loaded.model(**loaded.feeding.kwargs(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _roles(model: nn.Module, named: Mapping[str, Mapping[str, Named]]) -> dict[str, str]:
    """The modules that embed, normalise last and unembed, where these are verified."""
    names = {module: path for path, module in model.named_modules()}
    points = named.get("", {})
    found = {role: points[role].point.module for role in ("embed", "final_norm") if role in points}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if "logits" in points and head in names:
        found["unembed"] = names[head]
    return found
