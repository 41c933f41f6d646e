"""Tractograms as training masks: the voxels that streamlines visit, and those where they end."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fewscan.errors import DataError
from fewscan.space.geometry import Array, Geometry

SUFFIXES = (".trk", ".tck")
STEP = 0.1  # of the smallest voxel edge: no voxel that a segment crosses by more than that is passed over
CHUNK = 1000  # streamlines that are resampled at a time: all of a whole brain's would take gigabytes

Mask = NDArray[np.bool_]


def read_streamlines(path: Path) -> list[Array]:
    """Streamlines of a bundle, each (points, 3), RAS+ mm; none says that the bundle is absent.

    Parameters
    ----------
    path : Path
        TrackVis .trk or MRtrix .tck.

    Raises
    ------
    DataError
        If it is of another kind or damaged, or none of its streamlines has two points.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: not a tractogram; understood are {' and '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the name")
    try:
        lines = nib.streamlines.load(str(path), lazy_load=False).streamlines
    except Exception as error:
        raise DataError(f"{path}: cannot be read ({error}); export it again") from None
    found = [np.asarray(line, dtype=np.float64) for line in lines if len(line) > 1]
    if len(lines) and not found:
        raise DataError(f"{path}: none of its {len(lines)} streamlines has two points or more; export it again")
    if not all(np.isfinite(line).all() for line in found):
        raise DataError(f"{path}: points are NaN or infinite; export it again")
    return found


def visited(lines: list[Array], geometry: Geometry) -> tuple[Mask, int]:
    """Voxels that streamlines pass through, and how many of their own points lie beyond the grid.

    Parameters
    ----------
    lines : list of (points, 3) float
        RAS+ mm.
    geometry : Geometry
        Grid of the mask.
    """
    if not lines:
        return np.zeros(geometry.shape, bool), 0
    step, mask = STEP * min(geometry.spacing), np.zeros(geometry.shape, bool)
    for first in range(0, len(lines), CHUNK):
        dense = np.concatenate([_resampled(line, step) for line in lines[first : first + CHUNK]])
        mask |= _mark(dense, geometry)[0]
    return mask, _mark(np.concatenate(lines), geometry)[1]


def ends(lines: list[Array], geometry: Geometry) -> tuple[Mask, Mask]:
    """Voxels of the two ends: streamlines are turned so that all run the same way before first and last points count.

    Parameters
    ----------
    lines : list of (points, 3) float
        RAS+ mm.
    geometry : Geometry
        Grid of the masks.
    """
    if not lines:
        return np.zeros(geometry.shape, bool), np.zeros(geometry.shape, bool)
    pairs = np.array([(line[0], line[-1]) for line in lines])
    centres = pairs[int(np.argmax(np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=1)))]
    for _ in range(5):  # two means: each pair one way or the other
        kept = ((pairs - centres) ** 2).sum((1, 2)) <= ((pairs[:, ::-1] - centres) ** 2).sum((1, 2))
        turned = np.where(kept[:, None, None], pairs, pairs[:, ::-1])
        centres = turned.mean(0)
    if tuple(centres[0][::-1]) < tuple(centres[1][::-1]):  # the upper end first, so that cases agree
        turned = turned[:, ::-1]
    return _mark(turned[:, 0], geometry)[0], _mark(turned[:, 1], geometry)[0]


def _resampled(line: Array, step: float) -> Array:
    """Points no further apart than a step."""
    lengths = np.linalg.norm(np.diff(line, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    wanted = np.linspace(0, along[-1], max(2, int(np.ceil(along[-1] / step)) + 1))
    return np.stack([np.interp(wanted, along, line[:, axis]) for axis in range(3)], 1)


def _mark(points: Array, geometry: Geometry) -> tuple[Mask, int]:
    inverse = np.linalg.inv(geometry.affine)
    index = np.rint(points @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
    inside = ((index >= 0) & (index < np.array(geometry.shape))).all(1)
    mask = np.zeros(geometry.shape, bool)
    mask[tuple(index[inside].T)] = True
    return mask, int((~inside).sum())
