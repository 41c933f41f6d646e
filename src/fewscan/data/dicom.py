"""DICOM series: slices in one folder become a volume, or the grid that labels are bound to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewscan.data.dicom_slices import CAPTURED_CLASSES, Slice, holds_image, read_slices, sop_class
from fewscan.data.headers import LPS_TO_RAS, affine_of, check_sizes
from fewscan.errors import DataError
from fewscan.space.geometry import Geometry, to_ras
from fewscan.space.volume import Volume

LARGEST_GAP = 0.1  # by how much of the median the distance between two slices may differ
LARGEST_SHIFT_MM = 0.5  # how far a slice may lie beside the line through the others


@dataclass(frozen=True, eq=False)
class Series:
    """A series without its pixels: what labels are bound to.

    Parameters
    ----------
    folder : Path
        Where it lies.
    files : tuple of Path
        One per slice, in the order of the last axis of ``native``.
    frames : tuple of int
        Number of each slice in its file, from 1; 0 where the file holds one slice.
    native : Geometry
        Grid of columns, rows and slices.
    uid : str
        Of the series.
    frame_of_reference : str
        Its UID; empty where the files name none.
    """

    folder: Path
    files: tuple[Path, ...]
    frames: tuple[int, ...]
    native: Geometry
    uid: str
    frame_of_reference: str


def is_series(folder: Path) -> bool:
    """Whether a folder holds DICOM images; labels, reports and whatever else has no pixels of a scan make no series.

    Parameters
    ----------
    folder : Path
        Any folder, with ``@`` and a number behind its name where it holds several series; see `chosen`.
    """
    strangers = 0
    try:
        for file in sorted(e.path for e in os.scandir(chosen(folder)[0]) if e.is_file() and not passed_over(e.name)):
            kind = sop_class(Path(file))
            if holds_image(Path(file), kind):
                return True
            strangers += kind is None
            if strangers == 3:
                return False
    except OSError:
        return False
    return False


def chosen(folder: Path) -> tuple[Path, str]:
    """A folder, and which of its series is meant: its number, or nothing where the folder's own name is given.

    Parameters
    ----------
    folder : Path
        ``scans/p1``, or ``scans/p1@4`` for series number 4 in it.
    """
    name, found, number = folder.name.rpartition("@")
    if not found or not name or folder.exists():
        return folder, ""
    return folder.with_name(name), number


def on_disk(scan: Path) -> Path:
    """What there must be for a scan to be there: its file or folder, also where one of several series in it is meant.

    It is a folder where the scan is a series, and does not exist where the scan does not.

    Parameters
    ----------
    scan : Path
        Image file, or folder as for `chosen`.
    """
    folder = chosen(scan)[0]
    return folder if folder.is_dir() else scan


def passed_over(name: str) -> bool:
    """Whether a file is hidden, or the index of an exported disc, which is DICOM but no slice.

    Parameters
    ----------
    name : str
        Of the file.
    """
    return name.startswith(".") or name.upper() == "DICOMDIR"


def image_files(folder: Path) -> list[Path]:
    """Files of a folder that may hold slices, sorted; screens that were captured only where nothing else is there.

    Parameters
    ----------
    folder : Path
        Whatever its series.
    """
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not passed_over(f.name)]
    kinds = {f: sop_class(f) for f in files}
    images = [f for f in files if holds_image(f, kinds[f])]
    return [f for f in images if kinds[f] not in CAPTURED_CLASSES] or images


def read_series(folder: Path) -> Volume:
    """Read the one series in a folder, slices sorted by where they lie, intensities rescaled.

    Parameters
    ----------
    folder : Path
        Folder with the slices of one series, a file each or all in one; for one of several series see `chosen`.

    Raises
    ------
    DataError
        If there is no series or more than one, a slice is missing, doubled or damaged, or the slices do not tell where
        they lie.
    """
    slices, native = _ordered(folder)
    found = {(s.file, s.frame): s.data for f in {s.file for s in slices} for s in read_slices(f, folder, pixels=True)}
    data = [found[s.file, s.frame] for s in slices]
    kind = np.result_type(*{d.dtype for d in data})
    oriented, geometry = to_ras(np.stack(data, axis=-1).astype(kind, copy=False)[None], native)
    return Volume(np.ascontiguousarray(oriented), geometry, native)


def describe_series(folder: Path) -> Series:
    """Read where the slices of a series lie, without their pixels.

    Parameters
    ----------
    folder : Path
        As for `read_series`, which refuses the same.
    """
    slices, native = _ordered(folder)
    return Series(
        folder=folder,
        files=tuple(s.file for s in slices),
        frames=tuple(s.frame for s in slices),
        native=native,
        uid=slices[0].series,
        frame_of_reference=slices[0].frame_of_reference,
    )


def _ordered(path: Path) -> tuple[list[Slice], Geometry]:
    """The slices of the one series in a folder, without pixels, and their grid."""
    folder, number = chosen(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of one CT or MR series")
    slices = [s for file in image_files(folder) for s in read_slices(file, path, pixels=False)]
    if not slices:
        raise DataError(f"{folder}: holds no DICOM image slices; give the folder of one CT or MR series")
    slices = _one_series(slices, folder, number)
    _check_alike(slices, path)
    slices, step = _sorted(slices, path)
    first = slices[0]
    matrix = np.stack([first.along[0] * first.spacing[1], first.along[1] * first.spacing[0], step], axis=1)
    shape = (first.data.shape[0], first.data.shape[1], len(slices))
    check_sizes((*shape, 1), path)
    return slices, Geometry(shape, affine_of(LPS_TO_RAS @ matrix, LPS_TO_RAS @ first.place))


def _one_series(slices: list[Slice], folder: Path, number: str) -> list[Slice]:
    """The only series, or the one with this number."""
    series = Counter((s.series, s.number) for s in slices)
    wanted = [uid for uid, n in series if n == number] if number else [uid for uid, _ in series]
    if len(wanted) == 1:
        return [s for s in slices if s.series == wanted[0]]
    told = ", ".join(sorted(f"number {n or '?'} of {count} slice(s)" for (_, n), count in series.items()))
    numbers = Counter(n for _, n in series)
    named = [n for _, n in series if n and numbers[n] == 1]
    largest = max(named, key=lambda n: sum(c for (_, m), c in series.items() if m == n), default="")
    fix = f"choose one as in {folder.name}@{largest}, or " if largest else ""
    if number:
        raise DataError(f"{folder}: no single series has the number {number}; there are: {told}; {fix}give its folder")
    raise DataError(f"{folder}: holds {len(series)} series, {told}; {fix}put each into its own folder")


def _check_alike(slices: Sequence[Slice], folder: Path) -> None:
    """Refuse slices of different size, spacing or direction."""
    first = slices[0]
    for other in slices[1:]:
        if other.data.shape != first.data.shape:
            raise DataError(
                f"{folder}: slices of {first.data.shape} and {other.data.shape} pixels; "
                "put each series into its own folder"
            )
        for what, a, b in (("spacing", first.spacing, other.spacing), ("direction", first.along, other.along)):
            if np.abs(a - b).max() > 1e-3:
                raise DataError(
                    f"{folder}: slices differ in {what}, {a.tolist()} against {b.tolist()}; "
                    "put each series into its own folder"
                )


def _sorted(slices: list[Slice], folder: Path) -> tuple[list[Slice], NDArray[np.float64]]:
    """Slices along their normal, and the step from one to the next, mm in LPS."""
    normal = np.cross(slices[0].along[0], slices[0].along[1])
    if abs(np.linalg.norm(normal) - 1) > 1e-2:
        raise DataError(f"{folder}: rows and columns are not at right angles; convert the series to NIfTI")
    places = np.array([s.place for s in slices])
    order = np.argsort(places @ normal, kind="stable")
    slices, places = [slices[i] for i in order], places[order]
    if len(slices) == 1:
        if slices[0].thickness <= 0:
            raise DataError(f"{folder}: a single slice without thickness; give the whole series")
        return slices, normal * slices[0].thickness
    steps = np.diff(places @ normal)
    usual = float(np.median(steps))
    if steps.min() < 1e-3:
        twice = len({tuple(np.round(p, 3)) for p in places})
        raise DataError(
            f"{folder}: two slices lie in the same place ({len(slices)} slices in {twice} places: several phases or "
            "echoes?); put each series or phase into its own folder"
        )
    if np.abs(steps - usual).max() > LARGEST_GAP * usual:
        gap = int(np.abs(steps - usual).argmax())
        raise DataError(
            f"{folder}: {steps[gap]:.3g} mm between slices {gap + 1} and {gap + 2}, {usual:.3g} mm elsewhere: "
            "slices are missing or unevenly spaced; export the whole series again"
        )
    step = (places[-1] - places[0]) / (len(slices) - 1)
    line = places[0] + np.arange(len(slices))[:, None] * step
    if np.abs(places - line).max() > max(LARGEST_SHIFT_MM, LARGEST_GAP * usual):
        raise DataError(f"{folder}: slices are shifted against each other; convert the series to NIfTI")
    return slices, step
