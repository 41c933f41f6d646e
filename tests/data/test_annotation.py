"""Sparse drawing is recognised; what only looks like it is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from fewscan.data.annotation import blank_slices, mark_blank, not_drawn
from fewscan.data.dataset import find, load
from fewscan.data.sample import sample_path
from fewscan.space.volume import IGNORE


def ball(shape: tuple[int, int, int] = (20, 22, 24), radius: float = 8) -> np.ndarray:
    grid = np.indices(shape) - np.array(shape).reshape(3, 1, 1, 1) // 2
    return ((grid**2).sum(0) < radius**2).astype(np.uint16)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_every_nth_slice_is_sparse(axis: int, step: int) -> None:
    label = ball()
    drawn = np.moveaxis(label, axis, 0)
    keep = np.zeros(len(drawn), bool)
    keep[1::step] = True
    drawn[~keep] = 0
    found = blank_slices(label)
    assert found is not None
    assert found[0] == axis
    marked = np.moveaxis(mark_blank(label), axis, 0)
    assert (marked[found[1]] == IGNORE).all()
    np.testing.assert_array_equal(marked[~found[1]], drawn[~found[1]])


def test_two_slices_far_apart_are_sparse() -> None:
    label = ball()
    keep = [10, 15]
    label[:, :, [z for z in range(24) if z not in keep]] = 0
    found = blank_slices(label)
    assert found is not None
    assert found[1].sum() == 22


def test_dense_drawings_are_not_sparse() -> None:
    two = np.zeros((40, 12, 12), np.uint16)
    two[2:7, 3:9, 3:9], two[33:38, 3:9, 3:9] = 1, 2  # two organs far apart
    scattered = np.zeros((30, 30, 12), np.uint16)
    scattered[3:6, 3:6, 2], scattered[20:24, 20:24, 8] = 1, 1  # lesions of one slice each
    hole = ball()
    hole[:, :, 12] = 0  # one slice forgotten
    empty = np.zeros((5, 5, 5), np.uint16)
    said = ball()
    said[:, :, ::2] = IGNORE  # the file says itself what was not looked at
    for label in (ball(), two, scattered, hole, empty, said):
        assert blank_slices(label) is None
        assert mark_blank(label) is label


def test_real_scans_drawn_throughout_are_not_sparse() -> None:
    data = find(sample_path())
    for case in (*data.labelled, *data.test):
        label = load(case, data).label
        assert label is not None
        assert not (label.data == IGNORE).any()


def test_a_rare_label_is_not_called_undrawn() -> None:
    names = {1: "organ", 2: "lesion"}
    held = {c: frozenset({1, 2}) if c in "ab" else frozenset({1}) for c in "abcd"}
    assert not_drawn(held, names) == {}
    held["c"] = frozenset({1, 2})
    assert not_drawn(held, names) == {"d": frozenset({1})}
    assert not_drawn({"a": frozenset({1}), "b": frozenset({1, 2})}, names) == {}
