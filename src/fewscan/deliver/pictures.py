"""Pictures of results: outlines over three planes as SVG, and the training curve as a PNG."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contourpy import contour_generator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from fewscan.data.io import atomic
from fewscan.errors import DataError
from fewscan.space.combinations import mask_of
from fewscan.space.volume import IGNORE, Labelmap, bounding_box

PLANES = (("axial", 2, "R", "A"), ("coronal", 1, "R", "S"), ("sagittal", 0, "A", "S"))
"""Name, axis cut, and what lies at the left and at the top edge: the way radiologists hang them."""
PIXELS = 320
FEW = 8  # more labels than this are drawn with thinner outlines
MOST_BYTES = 45_000  # of a PNG; base64 adds a third, so that a picture stays under 60 kB


@dataclass(frozen=True)
class Plane:
    """One drawn cut.

    Parameters
    ----------
    name : str
        Such as "axial".
    svg : str
        Grey image, outlines of class ``reference`` and ``prediction``, and a scale bar; one unit is one mm.
    left, top : str
        Direction at that edge: R, A or S.
    bar_mm : float
        Length of the scale bar.
    """

    name: str
    svg: str
    left: str
    top: str
    bar_mm: float


@dataclass(frozen=True)
class _View:
    """A square window on one cut, columns and rows in display order (both run against their voxel axes)."""

    columns: slice
    rows: slice
    counts: tuple[int, int]
    size: tuple[float, float]  # mm of a voxel along columns and rows
    window: tuple[float, float, float]  # left, top, side in mm

    @property
    def corner(self) -> tuple[float, float]:
        """Left and top edge of the cropped image, mm."""
        return (self.counts[0] - self.columns.stop) * self.size[0], (self.counts[1] - self.rows.stop) * self.size[1]

    def crop(self, cut: NDArray[Any]) -> NDArray[Any]:
        """(columns, rows) of a cut to (rows, columns) as shown."""
        return cut[self.columns, self.rows].T[::-1, ::-1]


def three_planes(
    reference: Labelmap,
    prediction: Labelmap,
    *,
    image: NDArray[Any] | None = None,
    most_of: NDArray[np.bool_] | None = None,
) -> list[Plane]:
    """Draw the cuts through the centre of the labelled structures, or those that show most of something.

    Parameters
    ----------
    reference, prediction : Labelmap
        On one grid; labels may overlap.
    image : (X, Y, Z) number, optional
        Intensities on the same grid; None draws outlines alone.
    most_of : (X, Y, Z) bool, optional
        Voxels of which each cut is to show as many as one can.

    Examples
    --------
    >>> ball = np.zeros((9, 9, 9), np.uint16); ball[3:6, 3:6, 3:6] = 1
    >>> from fewscan.space.geometry import Geometry
    >>> label = Labelmap(ball, Geometry((9, 9, 9), np.diag([1.0, 1.0, 2.0, 1.0])), {1: "ball"})
    >>> [plane.name for plane in three_planes(label, label)]
    ['axial', 'coronal', 'sagittal']
    """
    spacing = reference.geometry.spacing
    drawn_there, found_there = ((part.data > 0) & (part.data != IGNORE) for part in (reference, prediction))
    any_label = drawn_there | found_there
    box = bounding_box(any_label)
    side = 1.35 * max((s.stop - s.start) * mm for s, mm in zip(box, spacing, strict=True))
    levels = None if image is None else _levels(image[bounding_box(any_label, margin=8)])
    count = len(np.unique(reference.data[drawn_there])) if reference.table is None else len(reference.names)
    kinds = "plane" if count <= FEW else "plane many"
    drawn = []
    for name, axis, left, top in PLANES:
        if most_of is not None and most_of.any():
            index = int(_area(most_of, axis).argmax())
        else:
            index = _middle(drawn_there if drawn_there.any() else any_label, axis)
        a, b = (other for other in range(3) if other != axis)
        view = _view((box[a], box[b]), (any_label.shape[a], any_label.shape[b]), (spacing[a], spacing[b]), side)
        parts = [] if image is None or levels is None else [_grey(view.crop(image.take(index, axis)), levels, view)]
        for kind, labels in (("reference", reference), ("prediction", prediction)):
            masks = _masks(view.crop(np.take(labels.data, index, axis=axis)), labels)
            parts.append(f'<path class="{kind}" d="{_outlines(masks, view)}"/>')
        bar = next((mm for mm in (100.0, 50.0, 20.0, 10.0, 5.0, 2.0) if mm <= side / 3), 1.0)
        x, y, _ = view.window
        parts.append(f'<path class="bar" d="M{x + side * 0.95 - bar:.2f} {y + side * 0.95:.2f}h{bar:g}"/>')
        frame = f"{x:.2f} {y:.2f} {side:.2f} {side:.2f}"
        svg = f'<svg class="{kinds}" viewBox="{frame}" role="img" aria-label="{name} cut">{"".join(parts)}</svg>'
        drawn.append(Plane(name, svg, left, top, bar))
    return drawn


def read_history(path: Path) -> list[dict[str, Any]]:
    """Lines of a training history; a last line cut off by a kill is left out.

    Parameters
    ----------
    path : Path
        ``history.jsonl``: one JSON object per line.

    Raises
    ------
    DataError
        If the file or a line before the last is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it or train again") from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}: line {number} is not JSON ({error}); delete the line or train again") from error
        if isinstance(entry, dict):
            wrong = [k for k in ("loss", "seconds", "step") if not isinstance(entry.get(k, 0), int | float)]
            if wrong or ("loss" in entry and "seconds" not in entry):
                raise DataError(f"{path}: line {number} needs numbers for loss and seconds; delete it or train again")
            found.append(entry)
    return found


def smoothed(values: Sequence[float], *, points: int = 160) -> tuple[list[int], list[float]]:
    """Medians of equally long stretches, and the index in the middle of each: a curve that can be read.

    Parameters
    ----------
    values : sequence of float
        One per step.
    points : int
        How many stretches at most.

    Examples
    --------
    >>> smoothed([1.0, 9.0, 1.0, 2.0, 2.0, 2.0], points=2)
    ([1, 4], [1.0, 2.0])
    """
    bins = [b for b in np.array_split(np.arange(len(values)), min(points, len(values)) or 1) if b.size]
    x = np.asarray(values, dtype=np.float64)
    return [int(b[b.size // 2]) for b in bins], [float(np.nanmedian(x[b])) for b in bins]


def curve_png(history_path: Path, out: Path) -> None:
    """Draw the training loss over time.

    Parameters
    ----------
    history_path : Path
        ``history.jsonl``.
    out : Path
        PNG to write.
    """
    history = [h for h in read_history(history_path) if math.isfinite(h.get("loss", math.nan))]
    loss, seconds = [h["loss"] for h in history], [h["seconds"] for h in history]
    figure = Figure(figsize=(7, 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(seconds, loss, color="#0b6e6e", alpha=0.2, linewidth=0.8)
    if history:
        where, middle = smoothed(loss)
        axes.plot([seconds[i] for i in where], middle, color="#0b6e6e", linewidth=1.8)
    axes.set_xlabel("seconds")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic(out) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _middle(labels: NDArray[Any], axis: int) -> int:
    """Cut nearest to the centre of mass; the fullest one where the centre is hollow."""
    area = _area(labels, axis)
    if not area.any():
        return int(area.size // 2)
    centre = round(float((np.arange(area.size) * area).sum() / area.sum()))
    return centre if area[centre] else int(area.argmax())


def _area(labels: NDArray[Any], axis: int) -> NDArray[np.int64]:
    """Labelled voxels of each cut."""
    found: NDArray[np.int64] = (labels > 0).sum(axis=tuple(a for a in range(3) if a != axis))
    return found


def _view(box: tuple[slice, slice], counts: tuple[int, int], size: tuple[float, float], side: float) -> _View:
    edges, corner = [], []
    for s, n, mm in zip(box, counts, size, strict=True):
        middle = (s.start + s.stop) / 2
        low, high = math.floor(middle - side / mm / 2), math.ceil(middle + side / mm / 2)
        edges.append(slice(max(0, low), min(n, high)))
        corner.append((n - middle) * mm - side / 2)
    return _View(edges[0], edges[1], counts, size, (corner[0], corner[1], side))


def _levels(image: NDArray[Any]) -> tuple[float, float]:
    low, high = (float(v) for v in np.percentile(image, [1, 99.5]))
    return low, max(high, low + 1e-6)


def _grey(cut: NDArray[Any], levels: tuple[float, float], view: _View) -> str:
    grey = np.clip((cut.astype(np.float32) - levels[0]) / (levels[1] - levels[0]), 0, 1)
    rows, columns = cut.shape
    wide, high = columns * view.size[0], rows * view.size[1]
    picture, pixels = Image.fromarray((grey * 255).astype(np.uint8)), PIXELS
    while True:
        scale = pixels / view.window[2]
        shape = max(1, round(wide * scale)), max(1, round(high * scale))
        buffer = io.BytesIO()
        picture.resize(shape, Image.Resampling.BICUBIC).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= MOST_BYTES:
            break
        pixels = round(pixels * 0.85)
    code = base64.b64encode(buffer.getvalue()).decode()
    x, y = view.corner
    place = f'x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{high:.2f}"'
    return f'<image {place} preserveAspectRatio="none" href="data:image/png;base64,{code}"/>'


def _masks(cut: NDArray[Any], labels: Labelmap) -> list[NDArray[np.bool_]]:
    """What a cut holds of each label that it holds."""
    if labels.table is not None:
        return [mask for held in labels.table.T if (mask := mask_of(cut, held)).any()]
    return [cut == value for value in np.unique(cut[(cut > 0) & (cut != IGNORE)])]


def _outlines(masks: Sequence[NDArray[np.bool_]], view: _View) -> str:
    """Outlines half-way between voxel centres, as SVG path data in mm."""
    x0, y0 = view.corner
    path = []
    for mask in masks:
        for line in contour_generator(z=np.pad(mask.astype(np.float64), 1)).lines(0.5):
            mm = np.asarray(line).reshape(-1, 2) * view.size + (x0 - view.size[0] / 2, y0 - view.size[1] / 2)
            path.append("M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in mm))
    return "".join(path)
