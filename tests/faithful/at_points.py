"""A named point of a tiny model: as our language has it, and as hooks and arithmetic by hand have it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import by_hand
import torch
from by_hand import BLOCK, HANDS, TAPS
from interpose import LanguageModel
from interpose.runtime.engine import Engine
from models import tiny
from sharding import split
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from twins import close, same

ROW = [7, 21, 90, 33, 150, 61, 12]
"""The prompt of most tests."""

COMPUTED = {"head_out"}
"""What the model never makes: sums are done in another order."""

OWN_ATTENTION = {"bloom": "self_attention", "mpt": "attn", "falcon": "self_attention"}
"""Families outside the library's attention interface, and the module that attends."""


SHARDS: ContextVar[int] = ContextVar("shards", default=0)
"""Over how many shards our models are split; 0 for none."""


def ours(arch: str) -> Any:
    return _ours(arch, SHARDS.get())


@cache
def _ours(arch: str, shards: int) -> Any:
    torch.set_num_threads(1)
    model = LanguageModel(str(tiny(arch)))
    if shards:
        local = model._access.local
        local.engine = Engine(split(local.loaded, shards))
    return model


@cache
def stock(folder: Path, arch: str, eager: bool) -> Any:
    kind = AutoModelForMaskedLM if arch == "bert" else AutoModelForCausalLM
    options = {"attn_implementation": "eager"} if eager else {}
    # As served: weights that ask for gradients put some of Mamba's kernels on another path.
    return kind.from_pretrained(folder, **options).eval().requires_grad_(False)


def inputs(arch: str, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What a tokenizer would give for rows of one length."""
    ids = torch.tensor(rows)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if arch in ("gpt2", "bert") and len(rows) > 1:
        # Left alone they look their positions up once for all rows.
        given["position_ids"] = torch.arange(ids.shape[1]).expand(len(rows), -1)
    # A cache, which one forward doesn't need, changes how keys lie in memory, and with it last bits.
    return given if arch == "bert" else {**given, "use_cache": False}


@dataclass(frozen=True)
class At:
    """A named point of an architecture, in block `BLOCK` or (`inside` is false) of the whole model."""

    arch: str
    name: str
    inside: bool

    def owner(self, model: Any) -> Any:
        return model.layers[BLOCK] if self.inside else model

    def read(self, model: Any) -> Any:
        return getattr(self.owner(model), self.name)

    @property
    def stock(self) -> Any:
        """The library's model, on the path through attention that ours is on when somebody looks here."""
        return stock(tiny(self.arch), self.arch, self.name in TAPS and self.arch not in OWN_ATTENTION)

    @property
    def factor(self) -> float:
        """Granite adds its sublayers' results times a factor of its config."""
        return 0.3 if self.arch == "granite" and self.name in ("attn_out", "mlp_out") else 1.0

    @property
    def exact(self) -> bool:
        """Whether a write here and the same by hand are the same arithmetic, to the bit."""
        return self.name not in COMPUTED and self.factor == 1.0

    def agree(self, found: Tensor, expected: Tensor) -> None:
        (same if self.exact else close)(found, expected)

    @contextmanager
    def caught(self, edit: by_hand.Edit | None = None, rows: int = 1) -> Iterator[list[Tensor]]:
        """Forwards of `stock` made inside have their value caught, or changed in place by `edit`."""
        with _caught(self, edit, rows) as values:
            found: list[Tensor] = []
            yield found
            found += [value * self.factor if self.factor != 1.0 else value for value in values]

    @torch.no_grad()
    def hand(
        self, edit: by_hand.Edit | None = None, rows: Sequence[Sequence[int]] = (ROW,)
    ) -> tuple[Tensor, Tensor]:
        """The value and the logits, by hand."""
        with self.caught(edit, len(rows)) as values:
            logits = self.stock(**inputs(self.arch, rows)).logits
        return values[0], logits


def _caught(at: At, edit: by_hand.Edit | None, rows: int) -> Any:
    blocks, inside, outside = HANDS[at.arch]
    path, model, name = f"{blocks}.{BLOCK}", at.stock, at.name
    if name in TAPS and at.arch in OWN_ATTENTION:
        return by_hand.called(model.get_submodule(f"{path}.{OWN_ATTENTION[at.arch]}"), name, at.arch, edit)
    if name in TAPS:
        return by_hand.tapped(_attention(model, path), name, edit)
    if name == "logits":
        return by_hand.answered(model, edit)
    if name in outside:
        return by_hand.spotted(model, outside[name].module, outside[name], edit, rows)
    if name == "head_out":
        return by_hand.split_by_head(model.get_submodule(f"{path}.{inside['z'].module}"), inside["z"].cut, edit)
    if name == "router_logits" and edit is not None:
        return by_hand.rerouted(model.get_submodule(f"{path}.mlp.gate"), edit, rows)
    if edit is not None and at.factor != 1.0:
        edit = by_hand.scaled(edit, at.factor)
    return by_hand.spotted(model, f"{path}.{inside[name].module}".rstrip("."), inside[name], edit, rows)


def _attention(model: nn.Module, path: str) -> nn.Module:
    """The module that calls the attention function: of the block's the one with projections of its own."""
    found = [m for n, m in model.get_submodule(path).named_modules() if n in ("self_attn", "attn", "attention")]
    inner = dict(model.get_submodule(path).named_modules()).get("attention.self")
    return inner if inner is not None else found[0]


def offered(arch: str) -> list[At]:
    """What the manifest offers, in its order."""
    manifest = ours(arch).manifest
    inside = [At(arch, name, True) for name in manifest.named[manifest.blocks[BLOCK]]]
    return inside + [At(arch, name, False) for name in manifest.named[""]]


def module(model: Any, path: str) -> Any:
    """A module of ours by its path."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model
