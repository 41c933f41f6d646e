"""Where the scan of a result lies, and what it shows on the grid of that result; where it is gone, that is said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fewscan.data import places
from fewscan.data.dicom import on_disk
from fewscan.deliver import sections
from fewscan.deliver.markup import without_folders
from fewscan.errors import FewscanError
from fewscan.space.geometry import Geometry, check_same

LOST = "The scan does not lie where it lay; --images FOLDER tells where it is."


def place(name: str, kept: Path | None, *, named: Mapping[str, Path]) -> Path | None:
    """Where a scan lies: where it lay when its record was written, else where the caller says.

    Parameters
    ----------
    name : str
        Of the case.
    kept : Path, optional
        Where it lay.
    named : mapping of str to Path
        Scans by name, as the caller says.
    """
    return kept if kept is not None and on_disk(kept).exists() else named.get(name)


def recalled(record: Path, name: str, *, named: Mapping[str, Path]) -> Path | None:
    """Where the scan of a case lies, by what was kept beside a record.

    Parameters
    ----------
    record : Path
        Such as ``predictions.json``.
    name : str
        Of the case.
    named : mapping of str to Path
        Scans by name, as the caller says.
    """
    return place(name, places.recall(record).get(name, {}).get("image"), named=named)


def on_grid(path: Path | None, like: Geometry, *, what: str) -> tuple[NDArray[Any] | None, str]:
    """(X, Y, Z) of a scan, or None and why.

    Parameters
    ----------
    path : Path, optional
        From `place` or `recalled`.
    like : Geometry
        Grid that it should lie on, RAS+.
    what : str
        Of whom, for the reason.
    """
    if path is None or not on_disk(path).exists():
        return None, LOST
    try:
        data, geometry = sections.first_channel(path)
        check_same(geometry, like, what=what)
    except FewscanError as error:
        return None, without_folders(str(error))
    return data, ""
