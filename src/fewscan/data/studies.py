"""Series of an exported study that are no volume: localisers, captured screens, single views.

A scanner leaves them beside the scans, and nobody wants them segmented. They are left out of what a folder holds, and
named; a folder that is given by itself is read, or refused, like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom

from fewscan.data.dicom import chosen, image_files
from fewscan.data.dicom_slices import GROUPS, flattened, quiet
from fewscan.errors import DataError

FEWEST = 3  # slices of a volume
FEW = 64  # files: of a series of more, which views and localisers rarely are, three are looked at
TAGS = (
    "ImageType",
    "SamplesPerPixel",
    "NumberOfFrames",
    "SeriesInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    *GROUPS,
)


def set_aside(series: Sequence[Path]) -> dict[Path, str]:
    """Series that are no volume, and why not; none where no other one is.

    Parameters
    ----------
    series : sequence of Path
        Folders that were found together.
    """
    if len(series) < 2:
        return {}
    found = {folder: why for folder in series if (why := flaw(folder))}
    return found if len(found) < len(series) else {}


def flaw(folder: Path) -> str:
    """Why a series is no volume, as the end of a sentence about it; empty where it may be one, or cannot be read.

    Parameters
    ----------
    folder : Path
        For which `fewscan.data.dicom.is_series` holds.
    """
    try:
        files = image_files(chosen(folder)[0])
        few = len(files) <= FEW
        views = _views(files if few else [files[0], files[len(files) // 2], files[-1]], folder)
    except Exception:  # pydicom raises whatever it meets in a damaged file, which is told where it is read
        return ""
    if not views or len({view.get("SeriesInstanceUID") for view in views}) > 1:
        return ""
    if all("LOCALIZER" in (view.get("ImageType") or ()) for view in views):
        return "is a localiser"
    if not any(view.get("ImagePositionPatient") and view.get("ImageOrientationPatient") for view in views):
        return "holds images that do not say where they lie, such as captured screens"
    if not few:  # whose direction has to be wrong all along, which is told where it is read
        return ""
    if len(views) < FEWEST:
        return f"holds {len(views)} slice{'s' if len(views) > 1 else ''}, too few for a volume"
    ways = [np.array(view.get("ImageOrientationPatient") or [0] * 6, float) for view in views]
    return "holds slices of several directions, as localisers do" if np.ptp(ways, axis=0).max() > 0.1 else ""


def _views(files: Sequence[Path], folder: Path) -> list[pydicom.Dataset]:
    """Headers of the slices in some files, those of frames as if each were a slice of its own."""
    found: list[pydicom.Dataset] = []
    for file in files:
        with quiet():
            item = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
            try:
                found += flattened(item, folder)
            except DataError:  # in colour, or frames without a place
                found.append(item)
    return found
