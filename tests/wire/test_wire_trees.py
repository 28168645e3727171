import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpose.errors import BadArgument, InvalidPayload
from interpose.wire.trees import flatten, unflatten

plain = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=5)
)
nests = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(-9, 9), inner, max_size=3)
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(nests)
def test_nests_survive(value):
    tree, tensors = flatten(value)
    assert not tensors
    again = unflatten(tree, [])
    assert again == value
    assert repr(again) == repr(value)


def test_tensors_are_numbered_in_order_and_sent_once():
    a, b = torch.zeros(2), np.ones(3)
    tree, tensors = flatten({"x": (a, b), 2: [a, None]})
    assert [id(tensor) for tensor in tensors] == [id(a), id(b)]
    assert tree == {"dict": [["x", {"tuple": [{"tensor": 0}, {"tensor": 1}]}], [2, [{"tensor": 0}, None]]]}
    assert unflatten(tree, ["A", "B"]) == {"x": ("A", "B"), 2: ["A", None]}


def test_numbers_json_cannot_write_are_tagged():
    assert flatten([math.inf, -math.inf])[0] == [{"float": "inf"}, {"float": "-inf"}]
    assert math.isnan(unflatten(flatten(math.nan)[0], []))


def test_a_dict_that_looks_like_a_tag_stays_a_dict():
    assert unflatten(flatten({"tensor": 0})[0], []) == {"tensor": 0}


@pytest.mark.parametrize("value", [object(), {1.5: 2}, {None: 1}, {"a": {1, 2}}, b"bytes", 2**63, 1j, print])
def test_other_values_are_refused(value):
    with pytest.raises(BadArgument):
        flatten(value)


@pytest.mark.parametrize(
    "tree",
    [
        {"tensor": 1},
        {"tensor": -1},
        {"tensor": True},
        {"tensor": "0"},
        {"tuple": 1},
        {"dict": [["a"]]},
        {"dict": [["a", 1], ["a", 2]]},
        {"dict": [[None, 1]]},
        {"dict": [[[], 1]]},
        {"float": 1.5},
        {"float": []},
        {"import": "os"},
        {1: 2},
        {},
        {"tensor": 0, "x": 1},
        b"",
        2**63,
    ],
)
def test_malformed_trees_are_refused(tree):
    with pytest.raises(InvalidPayload):
        unflatten(tree, ["only"])


def test_deep_trees_are_refused_on_both_sides():
    deep: list = []
    for _ in range(40):
        deep = [deep]
    with pytest.raises(BadArgument):
        flatten(deep)
    with pytest.raises(InvalidPayload):
        unflatten(deep, [])
