"""Every architecture, every named point, every kind of intervention: the same numbers as by hand."""

from __future__ import annotations

import pytest
from matrix import KINDS, cells
from models import ARCHITECTURES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_point(arch: str, kind: str) -> None:
    there, refused, _ = cells(arch, kind)
    if there:
        KINDS[kind].check(there)
    for at in refused:
        with pytest.raises(KINDS[kind].error):
            KINDS[kind].check([at])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_tried_on_most_points(kind: str) -> None:
    counts = [[len(part) for part in cells(arch, kind)] for arch in ARCHITECTURES]
    there, refused, excused = (sum(column) for column in zip(*counts, strict=True))
    assert there > (6 if kind != "module call" else 1) * (refused + excused)
