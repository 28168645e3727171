"""The named points of the whole model, and how the blocks hang together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...graph.manifest import Leaf, ModuleInfo
from ...graph.model import Point
from ...graph.named import Named
from ..hooks import no_hooks
from ..offloaded import parameter
from ..pieces import Piece
from .block import factor
from .checks import Identity, Values
from .families import Family

if TYPE_CHECKING:
    from ..loading import Loaded


def whole(
    model: nn.Module, family: Family, base: str, infos: Mapping[str, ModuleInfo]
) -> Iterator[tuple[str, Named | str]]:
    """The model's own points, or why there is none: (name, Named or reason).

    Args:
        base: path of the module that holds the list of blocks.
    """
    names = {module: path for path, module in model.named_modules()}

    def found(module: Any) -> str | None:
        return names.get(module) if isinstance(module, nn.Module) else None

    def of(path: str | None, reason: str) -> Named | str:
        fits = path is not None and path in infos and isinstance(infos[path].points.get("output"), Leaf)
        return Named(Point(str(path), "output")) if fits else reason

    def below(name: str) -> str | None:
        """Beside the list of blocks, or beside the module that holds it."""
        places = (base, base.rpartition(".")[0])
        paths = [f"{place}.{name}" if place else name for place in places]
        return next((path for path in paths if path in infos), None) if name else None

    def positioned(one: Named | str) -> Named | str:
        fits = isinstance(one, str) or _dims(infos, one) == 3
        return one if fits else "its embedding makes no [row, position, hidden] tensor"

    yield "embed", positioned(of(embedding(model, found), "its embedding makes no single tensor"))
    positions = (
        family.says.get("pos_embed")
        or "it has no table of positions: they come in by rotation or slopes inside attention"
    )
    yield "pos_embed", of(_position(family, base), positions if not family.pos_embed else "its table isn't called")
    yield (
        "final_norm",
        of(below(family.final_norm), family.says.get("final_norm", "it has no norm after its last block")),
    )
    layout = infos[""].points.get("output")
    if isinstance(layout, dict) and isinstance(layout.get("logits"), Leaf):
        yield "logits", Named(Point("", "output", ("logits",)))
    else:
        yield "logits", "this model has no head that makes logits"


def _dims(infos: Mapping[str, ModuleInfo], named: Named) -> int:
    layout = infos[named.point.module].points.get("output")
    return len(layout.dims) if isinstance(layout, Leaf) else 0


def embedding(model: nn.Module, found: Callable[[Any], str | None]) -> str | None:
    """Path of the module that embeds the inputs, where `found` knows it; None without one."""
    try:
        return found(model.get_input_embeddings())  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _position(family: Family, base: str) -> str | None:
    if not family.pos_embed:
        return None
    # An encoder keeps its embeddings beside the module that holds its blocks.
    root = base.rpartition(".")[0] if family.pos_embed.startswith("embeddings.") else base
    return f"{root}.{family.pos_embed}" if root else family.pos_embed


# -- identities of the whole model -------------------------------------------------------------------------------


def chain(blocks: Sequence[str]) -> Iterator[Identity]:
    """How the blocks hang together."""
    for before, after in pairwise(blocks):
        says = "a block's resid_pre is the resid_post of the one before"
        yield Identity(says, (after, "resid_pre"), ((before, "resid_post"),), lambda v: [v["resid_post"]])


def ends(loaded: Loaded, family: Family, config: Any, sample: Piece) -> Iterator[Identity]:
    """What comes before the first block and after the last; of images only the latter."""
    manifest, modules = loaded.manifest, loaded.modules
    first, last = (manifest.blocks[0], "resid_pre"), (manifest.blocks[-1], "resid_post")
    points = manifest.named.get("", {})
    if "embed" in points and manifest.tokens:
        table = modules[points["embed"].point.module]
        ids = torch.tensor([list(row) for row in sample.rows], device=loaded.device)
        yield Identity("embed is a look-up of the tokens", ("", "embed"), (), lambda v: [_quiet(table, ids)])
    if "embed" in points and family.name and manifest.tokens:
        parts = tuple(name for name in ("embed", "pos_embed") if name in points)
        says = "the first resid_pre is made of " + " and ".join(parts)
        given = tuple(("", name) for name in parts)
        yield Identity(says, first, given, partial(_start, loaded, family, config))
    if "final_norm" in points:
        norm = modules[points["final_norm"].point.module]
        says = "final_norm is the norm of the last resid_post"
        yield Identity(says, ("", "final_norm"), (last,), lambda v: [_quiet(norm, v["resid_post"])])
    if not manifest.tokens:
        return
    source = ("", "final_norm") if "final_norm" in points else last
    says = f"logits are the unembedding of {source[1]}"
    yield Identity(says, ("", "logits"), (source,), partial(_end, loaded, family, config))


def _start(loaded: Loaded, family: Family, config: Any, v: Values) -> Sequence[Tensor]:
    """What the first block is given, from the embeddings."""
    total = v["embed"] * factor(config, family.embed_scale)
    total = total + v["pos_embed"] if "pos_embed" in v else total
    if not family.embed_norm:
        width = getattr(config, "hidden_size", None)
        scaled = [v["embed"] * torch.tensor(width**0.5, dtype=total.dtype)] if isinstance(width, int) else []
        return [total, *scaled]
    path = next(path for path in loaded.modules if path.endswith(family.embed_norm))
    types = loaded.modules.get(f"{path.rpartition('.')[0]}.token_type_embeddings")
    if isinstance(types, nn.Embedding):
        total = total + parameter(types, "weight")[0]
    return [_quiet(loaded.modules[path], total)]


def _end(loaded: Loaded, family: Family, config: Any, v: Values) -> Sequence[Tensor]:
    """The logits, from what the head is given."""
    if "final_norm" not in v:
        first = loaded.manifest.blocks[0]
        heads = [child for name, child in loaded.model.named_children() if not first.startswith(f"{name}.")]
        return [_quiet(head, v["resid_post"]) for head in heads]
    head = loaded.model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", v["final_norm"])
    logits = _quiet(head, v["final_norm"].to(weight.dtype))
    scale, cap = factor(config, family.logits_scale), getattr(config, family.logits_cap, None)
    made = [logits / scale, logits * scale]
    return [torch.tanh(way / cap) * cap for way in made] if isinstance(cap, (int, float)) else made


def _quiet(module: nn.Module, value: Tensor) -> Tensor:
    with no_hooks():
        return module(value)  # type: ignore[no-any-return]
