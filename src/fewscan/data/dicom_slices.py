"""Slices of DICOM files: what a file holds, the place of each slice, its pixels.

A file holds one slice, or the frames of an enhanced multi-frame image (PS3.3 C.7.6.16), each of which says its
place.

No message of this module repeats what a header says about a person, a place or a date, and pydicom, whose warnings
quote header values, is kept silent.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid

from fewscan.data.headers import check_sizes, scaled
from fewscan.errors import DataError

NEEDED = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "PixelData")
AGAIN = "export the series again"
LARGEST_FILE = 2**33  # bytes of pixels
LARGEST_SLICE = 2**28  # bytes
LABEL_CLASSES = (uid.SegmentationStorage, uid.UID("1.2.840.10008.5.1.4.1.1.66.7"), uid.RTStructureSetStorage)
"""SOP classes of labels: binary or fractional segmentation, label map segmentation, structure set."""
SLICE_CLASSES = (
    uid.CTImageStorage,
    uid.EnhancedCTImageStorage,
    uid.LegacyConvertedEnhancedCTImageStorage,
    uid.MRImageStorage,
    uid.EnhancedMRImageStorage,
    uid.LegacyConvertedEnhancedMRImageStorage,
    uid.PositronEmissionTomographyImageStorage,
    uid.EnhancedPETImageStorage,
    uid.LegacyConvertedEnhancedPETImageStorage,
)
CAPTURED_CLASSES = (
    uid.SecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    uid.MultiFrameSingleBitSecondaryCaptureImageStorage,
    uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
)
"""SOP classes of screens that were captured, such as pages of a dose report."""
NEVER_IMAGES = tuple(f"1.2.840.10008.5.1.4.1.1.{branch}." for branch in ("11", "88", "104", "481"))
"""Beginnings of SOP classes: presentation states, reports and notes, documents, and what belongs to radiotherapy."""
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
GROUPS = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"
PLACES = {  # functional group: what a slice of its own says at its top level
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}


@dataclass(frozen=True, eq=False)
class Slice:
    """What is kept of one slice.

    Parameters
    ----------
    file : Path
        Where it was read.
    data : (columns, rows) number
        Intensities; zeros where they were not asked for.
    place, along, spacing : (3,), (2, 3) and (2,) float
        Centre of the first pixel, directions of a row and of a column in LPS, mm between rows and between columns.
    thickness : float
        mm, 0 where the file does not say.
    series, number, frame_of_reference : str
        UID and number of its series, UID of its frame of reference; empty where the file does not say.
    frame : int
        Number of the frame in its file, from 1; 0 where the file holds one slice.
    """

    file: Path
    data: NDArray[Any]
    place: NDArray[np.float64]
    along: NDArray[np.float64]
    spacing: NDArray[np.float64]
    thickness: float
    series: str
    number: str
    frame_of_reference: str
    frame: int


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


def holds_image(file: Path, kind: str | None) -> bool:
    """Whether a file is a DICOM image that may be a slice, and no report, presentation state, plan or label.

    Parameters
    ----------
    file : Path
        Any file.
    kind : str, optional
        What `sop_class` says of it.
    """
    if kind is None or kind in LABEL_CLASSES or kind.startswith(NEVER_IMAGES):
        return False
    if not kind or kind in SLICE_CLASSES:  # a damaged one is told where it is read
        return True
    try:
        with quiet():
            return "Rows" in pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["Rows"])
    except Exception:  # pydicom raises whatever it meets in a damaged file
        return True


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


def read_slices(file: Path, folder: Path, *, pixels: bool) -> list[Slice]:
    """Slices of one file; none of a file without an image.

    Parameters
    ----------
    file, folder : Path
        What to read, and the series it is of, which messages name.
    pixels : bool
        Whether the intensities are wanted, or only where they lie.

    Raises
    ------
    DataError
        If the file is damaged, is in colour, or does not say where its slices lie.
    """
    try:
        with quiet():
            item = pydicom.dcmread(file, defer_size=None if pixels else 4096)
            if "PixelData" not in item:
                return []
            heads = flattened(item, folder)
            _check_size(item, len(heads), folder)
            stored = _unpack(item, folder) if pixels else None
            if stored is not None:
                stored = stored.reshape(-1, *stored.shape[-2:])
                if len(stored) != len(heads):
                    raise DataError(f"{folder}: a file holds {len(stored)} frames and tells of {len(heads)}; {AGAIN}")
            many = heads[0] is not item
            return [
                _parse(head, file, folder, stored=None if stored is None else stored[n], frame=(n + 1) * many)
                for n, head in enumerate(heads)
            ]
    except DataError:
        raise
    except Exception as error:  # pydicom and its decoders raise whatever they meet; its text may quote the header
        kind = type(error).__name__
        raise DataError(f"{folder}: a DICOM slice cannot be read ({kind}); {AGAIN}") from None


def flattened(item: pydicom.Dataset, folder: Path) -> list[pydicom.Dataset]:
    """Headers as if each frame were a slice of its own; the header itself where the file holds one slice.

    Each frame's header also says ``ReferencedFrameNumber``.

    Parameters
    ----------
    item : pydicom.Dataset
        Of a file.
    folder : Path
        For messages.

    Raises
    ------
    DataError
        If there are frames that do not say where they lie.
    """
    if int(item.get("SamplesPerPixel") or 1) > 1:
        raise DataError(f"{folder}: colour DICOM is not understood; give the CT or MR series itself")
    if GROUPS[0] not in item:
        if int(item.get("NumberOfFrames") or 1) > 1:
            raise DataError(
                f"{folder}: is multi-frame DICOM whose frames do not say where they lie; export it as enhanced CT or "
                "MR, as single slices or as NIfTI"
            )
        return [item]
    shared = (item.get(GROUPS[1]) or [pydicom.Dataset()])[0]
    top = {e.tag: item[e.tag] for e in item if e.keyword not in GROUPS}
    heads = []
    for number, own in enumerate(item[GROUPS[0]].value, start=1):
        head = pydicom.Dataset(dict(top))
        for group, names in PLACES.items():
            found = (own if group in own else shared).get(group)
            for name in names if found else ():
                if name in found[0]:
                    setattr(head, name, found[0].get(name))
        head.ReferencedFrameNumber = number
        heads.append(head)
    return heads


def _check_size(item: pydicom.Dataset, frames: int, folder: Path) -> None:
    """Refuse sizes that cannot be, before anything is unpacked."""
    missing = [n for n in ("Rows", "Columns") if not item.get(n)]
    if missing:
        raise DataError(f"{folder}: a slice has no {missing[0]}, so its place is unknown; {AGAIN}")
    rows, columns = int(item.Rows), int(item.Columns)
    declared = rows * columns * int(item.get("BitsAllocated") or 16) // 8
    if declared > LARGEST_SLICE or declared * frames > LARGEST_FILE:
        raise DataError(f"{folder}: a slice declares {declared} bytes, which cannot be; {AGAIN}")
    check_sizes((columns, rows, frames, 1), folder)


def _parse(item: pydicom.Dataset, file: Path, folder: Path, *, stored: NDArray[Any] | None, frame: int) -> Slice:
    """One slice from its own header and its stored values (rows, columns), if they were asked for."""
    missing = [n for n in NEEDED if n not in item or item[n].is_empty]
    if missing:
        raise DataError(f"{folder}: a slice has no {missing[0]}, so its place is unknown; {AGAIN}")
    place, along = np.array(item.ImagePositionPatient, float), np.array(item.ImageOrientationPatient, float)
    spacing, scale = np.array(item.PixelSpacing, float), (item.get("RescaleSlope"), item.get("RescaleIntercept"))
    slope, inter = (fallback if v is None else float(v) for v, fallback in zip(scale, (1.0, 0.0), strict=True))
    numbers = np.concatenate([place, along, spacing, [slope, inter]])
    if len(numbers) != 13 or not np.isfinite(numbers).all() or spacing.min() <= 0:
        raise DataError(f"{folder}: the place or scale of a slice is damaged; {AGAIN}")
    shape = (int(item.Rows), int(item.Columns))
    data = np.broadcast_to(np.uint8(0), shape) if stored is None else stored
    if data.shape != shape:
        raise DataError(f"{folder}: a slice holds {data.shape} pixels, not what it declares; {AGAIN}")
    return Slice(
        file=file,
        data=(scaled(data, slope=slope, inter=inter) if stored is not None and (slope, inter) != (1, 0) else data).T,
        place=place,
        along=along.reshape(2, 3),
        spacing=spacing,
        thickness=float(item.get("SliceThickness") or 0),
        series=str(item.get("SeriesInstanceUID", "")),
        number=str(item.get("SeriesNumber") or ""),
        frame_of_reference=str(item.get("FrameOfReferenceUID") or ""),
        frame=frame,
    )


def _unpack(item: pydicom.Dataset, folder: Path) -> NDArray[Any]:
    """Stored values ([frames,] rows, columns); what pydicom cannot decode goes to GDCM, which comes with SimpleITK."""
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
    for name in (*PIXEL_MODULE, *(["NumberOfFrames"] if "NumberOfFrames" in item else [])):
        setattr(bare, name, item[name].value)
    bare["PixelData"].is_undefined_length = True
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "slice.dcm"
        pydicom.dcmwrite(file, bare)
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            unpacked: NDArray[Any] = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        except RuntimeError:
            name = syntax.name if syntax.is_transfer_syntax else "an unknown transfer syntax"
            raise DataError(
                f"{folder}: a slice is compressed as {name}, which cannot be unpacked; export the series uncompressed"
            ) from None
    return unpacked
