"""RTSTRUCT out: closed planar contours on the slices of the source series, written with pydicom.

A contour runs half-way between the centres of voxels inside and outside, so that whoever asks which centres lie within
gets the mask back. A hole is joined to its surroundings by a keyhole (PS3.3 C.8.8.6.3), which readers that unite and
readers that alternate contours understand alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from numpy.typing import NDArray
from pydicom import Dataset, FileDataset, uid
from pydicom.dataset import FileMetaDataset

from fewscan.deliver.binding import TYPE_2, Binding
from fewscan.deliver.structures import Code, Structure
from fewscan.learn.checkpoint import USE
from fewscan.space.geometry import Array

STUDY_IF_THERE = [
    "SpecificCharacterSet",
    "IssuerOfPatientID",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyDescription",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
]
DETACHED_STUDY = "1.2.840.10008.3.1.2.3.1"  # retired, and still how a structure set refers to a study


def write_rtstruct(label: NDArray[np.uint16], path: Path, *, structures: Sequence[Structure], binding: Binding) -> None:
    """Write a structure set.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        In the order of the series' grid: columns, rows, slices.
    path : Path
        File to write; not renamed into place, see `fewscan.data.io.atomic`.
    structures : sequence of Structure
        One contour set each; those without a voxel are left out.
    binding : Binding
        The series, and who drew.
    """
    item = _shell(binding)
    first = binding.headers[0]
    images = [_reference(header) for header in binding.headers] if binding.source is None else [_whole(binding.source)]
    series = _dataset(SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=images)
    study = _dataset(
        ReferencedSOPClassUID=DETACHED_STUDY,
        ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    frame = _dataset(FrameOfReferenceUID=first.FrameOfReferenceUID, RTReferencedStudySequence=[study])
    item.ReferencedFrameOfReferenceSequence = [frame]
    there = [s for s in structures if (label == s.value).any()]
    item.StructureSetROISequence = [
        _dataset(
            ROINumber=number,
            ReferencedFrameOfReferenceUID=first.FrameOfReferenceUID,
            ROIName=s.name[:64],
            ROIGenerationAlgorithm="MANUAL" if binding.manual else "AUTOMATIC",
            ROIGenerationDescription=binding.algorithm[:64],
        )
        for number, s in enumerate(there, start=1)
    ]
    item.ROIContourSequence = [
        _dataset(
            ROIDisplayColor=list(s.colour),
            ReferencedROINumber=number,
            ContourSequence=list(_contours(label == s.value, binding)),
        )
        for number, s in enumerate(there, start=1)
    ]
    item.RTROIObservationsSequence = [_observation(number, s) for number, s in enumerate(there, start=1)]
    item.save_as(path, enforce_file_format=True)


def _shell(binding: Binding) -> FileDataset:
    """Patient and study as in the series, a series of its own, and what the whole file says."""
    now, first = datetime.now(), binding.headers[0]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = uid.RTStructureSetStorage
    meta.MediaStorageSOPInstanceUID = uid.generate_uid()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    item = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    for name in ["StudyInstanceUID", *TYPE_2, *(n for n in STUDY_IF_THERE if n in first)]:
        setattr(item, name, first.get(name, ""))
    item.SOPClassUID, item.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    item.InstanceCreationDate = item.StructureSetDate = item.SeriesDate = now.strftime("%Y%m%d")
    item.InstanceCreationTime = item.StructureSetTime = item.SeriesTime = now.strftime("%H%M%S")
    item.Modality, item.SeriesInstanceUID, item.SeriesNumber = "RTSTRUCT", uid.generate_uid(), binding.series_number
    item.InstanceNumber, item.OperatorsName = 1, ""
    item.SeriesDescription = binding.description
    item.Manufacturer = item.ManufacturerModelName = "fewscan"
    item.SoftwareVersions = binding.version
    item.FrameOfReferenceUID = first.FrameOfReferenceUID
    item.PositionReferenceIndicator = first.get("PositionReferenceIndicator", "")
    item.StructureSetLabel, item.StructureSetDescription = "fewscan", USE
    item.ApprovalStatus = "UNAPPROVED"
    return item


def _contours(mask: NDArray[np.bool_], binding: Binding) -> Iterator[Dataset]:
    """One item for each outline on each slice."""
    for level in np.flatnonzero(mask.any(axis=(0, 1))):
        header = binding.headers[level]
        along = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
        across, down = (float(s) for s in reversed(header.PixelSpacing))
        steps = np.stack([along[0] * across, along[1] * down])
        for outline in outlines(mask[..., level]):
            places = outline @ steps + np.array(header.ImagePositionPatient, float)
            yield _dataset(
                ContourImageSequence=[_reference(header)],
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=len(places),
                ContourData=[f"{v:.4f}" for v in places.ravel()],  # mm; at most 16 characters are allowed
            )


def outlines(mask: NDArray[np.bool_]) -> list[Array]:
    """Closed polygons around the true pixels, half-way to their neighbours, holes joined by keyholes.

    Parameters
    ----------
    mask : (X, Y) bool
        One slice.

    Returns
    -------
    list of (N, 2) float
        Corners in pixels, the last one joined to the first.

    Examples
    --------
    >>> [polygon.tolist() for polygon in outlines(np.array([[False, True, False]]))]
    [[[-0.5, 1.0], [0.0, 0.5], [0.5, 1.0], [0.0, 1.5]]]
    """
    inside = np.pad(mask, 1).astype(np.float64).T
    polygons: Any = contour_generator(z=inside, fill_type=FillType.OuterOffset).filled(0.5, 2)
    points, offsets = polygons
    joined = []
    for corners, starts in zip(points, offsets, strict=True):
        outer, *holes = (_simple(corners[a : b - 1] - 1) for a, b in pairwise(starts))
        for hole in holes:
            gaps = ((outer[:, None] - hole[None]) ** 2).sum(-1)
            i, j = np.unravel_index(int(gaps.argmin()), gaps.shape)
            outer = np.concatenate([outer[: i + 1], hole[j:], hole[: j + 1], outer[i:]])
        joined.append(outer)
    return joined


def _simple(polygon: Array) -> Array:
    """Without the corners that lie on a straight line between their neighbours."""
    before, after = polygon - np.roll(polygon, 1, axis=0), np.roll(polygon, -1, axis=0) - polygon
    bends = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-9
    return polygon[bends]


def _observation(number: int, structure: Structure) -> Dataset:
    kind = _coded(structure.kind)
    if structure.side is not None:
        kind.SegmentedPropertyTypeModifierCodeSequence = [_coded(structure.side)]
    return _dataset(
        ObservationNumber=number,
        ReferencedROINumber=number,
        RTROIIdentificationCodeSequence=[kind],
        RTROIInterpretedType="",
        ROIInterpreter="",
    )


def _coded(code: Code) -> Dataset:
    return _dataset(CodeValue=code.value, CodingSchemeDesignator=code.scheme, CodeMeaning=code.meaning)


def _whole(header: Dataset) -> Dataset:
    """Reference to a file, whatever frames it holds."""
    return _dataset(ReferencedSOPClassUID=header.SOPClassUID, ReferencedSOPInstanceUID=header.SOPInstanceUID)


def _reference(header: Dataset) -> Dataset:
    """Reference to a slice: its file, and the frame where the file holds several."""
    item = _whole(header)
    if "ReferencedFrameNumber" in header:
        item.ReferencedFrameNumber = header.ReferencedFrameNumber
    return item


def _dataset(**values: object) -> Dataset:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item
