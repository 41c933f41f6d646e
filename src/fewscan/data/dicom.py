"""DICOM series in, and the headers that a result is bound to.

No message of this module repeats what a header says about a person, a place or a date, and pydicom, whose warnings
quote header values, is kept silent.
"""

from __future__ import annotations

import logging
import os
import tempfile
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
from pydicom import uid

from fewscan.data.headers import LPS_TO_RAS, affine_of, check_sizes, scaled
from fewscan.errors import DataError
from fewscan.space.geometry import Geometry, to_ras
from fewscan.space.volume import Volume

NEEDED = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "PixelData")
LARGEST_GAP = 0.1  # by how much of the median the distance between two slices may differ
LARGEST_SHIFT_MM = 0.5  # how far a slice may lie beside the line through the others
LARGEST_SLICE = 2**28  # bytes
LABEL_CLASSES = (uid.SegmentationStorage, uid.UID("1.2.840.10008.5.1.4.1.1.66.7"), uid.RTStructureSetStorage)
"""SOP classes of labels: binary or fractional segmentation, label map segmentation, structure set."""
PIXEL_MODULE = [
    "SOPClassUID",
    "SOPInstanceUID",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
]


@dataclass(frozen=True, eq=False)
class _Slice:
    """What is kept of one file: (columns, rows) intensities, their place in LPS mm, and which series they are of."""

    file: Path
    data: NDArray[Any]
    place: NDArray[np.float64]
    along: NDArray[np.float64]
    spacing: NDArray[np.float64]
    thickness: float
    series: str
    number: str
    frame: str


@dataclass(frozen=True, eq=False)
class Series:
    """A series without its pixels: what labels are bound to.

    Parameters
    ----------
    folder : Path
        Where it lies.
    files : tuple of Path
        One per slice, in the order of the last axis of ``native``.
    native : Geometry
        Grid of columns, rows and slices.
    uid : str
        Of the series.
    frame : str
        Frame of reference; empty where the files name none.
    """

    folder: Path
    files: tuple[Path, ...]
    native: Geometry
    uid: str
    frame: str


def is_series(folder: Path) -> bool:
    """Whether a folder holds DICOM files other than labels.

    Parameters
    ----------
    folder : Path
        Any folder.
    """
    strangers = 0
    try:
        for file in sorted(e.path for e in os.scandir(folder) if e.is_file() and not _passed_over(e.name)):
            kind = sop_class(Path(file))
            if kind is not None and kind not in LABEL_CLASSES:
                return True
            strangers += kind is None
            if strangers == 3:
                return False
    except OSError:
        return False
    return False


def _passed_over(name: str) -> bool:
    """Hidden files, and the index of an exported disc, which is DICOM but no slice."""
    return name.startswith(".") or name.upper() == "DICOMDIR"


def sop_class(file: Path) -> str | None:
    """What kind of object a DICOM file holds; empty where it does not say, None for another kind of file.

    Parameters
    ----------
    file : Path
        Any file.
    """
    with file.open("rb") as stream:
        if stream.read(132)[128:] != b"DICM":
            return None
    try:
        with quiet():
            return str(pydicom.filereader.read_file_meta_info(file).get("MediaStorageSOPClassUID", ""))
    except Exception:  # pydicom raises whatever it meets in a damaged file
        return ""


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
    slices, native = _ordered(folder, pixels=True)
    kind = np.result_type(*{s.data.dtype for s in slices})
    data, geometry = to_ras(np.stack([s.data for s in slices], axis=-1).astype(kind, copy=False)[None], native)
    return Volume(np.ascontiguousarray(data), geometry, native)


def describe_series(folder: Path) -> Series:
    """Read where the slices of a series lie, without their pixels.

    Parameters
    ----------
    folder : Path
        As for `read_series`, which refuses the same.
    """
    slices, native = _ordered(folder, pixels=False)
    return Series(folder, tuple(s.file for s in slices), native, slices[0].series, slices[0].frame)


def _ordered(folder: Path, *, pixels: bool) -> tuple[list[_Slice], Geometry]:
    """The slices of the one series in a folder, and their grid."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of one CT or MR series")
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not _passed_over(f.name)]
    kinds = {f: sop_class(f) for f in files}
    images = [f for f in files if kinds[f] is not None and kinds[f] not in LABEL_CLASSES]
    slices = [s for s in (_slice(f, folder, pixels=pixels) for f in images) if s is not None]
    if not slices:
        raise DataError(f"{folder}: holds no DICOM image slices; give the folder of one CT or MR series")
    series = Counter((s.series, s.number) for s in slices)
    if len(series) > 1:
        told = ", ".join(sorted(f"number {number or '?'} of {n} slice(s)" for (_, number), n in series.items()))
        raise DataError(f"{folder}: holds {len(series)} series, {told}; put each into its own folder")
    _check_alike(slices, folder)
    slices, step = _sorted(slices, folder)
    first = slices[0]
    matrix = np.stack([first.along[0] * first.spacing[1], first.along[1] * first.spacing[0], step], axis=1)
    shape = (first.data.shape[0], first.data.shape[1], len(slices))
    check_sizes((*shape, 1), folder)
    return slices, Geometry(shape, affine_of(LPS_TO_RAS @ matrix, LPS_TO_RAS @ first.place))


def _slice(file: Path, folder: Path, *, pixels: bool) -> _Slice | None:
    """One slice; None for a file without an image."""
    try:
        with quiet():
            return _parse(pydicom.dcmread(file, defer_size=None if pixels else 4096), file, folder, pixels=pixels)
    except DataError:
        raise
    except Exception as error:  # pydicom and its decoders raise whatever they meet; its text may quote the header
        kind = type(error).__name__
        raise DataError(f"{folder}: a DICOM slice cannot be read ({kind}); export the series again") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's warnings and log lines, which quote header values."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _parse(item: pydicom.Dataset, file: Path, folder: Path, *, pixels: bool) -> _Slice | None:
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
    stored = _unpack(item, folder) if pixels else np.broadcast_to(np.uint8(0), (rows, columns))
    if stored.shape != (rows, columns):
        raise DataError(f"{folder}: a slice holds {stored.shape} pixels, not what it declares; export the series again")
    return _Slice(
        file=file,
        data=(scaled(stored, slope=slope, inter=inter) if pixels and (slope, inter) != (1, 0) else stored).T,
        place=place,
        along=along.reshape(2, 3),
        spacing=spacing,
        thickness=float(item.get("SliceThickness") or 0),
        series=str(item.get("SeriesInstanceUID", "")),
        number=str(item.get("SeriesNumber") or ""),
        frame=str(item.get("FrameOfReferenceUID") or ""),
    )


def _unpack(item: pydicom.Dataset, folder: Path) -> NDArray[Any]:
    """Stored values (rows, columns); what pydicom has no decoder for goes to GDCM, which comes with SimpleITK."""
    syntax = uid.UID(item.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian))
    try:
        known = not syntax.is_compressed or pydicom.pixels.get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        known = False
    if known:
        plain: NDArray[Any] = item.pixel_array
        return plain
    import SimpleITK as sitk  # noqa: N813  (its customary name; slow to import and rarely needed)

    bare = pydicom.Dataset()  # nothing but the pixels, so that neither person nor scale goes along
    bare.file_meta = item.file_meta
    for name in PIXEL_MODULE:
        setattr(bare, name, item[name].value)
    bare["PixelData"].is_undefined_length = True
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "slice.dcm"
        pydicom.dcmwrite(file, bare)
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            unpacked: NDArray[Any] = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))[0]
        except RuntimeError:
            name = syntax.name if syntax.is_transfer_syntax else "an unknown transfer syntax"
            raise DataError(
                f"{folder}: a slice is compressed as {name}, which cannot be unpacked; export the series uncompressed"
            ) from None
    return unpacked


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
