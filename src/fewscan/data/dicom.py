"""DICOM series in.

No message of this module repeats what a header says about a person, a place or a date.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fewscan.data.headers import LPS_TO_RAS, affine_of, check_sizes, scaled
from fewscan.errors import DataError
from fewscan.space.geometry import Geometry, to_ras
from fewscan.space.volume import Volume

NEEDED = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "PixelData")
LARGEST_GAP = 0.1  # by how much of the median the distance between two slices may differ
LARGEST_SHIFT_MM = 0.5  # how far a slice may lie beside the line through the others


def is_series(folder: Path) -> bool:
    """Whether a folder holds DICOM files.

    Parameters
    ----------
    folder : Path
        Any folder.
    """
    try:
        files = sorted(e.path for e in os.scandir(folder) if e.is_file() and not e.name.startswith("."))
        return any(_is_dicom(Path(f)) for f in files[:3])
    except OSError:
        return False


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
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".") and _is_dicom(f)]
    slices = [s for s in (_slice(f, folder) for f in files) if s is not None]
    if not slices:
        raise DataError(f"{folder}: holds no DICOM image slices; give the folder of one CT or MR series")
    series = Counter(str(s.get("SeriesInstanceUID", "")) for s in slices)
    if len(series) > 1:
        raise DataError(
            f"{folder}: holds {len(series)} series of {sorted(series.values())} slices; put each into its own folder"
        )
    _check_alike(slices, folder)
    slices, step = _sorted(slices, folder)
    along = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    row_mm, column_mm = (float(v) for v in slices[0].PixelSpacing)
    matrix = np.stack([along[0] * column_mm, along[1] * row_mm, step], axis=1)
    origin = np.array(slices[0].ImagePositionPatient, float)
    shape = (int(slices[0].Columns), int(slices[0].Rows), len(slices))
    check_sizes((*shape, 1), folder)
    native = Geometry(shape, affine_of(LPS_TO_RAS @ matrix, LPS_TO_RAS @ origin))
    planes = [_pixels(s, folder) for s in slices]
    kind = np.result_type(*{p.dtype for p in planes})
    data, geometry = to_ras(np.stack(planes, axis=-1).astype(kind, copy=False)[None], native)
    return Volume(np.ascontiguousarray(data), geometry, native)


def _slice(file: Path, folder: Path) -> Dataset | None:
    """One slice with its pixels still packed; None for a file without an image."""
    try:
        with _quiet():
            dataset = pydicom.dcmread(file)
        if "PixelData" not in dataset:
            return None
        missing = [n for n in NEEDED if n not in dataset or dataset[n].is_empty]
        if missing:
            raise DataError(f"{folder}: a slice has no {missing[0]}, so its place is unknown; export the series again")
        if int(dataset.get("NumberOfFrames") or 1) > 1 or int(dataset.get("SamplesPerPixel") or 1) > 1:
            raise DataError(f"{folder}: multi-frame or colour DICOM is not understood; convert it to NIfTI")
        numbers = [*dataset.ImagePositionPatient, *dataset.ImageOrientationPatient, *dataset.PixelSpacing]
        if len(numbers) != 11 or not np.isfinite(np.array(numbers, float)).all():
            raise DataError(f"{folder}: the place of a slice is damaged; export the series again")
        return dataset
    except DataError:
        raise
    except Exception as error:  # pydicom raises whatever its parsers meet
        raise _damaged(folder, error) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without pydicom's warnings, which quote what headers say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _damaged(folder: Path, error: Exception) -> DataError:
    """Names the kind of error only: its text may quote the header."""
    return DataError(f"{folder}: a DICOM slice cannot be read ({type(error).__name__}); export the series again")


def _check_alike(slices: Sequence[Dataset], folder: Path) -> None:
    """Refuse slices of different size, spacing or direction."""
    first = slices[0]
    for other in slices[1:]:
        if (other.Rows, other.Columns) != (first.Rows, first.Columns):
            raise DataError(
                f"{folder}: slices of {first.Rows} x {first.Columns} and {other.Rows} x {other.Columns} pixels; "
                "put each series into its own folder"
            )
        for name in ("PixelSpacing", "ImageOrientationPatient"):
            a, b = np.array(first[name].value, float), np.array(other[name].value, float)
            if np.abs(a - b).max() > 1e-3:
                raise DataError(f"{folder}: slices differ in {name} ({a} and {b}); put each series into its own folder")


def _sorted(slices: list[Dataset], folder: Path) -> tuple[list[Dataset], NDArray[np.float64]]:
    """Slices along their normal, and the step from one to the next, mm in LPS."""
    along = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(along[0], along[1])
    if abs(np.linalg.norm(normal) - 1) > 1e-2:
        raise DataError(f"{folder}: rows and columns are not at right angles; convert the series to NIfTI")
    places = np.array([s.ImagePositionPatient for s in slices], float)
    order = np.argsort(places @ normal, kind="stable")
    slices, places = [slices[i] for i in order], places[order]
    if len(slices) == 1:
        thickness = float(slices[0].get("SliceThickness") or 0)
        if thickness <= 0:
            raise DataError(f"{folder}: a single slice without thickness; give the whole series")
        return slices, normal * thickness
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


def _pixels(dataset: Dataset, folder: Path) -> NDArray[Any]:
    """Intensities (columns, rows) of one slice."""
    declared = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("BitsAllocated") or 16) // 8
    if declared > 2**28:
        raise DataError(f"{folder}: a slice declares {declared} bytes, which cannot be; export the series again")
    try:
        with _quiet():
            pixels = dataset.pixel_array
        slope, inter = float(dataset.get("RescaleSlope", 1) or 1), float(dataset.get("RescaleIntercept", 0) or 0)
    except Exception as error:  # decoders raise whatever they meet
        raise _damaged(folder, error) from None
    if pixels.shape != (dataset.Rows, dataset.Columns):
        raise DataError(f"{folder}: a slice holds {pixels.shape} pixels, not what it declares; export the series again")
    return scaled(pixels, slope, inter).T if (slope, inter) != (1, 0) else pixels.T
