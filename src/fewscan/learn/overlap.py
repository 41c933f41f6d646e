"""Labels that overlap, as training sees them: indices of combinations, and a table of what each of them stands for.

A table has a row for each combination and one more, all false, for what nobody looked at: the index -1 finds it. Its
first column says whether a voxel was looked at, the others which labels it holds, in class order (decisions/014).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import cc3d
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.space.combinations import combine
from fewscan.space.geometry import Shape
from fewscan.space.volume import IGNORE, Labelmap, resample

Index = NDArray[np.int16]
Table = NDArray[np.bool_]


def coded(label: Labelmap, names: Mapping[int, str]) -> tuple[Index, Table]:
    """Combinations of a label map and their table; -1 where nobody looked.

    Parameters
    ----------
    label : Labelmap
        Of labels that overlap.
    names : mapping of int to str
        Labels to learn, in class order.

    Examples
    --------
    >>> from fewscan.space.geometry import Geometry
    >>> rows = np.array([[False, False], [True, True]])
    >>> data = np.array([[[0, 1, 65535]]], dtype=np.uint16)
    >>> label = Labelmap(data, Geometry((1, 1, 3), np.eye(4)), {1: "a", 2: "b"}, rows)
    >>> index, table = coded(label, {2: "b"})
    >>> index[0, 0].tolist(), table.astype(int).tolist()
    ([0, 1, -1], [[1, 0], [1, 1], [0, 0]])
    """
    assert label.table is not None
    order = list(label.names)
    columns = [order.index(value) for value in names]
    return _seen(label.data, label.data != IGNORE), _table(label.table[:, columns])


def _seen(codes: NDArray[np.uint16], looked: NDArray[np.bool_]) -> Index:
    """Combinations, -1 where nobody looked."""
    return np.where(looked, codes.astype(np.int32), -1).astype(np.int16)


def _table(rows: NDArray[np.bool_]) -> Table:
    table = np.zeros((len(rows) + 1, rows.shape[1] + 1), np.bool_)
    table[:-1, 0] = True
    table[:-1, 1:] = rows
    return table


def mask(index: Index, table: Table, *, k: int) -> NDArray[np.bool_]:
    """Voxels of a class; of class 0 those that were looked at and hold none.

    Parameters
    ----------
    index : (X, Y, Z) int16
        Combinations.
    table : (N + 1, K) bool
        What they stand for.
    k : int
        The class.
    """
    held = table[:, k] if k else table[:, 0] & ~table[:, 1:].any(1)
    found: NDArray[np.bool_] = held[index]
    return found


def resampled(index: Index, table: Table, *, shape: Shape) -> tuple[Index, Table]:
    """Combinations on another number of voxels: each label's mask resampled linearly and cut at one half.

    Parameters
    ----------
    index : (X, Y, Z) int16
        Combinations.
    table : (N + 1, K) bool
        What they stand for.
    shape : (X, Y, Z) int
        Wanted shape.
    """
    if index.shape == tuple(shape):
        return index, table

    def share(inside: NDArray[np.bool_]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = resample(torch.from_numpy(inside.astype(np.float32))[None], shape)[0].numpy()
        return found

    seen = share(index >= 0)
    codes, rows = combine((share(mask(index, table, k=k)) > 0.5 * seen for k in range(1, table.shape[1])), shape)
    return _seen(codes, seen > 0.5), _table(rows)


def likely(probs: Tensor, *, margin: float) -> tuple[Index, Table]:
    """Combinations of the labels that are likelier than not; -1 where that is not clear of each of them.

    Parameters
    ----------
    probs : (L, X, Y, Z) float
        Probability of each label.
    margin : float
        By which all of them must differ from one half.

    Examples
    --------
    >>> probs = torch.tensor([[0.9, 0.9, 0.1, 0.5], [0.9, 0.1, 0.1, 0.9]]).view(2, 1, 1, 4)
    >>> index, table = likely(probs, margin=0.2)
    >>> table[index[0, 0]].astype(int).tolist()
    [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
    """
    clear = ((probs - 0.5).abs() >= margin).all(0).numpy()
    codes, rows = combine((inside.numpy() for inside in probs > 0.5), clear.shape)
    return _seen(codes, clear), _table(rows)


def single(index: Index, table: Table, *, share: float) -> set[int]:
    """Classes of which (nearly) all voxels are connected; absent ones count, since they prove nothing against it.

    Parameters
    ----------
    index : (X, Y, Z) int16
        Combinations.
    table : (N + 1, K) bool
        What they stand for.
    share : float
        Of the voxels, that must lie in the largest piece.
    """
    if (index < 0).any():
        return set()

    def alone() -> Iterator[int]:
        for k in range(1, table.shape[1]):
            pieces = cc3d.connected_components(mask(index, table, k=k), connectivity=26)
            sizes = np.bincount(pieces.reshape(-1))[1:]
            if sizes.size == 0 or sizes.max() >= share * sizes.sum():
                yield k

    return set(alone())
