"""What a lesion may do to its surroundings: near and far from it, and how far its volume may have pushed tissue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fewscan.judge.metrics import dice

NEAR_MM = 15.0  # tissue up to here around a lesion is near it
TEMPLATES = 2  # healthy people, a scan of each, that are brought onto each scan with a lesion
ENOUGH = 50  # voxels of a structure on either side, below which its Dice near and far are not compared
PUSHED_MM = 3.0  # of expected displacement from which a structure counts as displaced


def near_and_far(values: NDArray[Any], away: NDArray[np.float32], *, mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Mean of a map near a lesion, outside of it, and far from it; NaN where there is no such voxel.

    Parameters
    ----------
    values : (X, Y, Z) float
        The map.
    away : (X, Y, Z) float32
        From `looks.distance_mm`.
    mask : (X, Y, Z) bool
        Where to look.
    """
    near, far = mask & (away > 0) & (away <= NEAR_MM), mask & (away > NEAR_MM)
    return tuple(float(values[part].mean()) if part.any() else float("nan") for part in (near, far))  # type: ignore[return-value]


def near_and_far_dice(
    found: NDArray[np.bool_], truth: NDArray[np.bool_], *, away: NDArray[np.float32]
) -> tuple[float, float]:
    """Dice of a structure within `NEAR_MM` of a lesion, the lesion included, and beyond.

    NaN both unless there is `ENOUGH` of it in truth on either side: a sliver that is missed would count as a structure.
    Both are Dice of pieces, which is lower than that of the whole where much of them is border.

    Parameters
    ----------
    found, truth : (X, Y, Z) bool
        Masks on one grid.
    away : (X, Y, Z) float32
        From `looks.distance_mm`.
    """
    near = away <= NEAR_MM
    if min(int((truth & near).sum()), int((truth & ~near).sum())) < ENOUGH:
        return float("nan"), float("nan")
    return dice(found & near, truth & near), dice(found & ~near, truth & ~near)


def mass_effect_mm(lesion: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[np.float32]:
    """How far a lesion has pushed the tissue of each voxel, if all of its volume came to be by pushing.

    Tissue keeps its volume: what lies r from the middle of a ball of radius R has come from (r^3 - R^3)^(1/3). Each
    piece of the lesion counts as a ball of its volume, and each voxel goes by the nearest piece. What grows into tissue
    instead pushes less. No registration is needed, so that differences between healthy people, which are larger than
    most displacements, do not enter.

    Parameters
    ----------
    lesion : (X, Y, Z) bool
        Its mask.
    spacing : sequence of float
        mm.

    Returns
    -------
    (X, Y, Z) float32
        Millimetres; 0 inside the lesion, where no tissue is left to be pushed, and everywhere without one.

    Examples
    --------
    >>> lesion = np.zeros((3, 3, 9), bool)
    >>> lesion[1, 1, 0] = True
    >>> pushed = mass_effect_mm(lesion, (1.0, 1.0, 1.0))[1, 1]
    >>> bool(pushed[0] == 0), bool((np.diff(pushed[1:]) < 0).all())
    (True, True)
    """
    if not lesion.any():
        return np.zeros(lesion.shape, np.float32)
    pieces = cc3d.connected_components(lesion, connectivity=26)
    away, index = ndimage.distance_transform_edt(~lesion, sampling=spacing, return_indices=True)
    radius = np.cbrt(np.bincount(pieces.ravel()) * float(np.prod(spacing)) * 3 / (4 * np.pi))
    ball = radius[pieces[tuple(index)]]
    r = ball + away
    pushed: NDArray[np.float32] = np.where(lesion, 0.0, r - np.cbrt(np.maximum(r**3 - ball**3, 0.0))).astype(np.float32)
    return pushed


def pushed_said(pushed: Mapping[str, float]) -> str:
    """Which structures are displaced and by how much, in words; nothing where none is, by `PUSHED_MM`.

    Parameters
    ----------
    pushed : mapping of str to float
        Expected displacement of each structure, mm.

    Examples
    --------
    >>> pushed_said({"AF_left": 3.2, "CST_left": 6.1, "UF_left": 0.4})
    'CST_left and 1 more may be pushed by up to 6 mm'
    """
    moved = {name: mm for name, mm in pushed.items() if mm >= PUSHED_MM}
    if not moved:
        return ""
    worst = max(moved, key=lambda name: moved[name])
    others = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
    return f"{worst}{others} may be pushed by up to {moved[worst]:.0f} mm"
