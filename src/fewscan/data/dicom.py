"""DICOM series in.

No message of this module repeats what a header says about a person, a place or a date, and pydicom, whose warnings
quote header values, is kept silent.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from fewscan.data.headers import LPS_TO_RAS, affine_of, check_sizes, scaled
from fewscan.errors import DataError
from fewscan.space.geometry import Geometry, to_ras
from fewscan.space.volume import Volume

NEEDED = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "PixelData")
LARGEST_GAP = 0.1  # by how much of the median the distance between two slices may differ
LARGEST_SHIFT_MM = 0.5  # how far a slice may lie beside the line through the others
LARGEST_SLICE = 2**28  # bytes


@dataclass(frozen=True, eq=False)
class _Slice:
    """What is kept of one file: (columns, rows) intensities, their place in LPS mm, and which series they are of."""

    data: NDArray[Any]
    place: NDArray[np.float64]
    along: NDArray[np.float64]
    spacing: NDArray[np.float64]
    thickness: float
    series: str


def is_series(folder: Path) -> bool:
    """Whether a folder holds DICOM files.

    Parameters
    ----------
    folder : Path
        Any folder.
    """
    try:
        files = sorted(e.path for e in os.scandir(folder) if e.is_file() and not _passed_over(e.name))
        return any(_is_dicom(Path(f)) for f in files[:3])
    except OSError:
        return False


def _passed_over(name: str) -> bool:
    """Hidden files, and the index of an exported disc, which is DICOM but no slice."""
    return name.startswith(".") or name.upper() == "DICOMDIR"


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def read_series(folder: Path) -> Volume:
    """Read the one series in a folder, slices sorted by where they lie, intensities rescaled.

    Parameters
    ----------
    folder : Path
        Folder with the slices of one series, one file each.

    Raises
    ------
    DataError
        If there is no series or more than one, a slice is missing, doubled or damaged, or the slices do not tell where
        they lie.
    """
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not _passed_over(f.name) and _is_dicom(f)]
    slices = [s for s in (_slice(f, folder) for f in files) if s is not None]
    if not slices:
        raise DataError(f"{folder}: holds no DICOM image slices; give the folder of one CT or MR series")
    series = Counter(s.series for s in slices)
    if len(series) > 1:
        raise DataError(
            f"{folder}: holds {len(series)} series of {sorted(series.values())} slices; put each into its own folder"
        )
    _check_alike(slices, folder)
    slices, step = _sorted(slices, folder)
    first = slices[0]
    matrix = np.stack([first.along[0] * first.spacing[1], first.along[1] * first.spacing[0], step], axis=1)
    shape = (*first.data.shape, len(slices))
    check_sizes((*shape, 1), folder)
    native = Geometry((shape[0], shape[1], shape[2]), affine_of(LPS_TO_RAS @ matrix, LPS_TO_RAS @ first.place))
    kind = np.result_type(*{s.data.dtype for s in slices})
    data, geometry = to_ras(np.stack([s.data for s in slices], axis=-1).astype(kind, copy=False)[None], native)
    return Volume(np.ascontiguousarray(data), geometry, native)


def _slice(file: Path, folder: Path) -> _Slice | None:
    """One slice; None for a file without an image."""
    try:
        with _quiet():
            return _parse(pydicom.dcmread(file), folder)
    except DataError:
        raise
    except Exception as error:  # pydicom and its decoders raise whatever they meet; its text may quote the header
        kind = type(error).__name__
        raise DataError(f"{folder}: a DICOM slice cannot be read ({kind}); export the series again") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without pydicom's warnings and log lines."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _parse(item: pydicom.Dataset, folder: Path) -> _Slice | None:
    if "PixelData" not in item:
        return None
    missing = [n for n in NEEDED if n not in item or item[n].is_empty]
    if missing:
        raise DataError(f"{folder}: a slice has no {missing[0]}, so its place is unknown; export the series again")
    if int(item.get("NumberOfFrames") or 1) > 1 or int(item.get("SamplesPerPixel") or 1) > 1:
        raise DataError(f"{folder}: multi-frame or colour DICOM is not understood; convert it to NIfTI")
    place, along = np.array(item.ImagePositionPatient, float), np.array(item.ImageOrientationPatient, float)
    spacing, scale = np.array(item.PixelSpacing, float), (item.get("RescaleSlope"), item.get("RescaleIntercept"))
    slope, inter = (fallback if v is None else float(v) for v, fallback in zip(scale, (1.0, 0.0), strict=True))
    numbers = np.concatenate([place, along, spacing, [slope, inter]])
    if len(numbers) != 13 or not np.isfinite(numbers).all() or spacing.min() <= 0:
        raise DataError(f"{folder}: the place or scale of a slice is damaged; export the series again")
    rows, columns = int(item.Rows), int(item.Columns)
    declared = rows * columns * int(item.get("BitsAllocated") or 16) // 8
    if declared > LARGEST_SLICE:
        raise DataError(f"{folder}: a slice declares {declared} bytes, which cannot be; export the series again")
    pixels = item.pixel_array
    if pixels.shape != (rows, columns):
        raise DataError(f"{folder}: a slice holds {pixels.shape} pixels, not what it declares; export the series again")
    return _Slice(
        data=(scaled(pixels, slope=slope, inter=inter) if (slope, inter) != (1, 0) else pixels).T,
        place=place,
        along=along.reshape(2, 3),
        spacing=spacing,
        thickness=float(item.get("SliceThickness") or 0),
        series=str(item.get("SeriesInstanceUID", "")),
    )


def _check_alike(slices: Sequence[_Slice], folder: Path) -> None:
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


def _sorted(slices: list[_Slice], folder: Path) -> tuple[list[_Slice], NDArray[np.float64]]:
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
        raise DataError(f"{folder}: two slices lie in the same place; put each series or phase into its own folder")
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
