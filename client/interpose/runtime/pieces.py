"""Rows with the tensors that belong to them: what each prompt of a run brings, joined into one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import BadArgument
from ..graph.inputs import SEQ, Input, check_values
from ..graph.manifest import Manifest
from ..graph.model import Graph, Run
from .inputs import ModelInputs, batch_inputs

GRID = "image_grid_thw"
"""Sizes of images as numbers of patches, whose rows are those of `pixel_values`."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of token ids, and tensors of as many rows, or of images in the order of their places."""

    rows: Sequence[Sequence[int]]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def joined(
    runs: Sequence[Sequence[Piece]], inputs: Mapping[str, Input], device: torch.device | str = "cpu"
) -> ModelInputs:
    """One batch of several runs, each of several pieces; padded as by `batch_inputs`, tensors with zeros."""
    batch = batch_inputs([[row for piece in run for row in piece.rows] for run in runs], device)
    names = dict.fromkeys(name for run in runs for piece in run for name in piece.tensors)
    total = batch.input_ids.shape[1]
    tensors = {}
    for name in names:
        parts = [
            _padded(piece.tensors[name], inputs[name], width, total, device)
            for run, width in zip(runs, batch.widths, strict=True)
            for piece in run
            if name in piece.tensors
        ]
        tensors[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return replace(batch, tensors=tensors)


def _padded(tensor: Tensor, one: Input, width: int, total: int, device: torch.device | str) -> Tensor:
    made = tensor.to(device=device, dtype=getattr(torch, one.dtype))
    if SEQ not in one.dims:
        return made
    dim = one.dims.index(SEQ)
    left, right = width - made.shape[dim], total - width
    before = [made.new_zeros([*made.shape[:dim], size, *made.shape[dim + 1 :]]) for size in (left, right)]
    return torch.cat([before[0], made, before[1]], dim)


def pieces(run: Run, attachments: Mapping[str, Tensor]) -> list[Piece]:
    """What a run is given, one piece an invoke."""
    return [
        Piece(invoke.rows, {name: attachments[sha] for name, sha in invoke.tensors.items()})
        for invoke in run.invokes
    ]


def check_given(graph: Graph, attachments: Mapping[str, Tensor], manifest: Manifest) -> None:
    """Values that index tables, or say how large others are: in a shared forward a wrong one would fail everybody.

    Raises:
        IndexOutOfRange, BadArgument: one is.
    """
    for run in graph.runs:
        for piece in pieces(run, attachments):
            for name, tensor in piece.tensors.items():
                one = manifest.inputs[name]
                if one.below is not None:
                    check_values(name, one, int(tensor.min()), int(tensor.max()))
            grid, patches = piece.tensors.get(GRID), piece.tensors.get("pixel_values")
            if grid is None and patches is None:
                continue
            if GRID in manifest.inputs:
                _check_grid(grid, patches)


def _check_grid(grid: Tensor | None, patches: Tensor | None) -> None:
    if grid is None or patches is None:
        raise BadArgument(f"pixel_values and {GRID} come together")
    sizes = [[int(size) for size in image] for image in grid.tolist()]
    if not all(0 < size <= len(patches) for image in sizes for size in image):
        raise BadArgument(f"{GRID} holds sizes that pixel_values, {len(patches)} patches, can't have")
    asked = sum(one * two * three for one, two, three in sizes)
    if asked != len(patches):
        raise BadArgument(f"{GRID} counts {asked} patches, and pixel_values has {len(patches)}")
