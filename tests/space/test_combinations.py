"""Masks that overlap come back from one map of combinations as they went in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewscan.errors import DataError, GeometryError
from fewscan.space import combinations
from fewscan.space.combinations import combine, mask_of
from fewscan.space.geometry import Geometry
from fewscan.space.volume import IGNORE, Labelmap


@given(seed=st.integers(0, 99), labels=st.integers(0, 21), share=st.floats(0, 1))
def test_masks_come_back(seed, labels, share):
    shape = (3, 4, 5)
    masks = np.random.default_rng(seed).random((labels, *shape)) < share
    codes, table = combine(masks, shape)
    assert table.shape[1] == labels
    assert not table[0].any()
    assert len(np.unique(table, axis=0)) == len(table)
    for k, mask in enumerate(masks):
        np.testing.assert_array_equal(mask_of(codes, table[:, k]), mask)


def test_what_nobody_looked_at_holds_nothing():
    label = Labelmap(
        np.array([[[0, 1, IGNORE]]], np.uint16), Geometry((1, 1, 3), np.eye(4)), {4: "a"}, np.array([[False], [True]])
    )
    assert label.mask(4)[0, 0].tolist() == [False, True, False]


def test_too_many_combinations_are_refused(monkeypatch):
    monkeypatch.setattr(combinations, "MOST", 2)
    masks = np.eye(3, dtype=bool).reshape(3, 3, 1, 1)
    with pytest.raises(DataError, match="3 labels overlap in 3 ways, at most 2 can be held; learn fewer labels"):
        combine(masks, (3, 1, 1))


def test_a_table_needs_a_column_for_each_label():
    with pytest.raises(GeometryError, match="a table of 2 labels needs as many columns"):
        Labelmap(
            np.zeros((1, 1, 1), np.uint16), Geometry((1, 1, 1), np.eye(4)), {1: "a", 2: "b"}, np.zeros((1, 3), bool)
        )
