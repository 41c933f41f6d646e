"""May scans be mirrored left to right? Only where the data themselves show that it is harmless.

Mirroring doubles the data where anatomy is symmetric, and teaches wrong sides where it is not. It is allowed when in
every labelled case looked at (a) the image resembles its mirror image around the labelled structures, and (b) each
label falls on itself or on exactly one partner that falls back on it, partners agreeing between cases and with the
sides in their names. Partners are exchanged whenever a patch is mirrored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.space.volume import bounding_box

LIKENESS = 0.75


@dataclass(frozen=True)
class Mirrored:
    """What mirroring does to one case.

    Parameters
    ----------
    likeness : float
        Correlation of the image with its mirror image around the labelled structures.
    partner : tuple of int
        For each class, the class on which most of its mirrored voxels fall; 0 where it is absent.
    """

    likeness: float
    partner: tuple[int, ...]


def examine(
    image: NDArray[Any], index: NDArray[np.int16], *, classes: int, table: NDArray[np.bool_] | None = None
) -> Mirrored:
    """Compare a case with its mirror image.

    Parameters
    ----------
    image : (X, Y, Z) number
        First channel; the first axis runs from left to right.
    index : (X, Y, Z) int16
        Class indices.
    classes : int
        Number of classes, background included.
    table : (N + 1, K) bool, optional
        Of labels that overlap: what the indices stand for (`learn.overlap`).
    """
    box = bounding_box(index > 0)
    stride = tuple(slice(None, None, max(1, (s.stop - s.start) // 64)) for s in box)
    picture = image[box][stride].astype(np.float64)
    labels = index[box][stride]
    a, b = picture - picture.mean(), picture[::-1] - picture.mean()
    likeness = float((a * b).sum() / max(float((a * a).sum()), 1e-12))
    flipped = labels[::-1]
    if table is not None:
        return Mirrored(likeness, _partners(labels, flipped, table))
    partner = [0]
    for k in range(1, classes):
        inside = labels == k
        hits = np.bincount(flipped[inside].clip(0), minlength=classes) if inside.any() else np.zeros(classes)
        sizes = np.bincount(labels.reshape(-1).clip(0), minlength=classes) + inside.sum()
        dice = 2 * hits / np.maximum(sizes, 1)
        dice[0] = 0
        partner.append(int(dice.argmax()) if dice.max() > 0 else 0)
    return Mirrored(likeness, tuple(partner))


def _partners(labels: NDArray[np.int16], flipped: NDArray[np.int16], table: NDArray[np.bool_]) -> tuple[int, ...]:
    """For each class the one that its mirror image overlaps best; every two combinations that meet are counted once."""
    rows = len(table)
    both = (labels.astype(np.int64) % rows) * rows + flipped.astype(np.int64) % rows  # -1 is the last row
    meetings, number = np.unique(both, return_counts=True)
    here, there = (table[i].astype(np.float32) for i in (meetings // rows, meetings % rows))
    here *= number[:, None].astype(np.float32)
    met, sizes = here.T @ there, here.sum(0)  # voxels of each class that meet each other one; of each class
    dice: NDArray[np.float32] = 2 * met / np.maximum(sizes[:, None] + sizes[None], 1)
    dice[:, 0] = 0
    best = np.where(dice.max(1) > 0, dice.argmax(1), 0)
    return 0, *(int(k) for k in best[1:])


def verdict(cases: Sequence[Mirrored], names: Sequence[str]) -> tuple[bool, tuple[tuple[int, int], ...]]:
    """Whether to mirror, and which classes to exchange.

    Parameters
    ----------
    cases : sequence of Mirrored
        One per labelled case.
    names : sequence of str
        Names of classes 1, 2, and so on.
    """
    if not cases or min(c.likeness for c in cases) < LIKENESS:
        return False, ()
    pairs: set[tuple[int, int]] = set()
    for k in range(1, len(names) + 1):
        answers = {c.partner[k] for c in cases if c.partner[k]}
        named = _named_partner(k, names)
        if named is None:
            return False, ()  # a side in the name without its counterpart in the list: the other side is unlabelled
        if named:
            answers = {named}  # small lateral structures may miss their partner by a few voxels
        if len(answers) != 1:
            return False, ()
        other = answers.pop()
        backs = {c.partner[other] for c in cases if c.partner[other]}
        if not named and backs != {k}:
            return False, ()
        if other != k:
            pairs.add((min(k, other), max(k, other)))
    return True, tuple(sorted(pairs))


def _named_partner(k: int, names: Sequence[str]) -> int | None:
    """Class named like this one but for the side; 0 when the name has no side, None when the counterpart is missing."""
    words = {"left": "right", "right": "left", "l": "r", "r": "l", "lh": "rh", "rh": "lh"}
    tokens = re.split(r"([^a-zA-Z]+)", names[k - 1].lower())
    sides = [i for i, token in enumerate(tokens) if token in words]
    if not sides:
        return 0
    tokens[sides[0]] = words[tokens[sides[0]]]
    wanted = "".join(tokens)
    for j, name in enumerate(names):
        if name.lower() == wanted:
            return j + 1
    return None
