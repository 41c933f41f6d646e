"""Dice, surface distances and volumes of one label map against another; always in millimetres and millilitres.

`RULES` says in words what the numbers mean; it travels with every saved evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import edt
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fewscan.errors import GeometryError
from fewscan.space.volume import IGNORE, bounding_box

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]
Status = Literal["scored", "missed", "extra", "absent"]

METRICS = ("dice", "hd95_mm", "assd_mm", "surface_dice", "volume_error")

RULES: Mapping[str, str] = {
    "dice": "2 |P and R| / (|P| + |R|) over voxels",
    "hd95_mm": "the larger of the two directed 95th percentiles of surface distance",
    "assd_mm": "mean distance of all surface voxels of either mask to the other surface",
    "surface_dice": "share of the surface voxels of both masks that lie within the tolerance of the other surface",
    "tolerance": "mean voxel edge of the case unless a value was given",
    "surface": "voxels of a mask with at least one of six neighbours outside it; beyond the grid is outside",
    "volume_error": "|predicted - reference| / reference volume",
    "absent": "label in neither map: not scored",
    "missed": "label in the reference only: Dice and surface Dice 0, volume error 1, no distance",
    "extra": "label in the prediction only: Dice and surface Dice 0, no distance, no volume error",
    "not judged": "voxels that the reference marks as ignored, and the blank slices of a reference that was drawn on "
    "some slices only, are taken out of both maps",
    "case": "mean over the labels of the case that have the number",
    "interval": "95 % percentile bootstrap over patients, each with all of its cases; none below 3 patients",
    "comparison": "two runs are compared over patients: of each case the mean over the labels that have the number in "
    "both, then the mean over the patient's cases; a label that is absent in one run and extra in the other has Dice "
    "and surface Dice 1 where it is absent",
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well one label of one case was met; NaN where `RULES` gives no number.

    Parameters
    ----------
    status : {"scored", "missed", "extra", "absent"}
        In which of the two maps the label occurs.
    dice, surface_dice : float
        0 to 1.
    hd95_mm, assd_mm : float
        Surface distances.
    volume_error : float
        Share of the reference's volume.
    volume_ml, reference_ml : float
        Volume predicted and drawn.
    """

    status: Status
    dice: float = math.nan
    surface_dice: float = math.nan
    hd95_mm: float = math.nan
    assd_mm: float = math.nan
    volume_error: float = math.nan
    volume_ml: float = 0.0
    reference_ml: float = 0.0


def dice(prediction: Mask, reference: Mask) -> float:
    """Overlap of two masks, 0 to 1; NaN when both are empty.

    Parameters
    ----------
    prediction, reference : (X, Y, Z) bool
        Masks on one grid.

    Examples
    --------
    >>> a = np.zeros((4, 4, 4), bool); a[:2] = True
    >>> b = np.zeros((4, 4, 4), bool); b[1:3] = True
    >>> dice(a, b)
    0.5
    """
    total = int(prediction.sum()) + int(reference.sum())
    return 2 * int((prediction & reference).sum()) / total if total else math.nan


def surface_distances(
    prediction: Mask, reference: Mask, *, spacing: Spacing
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Distance of each surface voxel to the other surface, mm: from the prediction, and from the reference.

    Parameters
    ----------
    prediction, reference : (X, Y, Z) bool
        Masks on one grid; both empty lists when one of them is empty.
    spacing : (3,) float
        Voxel size, mm.
    """
    if not (prediction.any() and reference.any()):
        return np.empty(0, np.float32), np.empty(0, np.float32)
    box = bounding_box(prediction | reference)
    p, r = (np.ascontiguousarray(surface(mask[box])) for mask in (prediction, reference))
    to_p, to_r = (edt.edt(~mask, anisotropy=spacing, black_border=False, parallel=1) for mask in (p, r))
    return to_r[p], to_p[r]


def surface(mask: Mask) -> Mask:
    """Voxels of a mask that touch the outside by a face; beyond the grid is outside.

    Parameters
    ----------
    mask : (X, Y, Z) bool
        Any mask.

    Examples
    --------
    >>> int(surface(np.ones((3, 3, 3), bool)).sum())
    26
    """
    inside: Mask = ndimage.binary_erosion(mask)
    return mask & ~inside


def hd95_mm(prediction: Mask, reference: Mask, *, spacing: Spacing) -> float:
    """95th percentile Hausdorff distance; NaN when a mask is empty.

    Parameters
    ----------
    prediction, reference : (X, Y, Z) bool
        Masks on one grid.
    spacing : (3,) float
        Voxel size, mm.
    """
    return _hd95(*surface_distances(prediction, reference, spacing=spacing))


def assd_mm(prediction: Mask, reference: Mask, *, spacing: Spacing) -> float:
    """Average symmetric surface distance; NaN when a mask is empty.

    Parameters
    ----------
    prediction, reference : (X, Y, Z) bool
        Masks on one grid.
    spacing : (3,) float
        Voxel size, mm.
    """
    return _assd(*surface_distances(prediction, reference, spacing=spacing))


def surface_dice(prediction: Mask, reference: Mask, *, spacing: Spacing, tolerance_mm: float) -> float:
    """Share of both surfaces that lies within a tolerance of the other; NaN when a mask is empty.

    Parameters
    ----------
    prediction, reference : (X, Y, Z) bool
        Masks on one grid.
    spacing : (3,) float
        Voxel size, mm.
    tolerance_mm : float
        Largest distance that counts as met.
    """
    return _surface_dice(*surface_distances(prediction, reference, spacing=spacing), tolerance_mm)


def volume_ml(mask: Mask, *, spacing: Spacing) -> float:
    """Volume of a mask, millilitres.

    Parameters
    ----------
    mask : (X, Y, Z) bool
        Any mask.
    spacing : (3,) float
        Voxel size, mm.

    Examples
    --------
    >>> volume_ml(np.ones((10, 10, 10), bool), spacing=(1.0, 1.0, 2.0))
    2.0
    """
    return int(mask.sum()) * math.prod(spacing) / 1000


def volume_error(predicted_ml: float, reference_ml: float) -> float:
    """Absolute error as a share of the reference; NaN when the reference is empty.

    Parameters
    ----------
    predicted_ml, reference_ml : float
        Volumes in one unit.
    """
    return abs(predicted_ml - reference_ml) / reference_ml if reference_ml > 0 else math.nan


def score(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    *,
    spacing: Spacing,
    names: Mapping[int, str],
    tolerance_mm: float | None = None,
) -> dict[str, Score]:
    """Judge each label of a case by `RULES`.

    Parameters
    ----------
    prediction, reference : (X, Y, Z) int
        Label maps on one grid; voxels where the reference is `IGNORE` are not judged.
    spacing : (3,) float
        Voxel size, mm.
    names : mapping of int to str
        Labels to judge.
    tolerance_mm : float, optional
        For the surface Dice; None takes `default_tolerance_mm`.

    Raises
    ------
    GeometryError
        If the shapes differ.

    Examples
    --------
    >>> label = np.zeros((8, 8, 8), int); label[2:6, 2:6, 2:6] = 1
    >>> found = score(label, label, spacing=(1.0, 1.0, 3.0), names={1: "liver"})["liver"]
    >>> found.dice, found.hd95_mm, found.volume_ml
    (1.0, 0.0, 0.192)
    """
    if prediction.shape != reference.shape:
        raise GeometryError(
            f"prediction and reference must have one grid, got {prediction.shape} against {reference.shape} voxels; "
            "resample one onto the other"
        )
    tolerance_mm = default_tolerance_mm(spacing) if tolerance_mm is None else tolerance_mm
    ignored = reference == IGNORE
    if ignored.any():
        prediction, reference = np.where(ignored, 0, prediction), np.where(ignored, 0, reference)
    boxes = _boxes(prediction), _boxes(reference)
    found = {}
    for value, name in names.items():
        box = _union(*(b.get(value) for b in boxes))
        p, r = ((a[box] == value) if box else np.zeros((0, 0, 0), bool) for a in (prediction, reference))
        found[name] = _score_masks(p, r, spacing, tolerance_mm)
    return found


def default_tolerance_mm(spacing: Spacing) -> float:
    """Tolerance of the surface Dice: the mean voxel edge.

    Parameters
    ----------
    spacing : (3,) float
        Voxel size, mm.
    """
    return sum(spacing) / 3


def _score_masks(p: Mask, r: Mask, spacing: Spacing, tolerance_mm: float) -> Score:
    volumes = {"volume_ml": volume_ml(p, spacing=spacing), "reference_ml": volume_ml(r, spacing=spacing)}
    if not p.any() and not r.any():
        return Score(status="absent")
    if not p.any():
        return Score(status="missed", dice=0.0, surface_dice=0.0, volume_error=1.0, **volumes)
    if not r.any():
        return Score(status="extra", dice=0.0, surface_dice=0.0, **volumes)
    to_r, to_p = surface_distances(p, r, spacing=spacing)
    return Score(
        status="scored",
        dice=dice(p, r),
        surface_dice=_surface_dice(to_r, to_p, tolerance_mm),
        hd95_mm=_hd95(to_r, to_p),
        assd_mm=_assd(to_r, to_p),
        volume_error=volume_error(*volumes.values()),
        **volumes,
    )


def _hd95(to_r: NDArray[np.float32], to_p: NDArray[np.float32]) -> float:
    return max(float(np.percentile(d, 95)) for d in (to_r, to_p)) if to_r.size else math.nan


def _assd(to_r: NDArray[np.float32], to_p: NDArray[np.float32]) -> float:
    return float(np.concatenate([to_r, to_p]).mean(dtype=np.float64)) if to_r.size else math.nan


def _surface_dice(to_r: NDArray[np.float32], to_p: NDArray[np.float32], tolerance_mm: float) -> float:
    met = np.concatenate([to_r, to_p]) <= tolerance_mm + 1e-4  # float32 distances: a voxel edge must equal itself
    return float(met.mean()) if met.size else math.nan


def _boxes(labels: NDArray[Any]) -> dict[int, tuple[slice, ...]]:
    """Box of each label value, found in one pass."""
    found = ndimage.find_objects(labels)
    return {value: box for value, box in enumerate(found, start=1) if box is not None}


def _union(a: tuple[slice, ...] | None, b: tuple[slice, ...] | None) -> tuple[slice, ...] | None:
    if a is None or b is None:
        return a or b
    return tuple(slice(min(s.start, t.start), max(s.stop, t.stop)) for s, t in zip(a, b, strict=True))
