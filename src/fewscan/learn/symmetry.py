"""May scans be mirrored left to right? Only where the data themselves show that it is harmless.

Mirroring doubles the data where anatomy is symmetric, and teaches wrong sides where it is not. It is allowed when in
every labelled case looked at (a) the image resembles its mirror image around the labelled structures, and (b) each
label falls on itself or on exactly one partner that falls back on it, partners agreeing between cases and with the
sides in their names. Names settle it for single labels, since a thin one may miss its partner and one near the midline
fall on itself, but only where most of those with a side do fall on their namesakes: a left and a right ventricle are no
mirror images. Partners are exchanged whenever a patch is mirrored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fewscan.space.volume import bounding_box

LIKENESS = 0.75
MET = 0.3  # Dice from which a label falls on another: a spleen that a mirrored liver covers whole stays below
THIN = 2  # voxels taken off all round that leave nothing of a label which may miss its partner by as many
AGREE = 0.75  # share of what is measured of labels with a side that must fall on the namesake
NOWHERE = -1
SIDES = {"left": "right", "right": "left", "l": "r", "r": "l", "lh": "rh", "rh": "lh"}


@dataclass(frozen=True)
class Mirrored:
    """What mirroring does to one case.

    Parameters
    ----------
    likeness : float
        Correlation of the image with its mirror image around the labelled structures.
    partner : tuple of int
        For each class, the class that its mirror image falls on; 0 where it is absent, or falls on none and is thin,
        `NOWHERE` where it falls on none.
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
    picture, mirrored = (seen[stride].astype(np.float64) for seen in (image[box], image[box][::-1]))
    labels, flipped = (
        index[box][stride],
        index[box][::-1][stride],
    )  # about the middle of the box
    a, b = picture - picture.mean(), mirrored - picture.mean()
    likeness = float((a * b).sum() / max(float((a * a).sum()), 1e-12))
    if table is not None:
        dice = _dice(labels, flipped, table)
    else:
        dice = np.zeros((classes, classes))
        sizes = np.bincount(labels.reshape(-1).clip(0), minlength=classes)
        for k in range(1, classes):
            inside = labels == k
            hits = np.bincount(flipped[inside].clip(0), minlength=classes)
            dice[k] = 2 * hits / np.maximum(sizes + inside.sum(), 1)
    dice[:, 0] = 0
    partner = [0]
    for k in range(1, classes):
        if dice[k].max() >= MET:
            partner.append(int(dice[k].argmax()))
        else:
            partner.append(0 if _thin(labels == k if table is None else table[labels % len(table), k]) else NOWHERE)
    return Mirrored(likeness, tuple(partner))


def _thin(mask: NDArray[np.bool_]) -> bool:
    """Whether little is missing for it to miss its partner; so is what is not there."""
    return not (mask.any() and ndimage.binary_erosion(mask[bounding_box(mask)], iterations=THIN).any())


def _dice(labels: NDArray[np.int16], flipped: NDArray[np.int16], table: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of each class's mirror image and each other class; every two combinations that meet are counted once."""
    rows = len(table)
    both = (labels.astype(np.int64) % rows) * rows + flipped.astype(np.int64) % rows  # -1 is the last row
    meetings, number = np.unique(both, return_counts=True)
    here, there = (table[i].astype(np.float32) for i in (meetings // rows, meetings % rows))
    here *= number[:, None].astype(np.float32)
    met, sizes = here.T @ there, here.sum(0)  # voxels of each class that meet each other one; of each class
    dice: NDArray[np.float64] = (2 * met / np.maximum(sizes[:, None] + sizes[None], 1)).astype(np.float64)
    return dice


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
    sided = {k: _named_partner(k, names) for k in range(1, len(names) + 1)}
    met = [case.partner[k] == named for case in cases for k, named in sided.items() if named and case.partner[k]]
    if sum(met) < AGREE * len(met):
        return False, ()
    for k, named in sided.items():
        if named is None:
            return False, ()  # a side in the name without its counterpart in the list: the other side is unlabelled
        answers = {named} if named else _answers(cases, k)
        if len(answers) != 1:
            return False, ()
        other = answers.pop()
        if not named and _answers(cases, other) != {k}:
            return False, ()
        if other != k:
            pairs.add((min(k, other), max(k, other)))
    return True, tuple(sorted(pairs))


def _answers(cases: Sequence[Mirrored], k: int) -> set[int]:
    """Classes that one falls on; where it falls on none in some cases, the others tell."""
    return {case.partner[k] for case in cases} - {0, NOWHERE}


def _named_partner(k: int, names: Sequence[str]) -> int | None:
    """Class named like this one but for the side; 0 when the name has no side, None when the counterpart is missing."""
    tokens = re.split(r"([^a-zA-Z]+)", names[k - 1].lower())
    places = {name.lower(): place for place, name in enumerate(names, start=1)}
    sides = [i for i, token in enumerate(tokens) if token in SIDES]
    for i in sides:
        if found := places.get("".join([*tokens[:i], SIDES[tokens[i]], *tokens[i + 1 :]])):
            return found
    numbered = {i for i in sides if len(tokens[i]) == 1 and re.match(r"\d", "".join(tokens[i + 1 : i + 2]))}
    return None if set(sides) - numbered else 0  # L1 is a vertebra, unless there is an R1
