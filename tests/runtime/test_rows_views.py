"""A cut is the run's own part of a shared tensor, and writing it back touches nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpose.errors import ShapeMismatch
from interpose.graph.manifest import BATCH, BATCH_SEQ, KEY, SEQ, Leaf
from interpose.runtime.rows import Span, View

LAYOUTS = [(BATCH, SEQ, 3), (BATCH, 2, SEQ, KEY), (BATCH_SEQ, 3), (2, BATCH, SEQ), (SEQ, BATCH), (BATCH,)]


@given(st.sampled_from(LAYOUTS), st.data())
def test_cut_and_paste(dims: tuple[int | str, ...], data: st.DataObject) -> None:
    rows, total = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    row = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(1, rows - row))
    start = data.draw(st.integers(0, total - 1))
    length = data.draw(st.integers(1, total - start))
    spec = Leaf(dims, "float32").spec(rows, total)
    assert spec is not None
    tensor = torch.arange(spec.numel, dtype=torch.float32).reshape(spec.shape)
    before = tensor.clone()
    view = View(
        Leaf(dims, "float32"), Span(row, count, start, length, start, length), Span.whole(rows, total, total)
    )
    cut = view.cut(tensor)
    wanted = Leaf(dims, "float32").spec(count, length)
    assert wanted is not None
    assert tuple(cut.shape) == wanted.shape
    view.paste(tensor, -1 - cut)
    changed = tensor != before
    assert int(changed.sum()) == wanted.numel
    assert torch.equal(view.cut(tensor).sort().values, (-1 - view.cut(before)).sort().values)
    assert set(before[changed].tolist()) == set(view.cut(before).flatten().tolist())


def test_a_value_of_another_shape_is_not_cut() -> None:
    view = View(Leaf((BATCH, SEQ, 3), "float32"), Span(0, 1, 0, 2, 0, 2), Span.whole(2, 4, 4))
    for shape in ((2, 5, 3), (1, 4, 3), (2, 4)):
        with pytest.raises(ShapeMismatch, match="exclusive"):
            view.cut(torch.zeros(shape))


def test_values_that_belong_to_no_row_stay_whole() -> None:
    tensor = torch.zeros(1, 4, 3)
    view = View(Leaf((1, SEQ, 3), "float32"), Span(0, 1, 0, 2, 0, 2), Span.whole(2, 4, 4))
    assert view.whole
    assert view.cut(tensor) is tensor
