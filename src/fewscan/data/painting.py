"""Structures that were drawn one by one, as one label map: what they are called, and who gets a shared voxel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewscan.errors import DataError

OVERLAP = 0.05  # of the smaller of two structures: below it they merely touch, above it they are nested


def plain_name(name: str) -> str:
    """A name without case, separators and order of words.

    Parameters
    ----------
    name : str
        Of a structure.

    Examples
    --------
    >>> plain_name("Left Kidney") == plain_name("kidney_left")
    True
    """
    return " ".join(sorted(re.split(r"[\W_]+", name.casefold())))


def paint(
    structures: Mapping[tuple[str, int], Sequence[NDArray[np.int64]]], shape: Sequence[int], *, path: Path
) -> NDArray[np.uint16]:
    """One label per voxel; where structures merely touch the smaller one wins.

    Parameters
    ----------
    structures : mapping of (str, int) to sequence of (N,) int
        Name and label of each structure to its voxels, as flat indices.
    shape : (X, Y, Z) int
        Of the grid.
    path : Path
        File, for the message.

    Raises
    ------
    DataError
        If one structure lies in another.
    """
    label = np.zeros(int(np.prod(shape)), np.uint16)
    for key, parts in sorted(structures.items(), key=lambda pair: -sum(part.size for part in pair[1])):
        lay(label, np.concatenate([np.empty(0, np.int64), *parts]), structure=key, among=structures, path=path)
    return label.reshape(shape)


def lay(
    label: NDArray[np.uint16],
    where: NDArray[np.int64] | NDArray[np.bool_],
    *,
    structure: tuple[str, int],
    among: Iterable[tuple[str, int]],
    path: Path,
) -> None:
    """Paint a structure over larger ones, in place.

    Parameters
    ----------
    label : uint16
        Label map, or a part of it.
    where : int or bool
        Its voxels: indices, or a mask.
    structure : (str, int)
        Name and label.
    among : iterable of (str, int)
        The same of all structures.
    path : Path
        File, for the message.

    Raises
    ------
    DataError
        If it lies in another one.
    """
    under = label[where]
    met = under[under > 0]
    if met.size > OVERLAP * under.size:
        most = int(np.bincount(met).argmax())
        other = next(name for name, value in among if value == most)
        raise DataError(
            f"{path}: {structure[0]!r} lies in {other!r} with {met.size} of {under.size} voxels, and a voxel can carry "
            "one label; list the wanted structures in labels.json"
        )
    label[where] = structure[1]
