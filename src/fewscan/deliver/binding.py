"""What a DICOM result is bound to, the slices of its series, and who drew it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom import Dataset

from fewscan.data.dicom import Series
from fewscan.data.dicom_slices import flattened, quiet
from fewscan.errors import DataError
from fewscan.learn.checkpoint import USE

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
        One per slice, in the order of the grid's last axis, without pixels; that of a frame of a multi-frame image says
        ``ReferencedFrameNumber``. They hold the patient's name and go nowhere but into DICOM files of the same study.
    source : Dataset, optional
        The whole header of a multi-frame image; None where each slice is a file.
    version : str
        Of fewscan, and the beginning of the hash of the model's weights where they are known.
    manual : bool
        Whether a person drew the labels.
    """

    series: Series
    headers: tuple[Dataset, ...]
    source: Dataset | None
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
    read: dict[Path, list[Dataset]] = {}
    source = None
    for file in dict.fromkeys(series.files):
        with quiet():
            item = pydicom.dcmread(file, stop_before_pixels=True)
            _complete(item, series)
            read[file] = flattened(item, series.folder)
        source = item if any(series.frames) else None
    if source is not None and len(read) > 1:
        raise DataError(
            f"{series.folder}: the series is spread over {len(read)} multi-frame files, and a result can refer to one "
            "only; export it as single slices"
        )
    headers = tuple(read[file][max(0, frame - 1)] for file, frame in zip(series.files, series.frames, strict=True))
    return Binding(series=series, headers=headers, source=source, version=version, manual=manual)


def _complete(header: Dataset, series: Series) -> None:
    """Refuse a header that nothing can be bound to; fill in what the standard wants and nobody knows."""
    for name in BOUND_BY:
        if not header.get(name):
            raise DataError(
                f"{series.folder}: a slice has no {name}, so nothing can be bound to it; export the series again"
            )
    for name in TYPE_2:
        if name not in header:
            setattr(header, name, "")
