"""How a loaded model wants to be fed, found out by running it: token ids, images, positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.inputs import BATCH, FREE, IMAGE, SEQ, Input
from . import nests
from .inputs import Feeding, principal, sample_rows, text_config
from .layouts import weights_dtype
from .pieces import GRID, Piece, joined


@torch.no_grad()
def measure_feeding(model: nn.Module, device: torch.device | str) -> Feeding:
    """What `model` wants: names from its signature, sizes from its config, all of it tried."""
    accepts = frozenset(inspect.signature(model.forward).parameters)
    feeding = Feeding(accepts, ids="input_ids" in accepts)
    failed = _fails(model, feeding, device) if feeding.ids else "its forward takes no input_ids"
    if not failed:
        return _beside(model, _positioned(model, feeding, device), device)
    for images in _image_inputs(model, feeding):
        needed = {name: replace(one, required=True) for name, one in images.items()}
        trial = _with_places(model, replace(feeding, inputs=needed), device)
        if not _fails(model, trial, device):
            return _positioned(model, trial, device) if trial.ids else trial
    return replace(feeding, note=failed)


def examples(
    model: nn.Module, feeding: Feeding, lengths: Sequence[int], images: Sequence[int] | None = None
) -> list[Piece]:
    """One piece for each row to try a model on.

    Args:
        lengths: tokens of each row; for a model that takes none only their number counts.
        images: of each row; by default one where the model needs them, else none.
    """
    one = any(spec.required for spec in feeding.inputs.values() if spec.dims[0] in (IMAGE, FREE))
    counts = [int(one)] * len(lengths) if images is None else images
    rows = sample_rows(model, lengths) if feeding.ids else [[] for _ in lengths]
    return [
        _example(model, feeding, row, count, index)
        for index, (row, count) in enumerate(zip(rows, counts, strict=True))
    ]


def places(model: nn.Module, feeding: Feeding) -> int:
    """How many positions an image of an example takes, with the token that keeps it apart from the next."""
    return 0 if feeding.image_token is None else 1 + (feeding.image_tokens or _Grid.of(model).tokens)


def _example(model: nn.Module, feeding: Feeding, row: list[int], images: int, seed: int) -> Piece:
    row = list(row)
    if feeding.image_token is not None and images:
        taken = feeding.image_tokens or _Grid.of(model).tokens
        for first in range(1, 1 + images * (taken + 1), taken + 1):
            row[first : first + taken] = [feeding.image_token] * taken
    tensors = {}
    for name, one in feeding.inputs.items():
        if one.required or (images and _comes_with_images(feeding, name)):
            tensors[name] = _value(model, feeding, name, one, row, images, seed)
    return Piece([row], tensors)


def _comes_with_images(feeding: Feeding, name: str) -> bool:
    return feeding.inputs[name].dims[0] in (IMAGE, FREE) or feeding.image_token is not None


def _value(
    model: nn.Module, feeding: Feeding, name: str, one: Input, row: list[int], images: int, seed: int
) -> Tensor:
    if name in _TYPES:
        return torch.tensor([[int(token == feeding.image_token) for token in row]])
    grid = _Grid.of(model)
    if name == GRID:
        return torch.tensor([list(grid.size)] * images)
    first: dict[int | str, int] = {IMAGE: images, BATCH: 1, FREE: images * grid.patches}
    shape = [dim if isinstance(dim, int) else first[dim] for dim in one.dims]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(getattr(torch, one.dtype))


# -- what there may be beside token ids ----------------------------------------------------------------------------

_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Inputs that say of each token what it is."""


@dataclass(frozen=True)
class _Grid:
    """One small image as models take it that cut images to patches beforehand."""

    size: tuple[int, int, int]
    merged: int

    @classmethod
    def of(cls, model: nn.Module) -> _Grid:
        merge = getattr(_vision_config(model), "spatial_merge_size", 1)
        return cls((1, 2 * merge, 2 * merge), merge**2)

    @property
    def patches(self) -> int:
        return self.size[0] * self.size[1] * self.size[2]

    @property
    def tokens(self) -> int:
        return self.patches // self.merged


def _vision_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "vision_config", None) or config


def _image_inputs(model: nn.Module, feeding: Feeding) -> list[dict[str, Input]]:
    """Ways in which a model may take images, each a set of inputs given together."""
    if "pixel_values" not in feeding.accepts:
        return []
    config = _vision_config(model)
    dtype = weights_dtype(model)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    if GRID in feeding.accepts:
        patch = getattr(config, "patch_size", 0)
        width = channels * getattr(config, "temporal_patch_size", 1) * patch * patch
        found = {"pixel_values": Input((FREE, width), dtype), GRID: Input((FREE, 3), "int64")}
        if "mm_token_type_ids" in feeding.accepts:
            found["mm_token_type_ids"] = Input((BATCH, SEQ), "int64", below=3)
        return [found]
    size = getattr(config, "image_size", None)
    if size is None:
        return []
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    first = IMAGE if feeding.ids else BATCH
    pixels = {"pixel_values": Input((first, channels, height, width), dtype)}
    if feeding.ids and "token_type_ids" in feeding.accepts:
        return [pixels | {"token_type_ids": Input((BATCH, SEQ), "int64", below=2)}, pixels]
    return [pixels]


def _beside(model: nn.Module, feeding: Feeding, device: torch.device | str) -> Feeding:
    """With what a model that runs on token ids alone takes beside them."""
    kinds = getattr(text_config(model), "type_vocab_size", None)
    if "token_type_ids" in feeding.accepts and isinstance(kinds, int) and kinds > 1:
        trial = replace(feeding, inputs={"token_type_ids": Input((BATCH, SEQ), "int64", below=kinds)})
        if not _fails(model, trial, device, {"token_type_ids": torch.ones((1, 6), dtype=torch.int64)}):
            return trial
    for images in _image_inputs(model, feeding):
        trial = _with_places(model, replace(feeding, inputs=images), device)
        if trial.image_token is not None and not _fails(model, trial, device, images=1):
            return trial
    return feeding


def _with_places(model: nn.Module, feeding: Feeding, device: torch.device | str) -> Feeding:
    """With the token that holds an image's place, and how many of it an image takes, where there is one."""
    config = getattr(model, "config", None)
    names = ("image_token_id", "image_token_index")
    token = next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
    if token is None or not feeding.ids:
        return feeding
    patches = _Grid.of(model).merged if GRID in feeding.inputs else 0
    return replace(feeding, image_token=token, image_tokens=_places(model, feeding, device), image_patches=patches)


def _places(model: nn.Module, feeding: Feeding, device: torch.device | str) -> int:
    """How many tokens one image becomes; 0 where that is the image's own."""
    make: Callable[..., Any] | None = getattr(model, "get_image_features", None)
    one = feeding.inputs["pixel_values"]
    if make is None or one.free:
        return 0
    sizes = [dim for dim in one.dims if isinstance(dim, int)]
    pixels = torch.zeros(2, *sizes, dtype=getattr(torch, one.dtype), device=device)
    try:
        made = make(pixel_values=pixels)
    except Exception:  # noqa: BLE001 - then what follows fails too, and images aren't offered
        return 0
    found = nests.tensors(getattr(made, "pooler_output", made))
    return sum(tensor.shape[:-1].numel() for _, tensor in found) // 2


# -- trying --------------------------------------------------------------------------------------------------------


def _fails(
    model: nn.Module,
    feeding: Feeding,
    device: torch.device | str,
    tensors: Mapping[str, Tensor] | None = None,
    images: int | None = None,
) -> str:
    """Why a model doesn't run on an example, "" if it does."""
    try:
        length = 6 + (images or 0) * places(model, feeding)
        (piece,) = examples(model, feeding, [length], None if images is None else [images])
        piece = Piece(piece.rows, {**piece.tensors, **(tensors or {})})
        principal(model(**feeding.kwargs(joined([[piece]], feeding.inputs, device))))
    except Exception as error:  # noqa: BLE001 - a model's own forward may raise anything, and loading goes on
        return f"its forward fails on {'token ids alone' if feeding.ids else 'images'}: {error}"
    return ""


def _positioned(model: nn.Module, feeding: Feeding, device: torch.device | str) -> Feeding:
    """With how positions are given to it, found by comparing runs."""
    if "position_ids" not in feeding.accepts:
        return feeding
    pad = getattr(text_config(model), "pad_token_id", None)
    inputs = joined([examples(model, feeding, [6])], feeding.inputs, device)
    plain: dict[str, Any] = feeding.kwargs(inputs)
    expected = _moving(model(**plain))
    for offset in (0, *([pad + 1] if isinstance(pad, int) else [])):
        try:
            given = _moving(model(**plain, position_ids=inputs.position_ids + offset))
        except Exception:  # noqa: BLE001 - some take them in another form
            continue
        if torch.allclose(given, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
            stated = torch.equal(given, expected) and _looks_up_once(model, device, feeding)
            return replace(feeding, offset=offset, stated=stated)
    return feeding


def _moving(output: Any) -> Tensor:
    return principal(output).float()


def _looks_up_once(model: nn.Module, device: torch.device | str, feeding: Feeding) -> bool:
    """Whether some table of the model is looked up for one row, where there are several."""
    found: list[int] = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(len(output))

    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        model(**feeding.kwargs(joined([examples(model, feeding, [3, 3])], feeding.inputs, device)))
    finally:
        for handle in handles:
            handle.remove()
    return 1 in found
