"""A split model as the engine has it: home's part, with the manifest of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import attention, named
from ..attention import READABLE
from ..feeding import examples, measure_feeding
from ..inputs import Feeding, device_of
from ..loading import Loaded, described
from ..pieces import joined
from .merging import merged
from .route import Nest
from .sites import Sites, Split
from .slices import Report
from .stubs import Dispatcher
from .trial import tried

Ask = Callable[[Feeding, Mapping[str, Nest]], Sequence[Report]]
"""How the model is fed and what its blocks return -> what every slice shows."""


@torch.no_grad()
def measure_split(home: nn.Module, dispatcher: Dispatcher, name: str, tokenizer: Any, ask: Ask) -> Loaded:
    """Measure a split model. Its shards serve forwards by now; `ask` has each measure its slice.

    Args:
        home: the model with stubs, in eval mode.
        tokenizer: one of the transformers library, if there is one.

    Raises:
        ConfigError: it can't be split.
    """
    home.requires_grad_(False)
    device = device_of(home)
    feeding = measure_feeding(home, device)
    if feeding.works:
        # Its first forward tells what each block returns, too.
        rows = [examples(home, feeding, lengths) for lengths in ([5], [6, 4])]
        tried(home, [feeding.kwargs(joined([row], feeding.inputs, device)) for row in rows])
    whole = merged(ask(feeding, dict(dispatcher.outputs)))
    if whole.measured.attention == READABLE:
        attention.adopt(home)
    loaded = described(
        home, name, tokenizer, feeding, whole.measured, revision=whole.revision, parameters=whole.parameters
    )
    manifest = loaded.manifest
    manifest = replace(
        manifest,
        dtype=whole.dtype,
        architecture=manifest.architecture,
        config={**manifest.config, "parameters": whole.parameters},
    )
    found = named.offering(replace(loaded, manifest=manifest), whole.found)
    return replace(found, split=Split(dispatcher.route, Sites(dispatcher.route.sites, found.manifest)))
