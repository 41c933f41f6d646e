"""Pictures of a registration on three planes: before, after, checkerboard, deformed grid, local change of volume.

Pixels go into PNG files, lines into one JSON file as path data, so that a report can colour and hide them. All are made
from single slices of what the registration has in memory.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contourpy import contour_generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from fewscan.data.io import atomic
from fewscan.deliver.pictures import MOST_BYTES, PIXELS, PLANES
from fewscan.space.field import (
    Field,
    determinant,
    from_matrix,
    invert,
    resize,
    then,
    warp_array,
    warp_labels,
    without_affine,
)
from fewscan.space.geometry import Array, Geometry, with_at_most
from fewscan.space.volume import IGNORE, Labelmap, Volume

KINDS = ("fixed", "before", "warped", "checkerboard", "volume")
LINES = "lines.json"
FILES = (*(f"{plane}_{kind}.png" for plane, *_ in PLANES for kind in KINDS), LINES)
"""Every file that `write_pictures` leaves."""

UNITS = 1000  # side of a picture's square frame in path data
SQUARES = 8  # of the checkerboard, and half the lines of the grid, along a side
LARGEST_CHANGE = 4.0  # of volume, from which on the colour stays
EARLY = 0.75  # power of the share of it, so that small changes show
SMALLER, SAME, LARGER, FOLDED = (64, 170, 255), (38, 44, 48), (255, 176, 64), (255, 45, 230)
"""Red, green and blue of places that are smaller in the moving scan, alike, larger, and folded."""
OUTSIDE_INDEX, FOLDED_INDEX = 0, 255  # of the palette; between them 254 colours
FINEST = 128  # samples of the field along a side, from which grid lines are drawn
LATTICE, LATTICE_VOXELS = 12, 64**3  # steps of the grid in space along its longest side, and samples of its field

Grey = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """What a registration has in memory.

    Parameters
    ----------
    fixed, moving : Volume
        Scans; of several channels the first is shown.
    field : Field
        From fixed to moving, the affine part in it.
    matrix : (4, 4) float
        The affine part alone, fixed to moving RAS+ mm.
    labels : Labelmap, optional
        In the moving scan's world.
    warped_labels : (X, Y, Z) uint16, optional
        The same on the fixed grid, registered.
    reference : Labelmap, optional
        In the fixed scan's world.
    """

    fixed: Volume
    moving: Volume
    field: Field
    matrix: Array
    labels: Labelmap | None = None
    warped_labels: NDArray[np.uint16] | None = None
    reference: Labelmap | None = None


@dataclass(frozen=True)
class _Cut:
    """One slice of a grid, centred in a square frame; columns and rows run against their voxel axes, as displayed."""

    whole: Geometry
    axis: int
    index: int

    @property
    def side(self) -> float:
        """Of the frame, mm."""
        return max(self.whole.shape[axis] * self.whole.spacing[axis] for axis in self.axes)

    @property
    def grid(self) -> Geometry:
        """The slice as a grid that is one voxel thick."""
        x, y, z = (1 if i == self.axis else n for i, n in enumerate(self.whole.shape))
        affine = self.whole.affine.copy()
        affine[:3, 3] += self.index * affine[:3, self.axis]
        return Geometry((x, y, z), affine)

    @property
    def axes(self) -> tuple[int, int]:
        """Voxel axes along columns and along rows."""
        a, b = (i for i in range(3) if i != self.axis)
        return a, b

    def field(self, field: Field) -> Field:
        """The part of a field on the slice."""
        return Field(np.take(field.u, [self.index], axis=1 + self.axis), self.grid)

    def shown(self, volume: NDArray[Any], index: int = 0) -> NDArray[Any]:
        """A slice of a volume as rows and columns of the display."""
        cut: NDArray[Any] = volume.take(index, self.axis).T[::-1, ::-1]
        return cut

    def centres(self, axis: int) -> Array:
        """Of the voxels along an axis, in display order, in units of the frame."""
        n, size = self.whole.shape[axis], self.whole.spacing[axis]
        mm = (np.arange(n, dtype=np.float64) + 0.5) * size + (self.side - n * size) / 2
        return mm * (UNITS / self.side)

    def framed(self, shown: NDArray[Any], *, way: Image.Resampling) -> NDArray[np.float32]:
        """Values of a shown slice on the pixels of the frame, NaN beside it."""
        out = np.full((PIXELS, PIXELS), np.nan, np.float32)
        spans = []
        for axis in self.axes:
            length = max(1, round(self.whole.shape[axis] * self.whole.spacing[axis] * PIXELS / self.side))
            spans.append(slice((PIXELS - length) // 2, (PIXELS - length) // 2 + length))
        columns, rows = spans
        picture = Image.fromarray(np.ascontiguousarray(shown, dtype=np.float32))
        out[rows, columns] = np.asarray(picture.resize((columns.stop - columns.start, rows.stop - rows.start), way))
        return out


def write_pictures(scene: Scene, folder: Path) -> list[str]:
    """Write the files of `FILES`, and say which they are.

    Parameters
    ----------
    scene : Scene
        What was registered.
    folder : Path
        Made if need be; other files in it stay.
    """
    grid = scene.fixed.geometry
    levels = _levels(scene.fixed.data[0]), _levels(scene.moving.data[0])
    lines: dict[str, dict[str, str | float]] = {}
    for name, axis, _, _ in PLANES:
        cut = _Cut(grid, axis, _centre(scene, axis))
        for kind, picture in (_scans(scene, cut, levels) | {"volume": _volume(scene, cut)}).items():
            _save(picture, folder / f"{name}_{kind}.png")
        lines[name] = {"side_mm": cut.side, "grid": _grid(scene, cut), **_outlines(scene, cut)}
    with atomic(folder / LINES) as temporary:
        temporary.write_text(json.dumps(lines) + "\n", encoding="utf-8")
    return list(FILES)


def volume_change(field: Field, matrix: Array, *, axis: int, index: int) -> NDArray[np.float32]:
    """Jacobian determinant of a field's deformable part on one slice, two-dimensional: moving volume over fixed volume.

    Parameters
    ----------
    field : Field
        From fixed to moving, the affine part in it.
    matrix : (4, 4) float
        The affine part alone.
    axis : int
        Cut by the slice.
    index : int
        Of the slice.
    """
    first = max(0, index - 1)  # one slice on each side, for the differences across
    slab = np.take(field.u, range(first, min(index + 2, field.u.shape[1 + axis])), axis=1 + axis)
    left = torch.from_numpy(without_affine(slab, matrix, fixed=field.fixed, first=first, axis=axis))
    change: NDArray[np.float32] = determinant(left[None])[0].numpy().take(index - first, axis)
    return change


def ramp(count: int) -> NDArray[np.uint8]:
    """Colours (count, 3) of volume changes from one over `LARGEST_CHANGE` to `LARGEST_CHANGE`, in equal ratios.

    Parameters
    ----------
    count : int
        How many.
    """
    share = np.linspace(-1, 1, count)[:, None]
    colours = np.array(SAME) + np.abs(share) ** EARLY * (np.where(share < 0, SMALLER, LARGER) - np.array(SAME))
    rounded: NDArray[np.uint8] = colours.round().astype(np.uint8)
    return rounded


def _centre(scene: Scene, axis: int) -> int:
    """Middle slice of the warped labels, by volume; of the scan where there are none."""
    if scene.warped_labels is not None:
        inside = (scene.warped_labels > 0) & (scene.warped_labels != IGNORE)
        area = inside.sum(axis=tuple(a for a in range(3) if a != axis)).cumsum()
        if area[-1]:
            return int(np.searchsorted(area, area[-1] / 2))
    return scene.fixed.geometry.shape[axis] // 2


def _levels(image: NDArray[Any]) -> tuple[float, float]:
    """Intensities shown black and white."""
    step = max(1, round((image.size / 2e6) ** (1 / 3)))
    low, high = (float(v) for v in np.percentile(image[::step, ::step, ::step], [1, 99.5]))
    return low, max(high, low + 1e-6)


def _scans(scene: Scene, cut: _Cut, levels: tuple[tuple[float, float], tuple[float, float]]) -> dict[str, Image.Image]:
    """The fixed slice, the moving scan there by headers and registered, and fixed and registered in turns."""
    moving, lowest = scene.moving, float(scene.moving.data.min())

    def read(field: Field) -> Grey:
        found = warp_array(moving.data[:1], moving.geometry, field=field, background=lowest)[0]
        return _grey(cut, cut.shown(found), levels[1])

    fixed = _grey(cut, cut.shown(scene.fixed.data[0], cut.index), levels[0])
    before, warped = read(from_matrix(np.eye(4), cut.grid)), read(cut.field(scene.field))
    row, column = np.indices(fixed.shape) * SQUARES // PIXELS
    mixed = np.where((row + column) % 2 == 0, fixed, warped)
    pictures = {"fixed": fixed, "before": before, "warped": warped, "checkerboard": mixed}
    return {kind: Image.fromarray(grey) for kind, grey in pictures.items()}


def _grey(cut: _Cut, shown: NDArray[Any], levels: tuple[float, float]) -> Grey:
    share = (cut.framed(shown, way=Image.Resampling.BICUBIC) - levels[0]) / (levels[1] - levels[0])
    grey: Grey = (np.nan_to_num(share.clip(0, 1)) * 255).astype(np.uint8)
    return grey


def _volume(scene: Scene, cut: _Cut) -> Image.Image:
    """Local change of volume in colours, folded voxels in one of their own."""
    change = volume_change(scene.field, scene.matrix, axis=cut.axis, index=cut.index).T[::-1, ::-1]
    doublings = np.log2(change.clip(1 / LARGEST_CHANGE, LARGEST_CHANGE)) / math.log2(LARGEST_CHANGE)  # -1 to 1
    share = cut.framed(doublings, way=Image.Resampling.BILINEAR)
    index = np.nan_to_num(1 + 253 * (share.clip(-1, 1) + 1) / 2, nan=OUTSIDE_INDEX).round().astype(np.uint8)
    folded = cut.framed(change <= 0, way=Image.Resampling.BOX)  # a pixel that a folded voxel touches counts
    index[np.nan_to_num(folded) > 0] = FOLDED_INDEX
    picture = Image.fromarray(index)
    picture.putpalette(np.vstack([(0, 0, 0), ramp(254), FOLDED]).astype(np.uint8).tobytes())
    return picture


def _save(picture: Image.Image, path: Path) -> None:
    """As a PNG of at most `MOST_BYTES`, with fewer pixels if need be."""
    pixels = PIXELS
    while True:
        buffer = io.BytesIO()
        way = Image.Resampling.NEAREST if picture.mode == "P" else Image.Resampling.BICUBIC
        picture.resize((pixels, pixels), way).save(buffer, "PNG")
        if buffer.tell() <= MOST_BYTES:
            break
        pixels = round(pixels * 0.85)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _outlines(scene: Scene, cut: _Cut) -> dict[str, str]:
    """Path data of the fixed scan's labels, and of the moving scan's by headers and registered."""
    header = from_matrix(np.eye(4), cut.grid)
    found = {}
    if scene.reference is not None:
        found["fixed_labels"] = warp_labels(scene.reference.data, scene.reference.geometry, field=header)
    if scene.labels is not None:
        for name, field in (("before_labels", header), ("warped_labels", cut.field(scene.field))):
            found[name] = warp_labels(scene.labels.data, scene.labels.geometry, field=field)
    return {name: _borders(cut.shown(label), cut) for name, label in found.items()}


def _borders(shown: NDArray[Any], cut: _Cut) -> str:
    """Outline of each label, half-way between voxel centres."""
    x, y = (cut.centres(axis) for axis in cut.axes)
    wide, high = (cut.whole.spacing[axis] * UNITS / cut.side for axis in cut.axes)
    x, y = np.array([x[0] - wide, *x, x[-1] + wide]), np.array([y[0] - high, *y, y[-1] + high])
    path = []
    for value in np.unique(shown[(shown > 0) & (shown != IGNORE)]):
        inside = np.pad((shown == value).astype(np.float64), 1)
        path += [_path(line) for line in contour_generator(x=x, y=y, z=inside).lines(0.5)]
    return "".join(path)


def _grid(scene: Scene, cut: _Cut) -> str:
    """Where the lines of a straight grid on the affinely aligned moving scan come to lie, as path data."""
    a, b = cut.axes
    if min(cut.whole.shape[a], cut.whole.shape[b]) < 2:
        return ""
    affine = cut.whole.affine
    back = np.linalg.inv(np.linalg.inv(affine) @ scene.matrix @ affine)
    here = np.indices(cut.grid.shape).astype(np.float32)
    here[cut.axis] += cut.index
    places = here + np.take(scene.field.u, [cut.index], axis=1 + cut.axis)
    step = cut.side / (2 * SQUARES)
    thin = tuple(math.ceil(cut.whole.shape[axis] / FINEST) for axis in (b, a))
    x, y = cut.centres(a)[:: thin[1]], cut.centres(b)[:: thin[0]]
    path = []
    for axis in (a, b):
        along = np.einsum("j,jxyz->xyz", back[axis, :3], places) + back[axis, 3]
        values = cut.shown(along)[:: thin[0], :: thin[1]] * cut.whole.spacing[axis]
        generator = contour_generator(x=x, y=y, z=values)
        for level in np.arange(step / 2, cut.whole.shape[axis] * cut.whole.spacing[axis], step):
            path += [_path(line) for line in generator.lines(level)]
    return "".join(path)


def lattice(field: Field, matrix: Array) -> tuple[list[NDArray[np.float32]], float]:
    """Lines of a straight grid on the affinely aligned moving scan, as they come to lie on the fixed one.

    Parameters
    ----------
    field : Field
        From fixed to moving, the affine part in it.
    matrix : (4, 4) float
        The affine part alone, fixed to moving RAS+ mm.

    Returns
    -------
    list of (N, 3) float32, float
        Lines in RAS+ mm, and the distance between two of the straight grid.
    """
    coarse = with_at_most(field.fixed, LATTICE_VOXELS)
    inverse = np.linalg.inv(matrix).astype(np.float64)
    rest = then(field.u, inverse, fixed=field.fixed).u
    back = invert(resize(torch.from_numpy(rest)[None], coarse.shape))[0].numpy()
    step = max(n * mm for n, mm in zip(coarse.shape, coarse.spacing, strict=True)) / LATTICE
    along = [np.arange(n, dtype=np.float64) for n in coarse.shape]
    at = [np.arange(step / mm / 2, n - 1, step / mm) for n, mm in zip(coarse.shape, coarse.spacing, strict=True)]
    lines = []
    for axis in range(3):
        a, b = (other for other in range(3) if other != axis)
        for p in at[a]:
            for q in at[b]:
                line = np.empty((3, len(along[axis])))
                line[axis], line[a], line[b] = along[axis], p, q
                moved = line + [ndimage.map_coordinates(part, line, order=1, mode="nearest") for part in back]
                lines.append((moved.T @ coarse.affine[:3, :3].T + coarse.affine[:3, 3]).astype(np.float32))
    return lines, step


def _path(line: Any) -> str:
    return "M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in np.asarray(line).reshape(-1, 2))
