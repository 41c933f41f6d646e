"""Labels that overlap, as one map: its values are combinations of labels, and a table says which labels each one holds.

A voxel of white matter belongs to several bundles at once. One map of combinations takes the place of a mask for each,
so that what cuts, moves and caches label maps need not know of the overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fewscan.errors import DataError
from fewscan.space.geometry import Shape

MOST = 32_000
"""Combinations in one map: more would not fit into 16 bits with a sign."""


def combine(masks: Iterable[NDArray[np.bool_]], shape: Shape) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """One map of combinations.

    Parameters
    ----------
    masks : iterable of (X, Y, Z) bool
        One for each label, taken one at a time.
    shape : (X, Y, Z) int
        Of the masks.

    Returns
    -------
    (X, Y, Z) uint16, (N, L) bool
        The map, and for each of its values the labels that it holds; value 0 holds none.

    Raises
    ------
    DataError
        If there are too many combinations.

    Examples
    --------
    >>> a, b = np.array([[[1, 1, 0, 0]]], dtype=bool), np.array([[[0, 1, 1, 0]]], dtype=bool)
    >>> codes, table = combine([a, b], (1, 1, 4))
    >>> table[codes[0, 0]].astype(int).tolist()
    [[1, 0], [1, 1], [0, 1], [0, 0]]
    """
    places = [np.flatnonzero(mask) for mask in masks]
    labelled: NDArray[np.int64] = np.unique(np.concatenate([np.zeros(0, np.int64), *places]))
    bits = np.zeros((len(labelled), max(1, len(places))), np.bool_)
    for k, flat in enumerate(places):
        bits[np.searchsorted(labelled, flat), k] = True
    rows, number = np.unique(np.packbits(bits, axis=1), axis=0, return_inverse=True)
    if len(rows) > MOST:
        raise DataError(
            f"{len(places)} labels overlap in {len(rows)} ways, at most {MOST} can be held; learn fewer labels"
        )
    codes = np.zeros(int(np.prod(shape)), np.uint16)
    codes[labelled] = number.reshape(-1) + 1
    held = np.unpackbits(rows, axis=1, count=bits.shape[1]).astype(np.bool_)[:, : len(places)]
    return codes.reshape(shape), np.concatenate([np.zeros((1, len(places)), np.bool_), held])


def mask_of(codes: NDArray[np.integer], held: NDArray[np.bool_]) -> NDArray[np.bool_]:  # type: ignore[type-arg]
    """Voxels whose combination holds something; values beyond the table, which nobody looked at, do not.

    Parameters
    ----------
    codes : (X, Y, Z) int
        Combinations; those that were not looked at negative or beyond the table.
    held : (N,) bool
        For each combination, such as a column of the table.

    Examples
    --------
    >>> mask_of(np.array([[[0, 1, 2, 65535]]], dtype=np.uint16), np.array([False, True, False]))[0, 0].tolist()
    [False, True, False, False]
    """
    beyond = np.append(held, False)
    found: NDArray[np.bool_] = beyond[np.where((codes < 0) | (codes >= len(held)), len(held), codes)]
    return found


def on_top(codes: NDArray[np.uint16], table: NDArray[np.bool_], *, values: Sequence[int]) -> NDArray[np.uint16]:
    """One label a voxel, for who can show no more: of those that meet in a voxel the one with the fewest voxels.

    Parameters
    ----------
    codes : (X, Y, Z) uint16
        Combinations; those beyond the table were not looked at.
    table : (N, L) bool
        For each combination the labels that it holds.
    values : sequence of int
        Of the labels.

    Examples
    --------
    >>> large, small = np.array([[[1, 1, 1, 0]]], dtype=bool), np.array([[[0, 1, 0, 0]]], dtype=bool)
    >>> codes, table = combine([large, small], (1, 1, 4))
    >>> on_top(codes, table, values=[5, 7])[0, 0].tolist()
    [5, 7, 5, 0]
    """
    counts = np.bincount(codes.ravel(), minlength=len(table))[: len(table)] @ table
    shown = np.zeros(len(table) + 1, np.uint16)
    for k in np.argsort(-counts, kind="stable"):  # the smallest comes last
        shown[:-1][table[:, k]] = values[k]
    found: NDArray[np.uint16] = shown[np.minimum(codes, len(table))]
    return found
