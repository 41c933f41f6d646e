"""Where the scan of a result lies, and what it shows on the grid of that result; where it is gone, that is said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data import io, places
from fewscan.data.dicom import on_disk
from fewscan.data.kinds import kind_of_file
from fewscan.deliver.markup import without_folders
from fewscan.errors import FewscanError
from fewscan.space.directions import raw_sizes
from fewscan.space.geometry import Geometry, check_same, to_ras

LOST = "The scan does not lie where it lay; --images FOLDER tells where it is."


def first_channel(path: Path) -> tuple[NDArray[Any], Geometry]:
    """(X, Y, Z) of a scan in RAS+ order and its grid: of several channels the first, of directions their size.

    Of peaks that is the length of the longest, of a tensor the trace.

    Parameters
    ----------
    path : Path
        File or DICOM folder.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    data, native = io.read_raw(path)
    kind = kind_of_file(path, channels=len(data))
    return to_ras(data[0] if kind == "scalar" else raw_sizes(np.nan_to_num(data), kind).max(0), native)


def lies_at(path: Path, directory: Path, *more: Path) -> Path:
    """The file as `read_evaluation` found it, or where it lies when the run's folder was moved.

    A bare name says nothing of the folder, and another file may be called so.

    Parameters
    ----------
    path : Path
        As found.
    directory : Path
        The run.
    *more : Path
        Where else it may be.
    """
    possible = (*((path, directory / path) if path.name != str(path) else ()), *more)
    return next((place for place in possible if on_disk(place).exists()), path)


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
        data, geometry = first_channel(path)
        check_same(geometry, like, what=what)
    except FewscanError as error:
        return None, without_folders(str(error))
    return data, ""
