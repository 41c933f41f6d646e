"""A picture of fibre directions, for the eye to check what the proof found: lines must run along the bands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fewscan.data.io import atomic
from fewscan.deliver.pictures import PLANES
from fewscan.space.geometry import Geometry

LEAST_CLEAR = 0.25  # clearness from which a line is drawn
BRIGHT = 0.7  # clearness that is drawn at full brightness
SIZE_INCHES = 4.6


def directions_png(
    principal: NDArray[np.float32], clearness: NDArray[np.float32], *, geometry: Geometry, title: str, out: Path
) -> None:
    """Three cuts, coloured by direction (red left-right, green front-back, blue up-down), a line in each clear voxel.

    Parameters
    ----------
    principal : (3, X, Y, Z) float
        Unit directions in the RAS+ world.
    clearness : (X, Y, Z) float
        0 to 1, such as fractional anisotropy.
    geometry : Geometry
        Their grid, RAS-ordered.
    title : str
        One sentence above.
    out : Path
        PNG file.
    """
    figure = Figure(figsize=(3 * SIZE_INCHES, SIZE_INCHES + 0.5), layout="constrained", facecolor="black")
    figure.suptitle(title, color="white", fontsize=10)
    for place, (name, axis, left, top) in enumerate(PLANES):
        axes = figure.add_subplot(1, 3, place + 1)
        middle = int(np.average(np.arange(clearness.shape[axis]), weights=(clearness > 0).sum(_others(axis)) + 1e-9))
        _cut(axes, principal, clearness, geometry=geometry, axis=axis, index=middle)
        axes.set_title(f"{name} · left edge {left}, top {top}", color="white", fontsize=9)
        axes.set_axis_off()
    with atomic(out) as part:
        FigureCanvasAgg(figure).print_png(str(part))


def _others(axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(3) if a != axis)


def _cut(
    axes: object, principal: NDArray[np.float32], clearness: NDArray[np.float32], *, geometry: Geometry, axis: int,
    index: int,
) -> None:  # fmt: skip
    across, up = _others(axis)
    cut = np.take(clearness, index, axis)
    vectors = np.take(principal, index, axis + 1)
    colour = np.clip(np.abs(vectors) * cut / BRIGHT, 0, 1).transpose(2, 1, 0)  # rows go up
    w, h = geometry.spacing[across], geometry.spacing[up]
    extent = (-w / 2, (cut.shape[0] - 0.5) * w, -h / 2, (cut.shape[1] - 0.5) * h)
    axes.imshow(colour, origin="lower", extent=extent, interpolation="nearest")  # type: ignore[attr-defined]
    places = np.argwhere(cut > LEAST_CLEAR)
    turn = np.linalg.inv(geometry.affine[:3, :3] / np.array(geometry.spacing))  # world to voxel axes, mm
    along = np.einsum("ij,jn->in", turn, vectors[:, places[:, 0], places[:, 1]])[[across, up]].T
    half = 0.45 * min(w, h) * along
    centre = places * np.array([w, h])
    lines = LineCollection(list(np.stack([centre - half, centre + half], 1)), colors="white", linewidths=0.6)
    axes.add_collection(lines)  # type: ignore[attr-defined]
    axes.invert_xaxis()  # type: ignore[attr-defined]  # right at the left edge, as radiologists hang it
