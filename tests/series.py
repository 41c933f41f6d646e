"""Synthetic DICOM series: any grid, order of files and transfer syntax, with a patient whose traces can be searched."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from fewscan.data.headers import LPS_TO_RAS
from fewscan.space.geometry import Geometry

SHAPE = (24, 20, 9)
NAMES = {"1": "liver", "4": "kidney_left", "9": "my own thing"}
TILT = np.array([[0.96, 0.0, 0.28], [0.1, 0.93, -0.35], [-0.26, 0.37, 0.89]])
AXIAL = Geometry(SHAPE, np.array([[-0.8, 0, 0, 30], [0, -0.8, 0, 20], [0, 0, 2.5, -90], [0, 0, 0, 1]]))


def oblique() -> Geometry:
    turn, _ = np.linalg.qr(TILT)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.7, 0.9, 3.0]) * np.sign(np.diag(turn))
    affine[:3, 3] = 5, -60, 40
    return Geometry(SHAPE, affine)


def anatomy() -> np.ndarray:
    """A ball with a hole and an island in it, corners that touch, and a speck: (X, Y, Z) in RAS+ order."""
    grid = np.indices(SHAPE).astype(float)
    away = np.sqrt(
        ((grid - np.array([9, 9, 4]).reshape(3, 1, 1, 1)) ** 2 * np.array([1, 1, 3]).reshape(3, 1, 1, 1)).sum(0)
    )
    label = np.zeros(SHAPE, np.uint16)
    label[away < 7.5] = 1
    label[away < 4] = 0
    label[away < 2] = 4
    label[18:20, 3:5, 2:4] = label[20:22, 5:7, 2:4] = 4
    label[20, 15, 7] = 9
    return label


PATIENT = {
    "PatientName": "Quastenflosser^Ottokar",
    "PatientID": "PID-7741993",
    "PatientBirthDate": "19370214",
    "PatientSex": "O",
    "PatientAge": "082Y",
    "StudyDate": "20190911",
    "StudyTime": "071543",
    "StudyID": "STUDY-5502",
    "AccessionNumber": "ACC-90210",
    "ReferringPhysicianName": "Weissenborn^Adalbert",
    "InstitutionName": "Sankt Quirin Hospital",
    "StudyDescription": "Follow-up of Quastenflosser",
}
TRACES = (
    "quastenflosser",
    "ottokar",
    "7741993",
    "19370214",
    "1937-02-14",
    "20190911",
    "2019-09-11",
    "071543",
    "5502",
    "90210",
    "weissenborn",
    "quirin",
)
"""What of the patient must not be found anywhere but in DICOM files, in lower case."""


def write_series(
    folder: Path,
    data: NDArray[Any],
    native: Geometry,
    *,
    order: str = "shuffled",
    syntax: UID | None = None,
    tags: Mapping[str, Any] | None = None,
) -> Path:
    """Write (columns, rows, slices) intensities as CT slices.

    ``order`` is how file names and instance numbers follow the slices: "forward", "reversed" or "shuffled"; the reader
    must not care.
    """
    folder.mkdir(parents=True)
    matrix, first = LPS_TO_RAS @ native.affine[:3, :3], LPS_TO_RAS @ native.affine[:3, 3]
    spacing = np.array(native.spacing)
    along = (matrix[:, :2] / spacing[:2]).T
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    names = list(range(data.shape[2]))
    if order != "forward":
        names = names[::-1] if order == "reversed" else random.Random(0).sample(names, len(names))
    for index in range(data.shape[2]):
        item = _shell(np.ascontiguousarray(data[:, :, index].T.astype(np.int16)))
        for name, value in {**PATIENT, **(tags or {})}.items():
            setattr(item, name, value)
        item.StudyInstanceUID, item.SeriesInstanceUID, item.FrameOfReferenceUID = study, series, frame
        item.InstanceNumber = names[index] + 1
        item.ImagePositionPatient = [f"{v:.6f}" for v in first + matrix[:, 2] * index]
        item.ImageOrientationPatient = [f"{v:.9f}" for v in along.ravel()]
        item.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]
        item.SliceThickness = f"{spacing[2]:.6f}"
        if syntax is not None:
            item.compress(syntax)
        item.save_as(folder / f"IM{names[index]:04d}", enforce_file_format=True)
    return folder


def _shell(pixels: NDArray[np.int16]) -> FileDataset:
    """A CT slice without patient and place."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    item = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    item.SOPClassUID, item.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    item.Modality, item.ImageType, item.SeriesNumber = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], 4
    item.Manufacturer, item.PatientPosition, item.PositionReferenceIndicator = "synthetic", "HFS", ""
    item.AcquisitionNumber, item.KVP = 1, 120
    item.Rows, item.Columns = pixels.shape
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, 1
    item.RescaleSlope, item.RescaleIntercept, item.RescaleType = 1, -1024, "HU"
    stored = np.ascontiguousarray(pixels + np.int16(1024))
    item.set_pixel_data(stored, "MONOCHROME2", 16)
    item.Modality = "CT"
    return item


def as_one_file(folder: Path, target: Path, *, seed: int | None = None) -> Path:
    """The series as one legacy converted enhanced CT, made by highdicom; its frames shuffled where a seed is given."""
    from highdicom.legacy import LegacyConvertedEnhancedCTImage

    target.mkdir(parents=True)
    slices = [pydicom.dcmread(f) for f in sorted(folder.iterdir())]
    item = LegacyConvertedEnhancedCTImage(
        slices, series_instance_uid=generate_uid(), series_number=5, sop_instance_uid=generate_uid(), instance_number=1
    )
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(slices))
        groups = list(item.PerFrameFunctionalGroupsSequence)
        item.PerFrameFunctionalGroupsSequence = [groups[i] for i in order]
        pixels = np.frombuffer(item.PixelData, np.uint8).reshape(len(slices), -1)
        item.PixelData = pixels[order].tobytes()
    item.save_as(target / "all.dcm")
    return target
