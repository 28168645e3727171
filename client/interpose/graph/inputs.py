"""The tensors a model's forward takes beside token ids, or in place of them, and whether given ones fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BadArgument, IndexOutOfRange, InvalidGraph, ShapeMismatch
from .ops.dtypes import category
from .values import DTYPES, TensorSpec

if TYPE_CHECKING:
    from .manifest import Manifest
    from .model import Invoke, Run

BATCH, SEQ, IMAGE, FREE = "batch", "seq", "image", "?"
INPUT_DIMS = (BATCH, SEQ, IMAGE, FREE)

TOKENS = ("input_ids", "attention_mask")
"""Names under which a prompt's token ids come."""


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor input, as measured.

    Attributes:
        dims: what each dimension counts: rows, positions (those of the row's tokens), images (which belong to rows
            by the place of their tokens), a constant, or "?" for a number of its own, which keeps the run alone.
        dtype: of the values; for floating ones any floating dtype may be given.
        required: no run goes without it.
        below: values are whole numbers from 0 and below this: they index a table.
    """

    dims: tuple[int | str, ...]
    dtype: str
    required: bool = False
    below: int | None = None

    @property
    def free(self) -> bool:
        return FREE in self.dims

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.dims))}]"


def encode_inputs(inputs: Mapping[str, Input]) -> dict[str, Any]:
    """The plain form of inputs by name."""
    return {
        name: {"dims": list(one.dims), "dtype": one.dtype, "required": one.required, "below": one.below}
        for name, one in inputs.items()
    }


def decode_inputs(plain: Mapping[str, Any]) -> dict[str, Input]:
    """Raises InvalidGraph if malformed."""
    found = {}
    for name, entry in plain.items():
        dims = tuple(entry["dims"])
        if entry["dtype"] not in DTYPES or not all(
            dim in INPUT_DIMS or (type(dim) is int and dim >= 0) for dim in dims
        ):
            raise InvalidGraph("a manifest's input is malformed")
        below = entry["below"]
        if not dims or not (below is None or type(below) is int):
            raise InvalidGraph("a manifest's input is malformed")
        found[str(name)] = Input(dims, entry["dtype"], bool(entry["required"]), below)
    return found


def counted(invoke: Invoke, inputs: Mapping[str, Input], attachments: Mapping[str, TensorSpec]) -> int:
    """How many images an invoke has."""
    for name, sha in invoke.tensors.items():
        if name in inputs and inputs[name].dims[0] == IMAGE and sha in attachments:
            return attachments[sha].shape[0] if attachments[sha].shape else 0
    return 0


def alone(run: Run, inputs: Mapping[str, Input]) -> bool:
    """Whether a run shares its forward with nobody, for what it is given."""
    return any(inputs[name].free for name in run.given if name in inputs)


def check_inputs(run: Run, manifest: Manifest, attachments: Mapping[str, TensorSpec]) -> None:
    """What a run is given, against what the model takes: names, shapes, dtypes, numbers of rows and images.

    Raises:
        BadArgument: a name the model doesn't take, one that is missing, or another kind of numbers.
        ShapeMismatch: another shape.
    """
    inputs = manifest.inputs
    first = set(run.invokes[0].tensors) if run.invokes else set()
    for invoke in run.invokes:
        for name in invoke.tensors:
            if name not in inputs:
                raise BadArgument(f"{manifest.model} takes no input {name!r}; {_takes(manifest)}")
        missing = [name for name, one in inputs.items() if one.required and name not in invoke.tensors]
        if missing:
            raise BadArgument(f"{manifest.model} needs {', '.join(f'{name} {inputs[name]}' for name in missing)}")
        differ = {name for name in first ^ set(invoke.tensors) if inputs[name].dims[0] != IMAGE}
        if differ:
            raise BadArgument(
                f"all prompts of a run give the same inputs; only some give {', '.join(sorted(differ))}"
            )
        for name, sha in invoke.tensors.items():
            spec = attachments.get(sha)
            if spec is None:
                raise InvalidGraph(f"the input {name} names an attachment that the graph doesn't list")
            check_input(name, inputs[name], spec, len(invoke.rows), invoke.longest)
        _check_images(invoke, manifest, counted(invoke, inputs, attachments), attachments)


def check_input(name: str, one: Input, spec: TensorSpec, rows: int, longest: int) -> None:
    """One input of an invoke against the model's. Raises BadArgument, ShapeMismatch."""
    floating = category(one.dtype) == 2
    if category(spec.dtype) != category(one.dtype):
        kind = "floating-point numbers" if floating else f"{one.dtype} numbers"
        raise BadArgument(f"{name} takes {kind}, not {spec.dtype}")
    sizes = {BATCH: rows, SEQ: longest}
    fits = len(spec.shape) == len(one.dims) and all(
        size == sizes.get(dim, size) if isinstance(dim, str) else size == dim
        for size, dim in zip(spec.shape, one.dims, strict=True)
    )
    if not fits or not spec.shape or not math.prod(spec.shape):
        known = [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in one.dims]
        raise ShapeMismatch(f"{name} has shape {list(spec.shape)}, where {_shown(known)} is expected")


def check_values(name: str, one: Input, low: int, high: int) -> None:
    """The smallest and largest value of an input that indexes a table. Raises IndexOutOfRange."""
    if one.below is not None and not 0 <= low <= high < one.below:
        wrong = low if low < 0 else high
        raise IndexOutOfRange(f"{name} holds {wrong}, where the model takes 0 to {one.below - 1}")


def _check_images(invoke: Invoke, manifest: Manifest, images: int, attachments: Mapping[str, TensorSpec]) -> None:
    """In a shared forward an image's values go to the next places that wait for one, whoever's they are."""
    if manifest.image_token is None:
        return
    places = sum(row.count(manifest.image_token) for row in invoke.rows)
    if manifest.image_patches:
        _check_patches(invoke, manifest, places, attachments)
        return
    if images and places != images * manifest.image_tokens:
        raise BadArgument(
            f"{images} images take {images * manifest.image_tokens} places of token {manifest.image_token} in the "
            f"prompt, which has {places}"
        )
    if places and not images:
        raise BadArgument(f"the prompt has places for images (token {manifest.image_token}), and none is given")


def _check_patches(invoke: Invoke, manifest: Manifest, places: int, attachments: Mapping[str, TensorSpec]) -> None:
    """Patches against places, before a model works on more of them than its prompt has tokens for."""
    sha = invoke.tensors.get("pixel_values")
    patches = attachments[sha].shape[0] if sha is not None else 0
    if patches != places * manifest.image_patches:
        raise BadArgument(
            f"{patches} patches take {patches / manifest.image_patches:g} places of token {manifest.image_token} "
            f"in the prompt, which has {places}"
        )


def _takes(manifest: Manifest) -> str:
    names = [*(TOKENS if manifest.tokens else ()), *manifest.inputs]
    return f"it takes {', '.join(names)}"


def _shown(dims: Sequence[object]) -> str:
    return f"[{', '.join('any' if dim == FREE else 'images' if dim == IMAGE else str(dim) for dim in dims)}]"
