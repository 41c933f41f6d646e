"""What was labelled, and what was only left blank.

Few-label users draw every fourth slice, or only some of the structures. Taking such blanks for background would teach
the model that the structure is not there, so these rules decide what the loss must not see. They are stated here and
nowhere else, and `fewscan check` says for each case what they decided.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fewscan.space.volume import IGNORE


def blank_slices(label: NDArray[np.uint16]) -> tuple[int, NDArray[np.bool_]] | None:
    """The axis along which only some slices were drawn, and which slices were left blank; None if drawn throughout.

    A label map counts as sparse along an axis when, between its first and last labelled slice,

    - at least two slices are labelled, and no two labelled slices are neighbours,
    - every gap is at least two blank slices wide, or three or more labelled slices recur at one regular step,
    - at least half of the slices are blank, and
    - each labelled slice overlaps the next one when they are laid over each other,

    which separate lesions and thin organs do not fulfil all at once. The blank slices beyond the first and the last
    labelled one were not looked at either. A label map that uses `IGNORE` says itself what was not looked at.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        Label map.

    Examples
    --------
    >>> label = np.zeros((4, 4, 9), np.uint16)
    >>> label[1:3, 1:3, ::4] = 1
    >>> axis, blank = blank_slices(label)
    >>> axis, blank.astype(int).tolist()
    (2, [0, 1, 1, 1, 0, 1, 1, 1, 0])
    """
    drawn = (label > 0) & (label < IGNORE)
    if (label == IGNORE).any():
        return None
    for axis in (2, 1, 0):
        labelled = np.asarray(drawn.any(axis=tuple(a for a in range(3) if a != axis)))
        at = np.flatnonzero(labelled)
        steps = np.diff(at)
        if at.size < 2 or steps.min() < 2:
            continue
        regular = at.size >= 3 and np.ptp(steps) == 0
        half = 2 * at.size <= at[-1] - at[0] + 2  # the last slice ends the extent, so it counts only once
        if (steps.min() >= 3 or regular) and half and _overlap(np.moveaxis(drawn, axis, 0)[at]):
            return axis, np.logical_not(labelled)
    return None


def _overlap(slices: NDArray[np.bool_]) -> bool:
    """Whether each slice meets the next when laid over it."""
    return bool((slices[:-1] & slices[1:]).any(axis=(1, 2)).all())


def mark_blank(label: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The label map with `IGNORE` in the slices that `blank_slices` finds.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        Label map; not changed.
    """
    found = blank_slices(label)
    if found is None:
        return label
    axis, blank = found
    marked = label.copy()
    np.moveaxis(marked, axis, 0)[blank] = IGNORE
    return marked


def not_drawn(values: Mapping[str, frozenset[int]], names: Mapping[int, str]) -> dict[str, frozenset[int]]:
    """Cases in which some labels were not drawn, with the labels that were.

    A label absent from one case counts as not drawn there when at least two other labelled cases, and at least three
    quarters of them, hold it. The loss then abstains from it in that case.

    Parameters
    ----------
    values : mapping of str to frozenset of int
        Case id to the labels that occur in its file.
    names : mapping of int to str
        All labels of the data set.

    Examples
    --------
    >>> found = {"a": frozenset({1, 2}), "b": frozenset({1, 2}), "c": frozenset({1})}
    >>> not_drawn(found, {1: "liver", 2: "spleen"})
    {'c': frozenset({1})}
    """
    result = {}
    for case, found in values.items():
        others = [held for other, held in values.items() if other != case]
        missing = set()
        for value in names:
            holding = sum(value in held for held in others)
            if value not in found and holding >= 2 and 4 * holding >= 3 * len(others):
                missing.add(value)
        if missing:
            result[case] = frozenset(names) - missing
    return result
