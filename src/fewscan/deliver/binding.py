"""What a DICOM result is bound to, the slices of its series, and who drew it."""

from __future__ import annotations

from dataclasses import dataclass

import pydicom
from pydicom import Dataset

from fewscan.data.dicom import Series, quiet
from fewscan.errors import DataError

USE = "research use only"
BOUND_BY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
TYPE_2 = (  # the standard wants the attribute, and accepts that nobody knows its value
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Binding:
    """Source and author of a DICOM result.

    Parameters
    ----------
    series : Series
        The grid.
    headers : tuple of Dataset
        One per slice, in the order of the grid's last axis, without pixels. They hold the patient's name and go nowhere
        but into DICOM files of the same study.
    version : str
        Of fewscan, and the beginning of the hash of the model's weights where they are known.
    manual : bool
        Whether a person drew the labels.
    """

    series: Series
    headers: tuple[Dataset, ...]
    version: str
    manual: bool

    @property
    def algorithm(self) -> str:
        """Who drew the labels, and what they are good for."""
        return f"drawn by hand; {USE}" if self.manual else f"fewscan {self.version}; {USE}"

    @property
    def description(self) -> str:
        """Of the new series."""
        return f"fewscan labels, {USE}"

    @property
    def series_number(self) -> int:
        """Of the new series: above a thousand, where scanners do not count."""
        return 1000 + int(self.headers[0].get("SeriesNumber") or 0) % 1000


def bind(series: Series, *, version: str, manual: bool) -> Binding:
    """Read the headers of a series.

    Parameters
    ----------
    series : Series
        From `fewscan.data.dicom.describe_series`.
    version : str
        Of fewscan and the model.
    manual : bool
        Whether a person drew the labels.

    Raises
    ------
    DataError
        If a slice lacks what a result has to refer to.
    """
    headers = []
    for file in series.files:
        with quiet():
            header = pydicom.dcmread(file, stop_before_pixels=True)
        for name in BOUND_BY:
            if not header.get(name):
                raise DataError(
                    f"{series.folder}: a slice has no {name}, so nothing can be bound to it; export the series again"
                )
        for name in TYPE_2:
            if name not in header:
                setattr(header, name, "")
        headers.append(header)
    return Binding(series=series, headers=tuple(headers), version=version, manual=manual)
