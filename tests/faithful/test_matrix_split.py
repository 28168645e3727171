"""Split over shards, a model gives the same numbers as by hand, at every named point, to every intervention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from at_points import SHARDS
from matrix import KINDS, cells

SPLIT = {"gpt2": 3, "llama": 2, "gemma3": 3, "mixtral": 2, "mamba": 3, "bert": 2}
"""Architecture -> shards: what differs in masks, caches, experts, state, attention's interface, direction."""


@pytest.fixture(autouse=True, params=SPLIT)
def arch(request: pytest.FixtureRequest) -> Iterator[str]:
    token = SHARDS.set(SPLIT[request.param])
    yield request.param
    SHARDS.reset(token)


@pytest.mark.parametrize("kind", KINDS)
def test_every_point(arch: str, kind: str) -> None:
    there, refused, _ = cells(arch, kind)
    if there:
        KINDS[kind].check(there)
    for at in refused:
        with pytest.raises(KINDS[kind].error):
            KINDS[kind].check([at])
