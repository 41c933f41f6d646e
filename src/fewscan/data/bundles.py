"""Masks that overlap, one file for each bundle: TractSeg's folder layout, and such a folder as one label map.

A case is a folder that holds ``bundle_segmentations/NAME.nii.gz``, and where ends are known
``endings_segmentations/NAME_b.nii.gz`` and ``NAME_e.nii.gz``. A bundle without a file was not looked for; an empty file
says that it is not there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewscan.data.findings import Finding
from fewscan.data.headers import suffix_of
from fewscan.data.io import disk_error, peek, read_labels, write_labelmap
from fewscan.data.listing import read_listing
from fewscan.errors import DataError
from fewscan.space.combinations import combine
from fewscan.space.geometry import Geometry, check_same, ras_geometry
from fewscan.space.volume import Labelmap

SEGMENTATIONS, ENDINGS = "bundle_segmentations", "endings_segmentations"

Mask = NDArray[np.bool_]


def bundle_files(case: Path, *, folder: str = SEGMENTATIONS) -> dict[str, Path]:
    """Masks of a case by bundle name, sorted; none where there is no such folder.

    Parameters
    ----------
    case : Path
        Folder of the case, or the folder of masks itself.
    folder : str
        `SEGMENTATIONS` or `ENDINGS`.
    """
    inside = case / folder
    if not inside.is_dir() and case.name == folder:
        inside = case
    files = sorted(inside.glob("*.nii.gz")) if inside.is_dir() else []
    return {file.name[: -len(suffix_of(file) or "")]: file for file in files if not file.name.startswith(".")}


def names_in(*cases: Path) -> list[str]:
    """Bundles for which any of some cases has a file, sorted; none where there is no folder of masks.

    Parameters
    ----------
    *cases : Path
        As for `bundle_files`.
    """
    return sorted({name for case in cases for name in bundle_files(case)})


def listed(
    root: Path, folders: Mapping[str, Path], *, names: Mapping[int, str]
) -> tuple[dict[int, str], dict[str, frozenset[int]]]:
    """Bundles that occur in a data set, and those that were looked for in the cases that lack some.

    Parameters
    ----------
    root : Path
        Of the data set.
    folders : mapping of str to Path
        Case id to folder of masks.
    names : mapping of int to str
        Bundles to take; all that occur, numbered in the order of their names, where none are listed.

    Raises
    ------
    DataError
        If none of the bundles to take occurs, or two differ in small and capital letters only.
    """
    files = {case: bundle_files(folder) for case, folder in folders.items()}
    seen: dict[str, tuple[str, Path]] = {}
    for held in files.values():
        for name, file in held.items():
            other, first = seen.setdefault(name.lower(), (name, file))
            if other != name:
                raise DataError(f"{file}: differs from {first} in small and capital letters only; give both one name")
    there = sorted(name for name, _ in seen.values())
    taken = {v: n for v, n in names.items() if n in there} if names else dict(enumerate(there, start=1))
    if not taken:
        raise DataError(
            f"{root}: no bundle among {there[:5]} is called like one of the labels listed, {list(names.values())[:5]}; "
            "correct labels.json or dataset.json"
        )
    drawn = {case: frozenset(v for v, n in taken.items() if n in held) for case, held in files.items()}
    return taken, {case: values for case, values in drawn.items() if len(values) < len(taken)}


def without_file(root: Path, names: Mapping[int, str]) -> list[Finding]:
    """Whether some bundles that are listed have no file in any case: a warning, for they are not learnt.

    Parameters
    ----------
    root : Path
        Of the data set.
    names : mapping of int to str
        Bundles that occur, from `listed`.
    """
    lost = [name for name in read_listing(root)["names"].values() if name not in names.values()]
    if not lost:
        return []
    message = f"{', '.join(lost)}: listed in labels.json or dataset.json, but no case has such a file; not learnt"
    remedy = f"name the files in {SEGMENTATIONS}/ as they are listed, or take what is not there off the list"
    return [Finding("bundle-without-file", "warning", "", str(root), message, remedy)]


def read_bundle(path: Path) -> tuple[Mask, Geometry]:
    """Mask of a bundle, RAS-ordered, and its grid.

    Parameters
    ----------
    path : Path
        Label map of 0 and 1.

    Raises
    ------
    DataError
        If it holds other values.
    """
    label = read_labels(path)
    if set(label.names) - {1}:
        raise DataError(f"{path}: a bundle is 0 or 1, it holds {sorted(label.names)[:5]}; save one mask per bundle")
    return label.data > 0, label.geometry


def grid_of(folder: Path) -> Geometry:
    """Grid of the masks of a case, RAS+, from the header of the first.

    Parameters
    ----------
    folder : Path
        Of masks.

    Raises
    ------
    DataError
        If there is none, or it cannot be read.
    """
    files = bundle_files(folder)
    if not files:
        raise DataError(f"{folder}: no masks are left there; predict again, or move them back")
    return ras_geometry(peek(next(iter(files.values()))).geometry)


def read_bundles(folder: Path, *, names: Mapping[int, str], like: Geometry) -> Labelmap:
    """All masks of a case as one map of combinations; a bundle without a file has no voxel.

    Parameters
    ----------
    folder : Path
        Of masks.
    names : mapping of int to str
        Bundles to read; others are left alone.
    like : Geometry
        Grid of the image, RAS+.

    Raises
    ------
    DataError
        If a mask cannot be read, or holds other values than 0 and 1.
    GeometryError
        If a mask lies on another grid.
    """
    files = bundle_files(folder)

    def mask(name: str) -> Mask:
        if name not in files:
            return np.zeros(like.shape, np.bool_)
        found, geometry = read_bundle(files[name])
        check_same(like, geometry, what=f"the image and {files[name]}")
        return found

    codes, table = combine((mask(name) for name in names.values()), like.shape)
    return Labelmap(codes, like, dict(names), table)


def write_bundles(masks: Mapping[str, Mask], case: Path, *, native: Geometry, folder: str = SEGMENTATIONS) -> None:
    """Write masks in TractSeg's layout.

    Parameters
    ----------
    masks : mapping of str to (X, Y, Z) bool
        By bundle, on ``ras_geometry(native)``; empty ones are written too.
    case : Path
        Folder of the case.
    native : Geometry
        Grid of the files.
    folder : str
        `SEGMENTATIONS` or `ENDINGS`.

    Raises
    ------
    DataError
        If a file cannot be written.
    """
    for name, mask in masks.items():
        write_labelmap(mask.astype(np.uint8), case / folder / f"{name}.nii.gz", native=native)


def replace_bundles(masks: Mapping[str, Mask], case: Path, *, native: Geometry, own: Collection[str] = ()) -> Path:
    """Write a case's masks whole or not at all, in the place of earlier ones; these stay if that fails.

    What others put beside them stays in any case.

    Parameters
    ----------
    masks : mapping of str to (X, Y, Z) bool
        As for `write_bundles`.
    case : Path
        Folder of the case; made if need be.
    native : Geometry
        Grid of the files.
    own : collection of str
        Bundles of earlier answers, whose masks go.

    Returns
    -------
    Path
        The folder of masks.

    Raises
    ------
    DataError
        If a name is no file name, or a file cannot be written.
    ResourceError
        If the disk is full.
    """
    for name in masks:
        if Path(name).name != name or name.startswith("."):
            raise DataError(f"{case}: a bundle cannot be called {name!r}, since its file would be; rename it")
    case.mkdir(parents=True, exist_ok=True)
    target, part = case / SEGMENTATIONS, Path(tempfile.mkdtemp(prefix=".part-", dir=case))
    before = part / "before"
    try:
        write_bundles(masks, part, native=native)
        if target.is_dir():
            _carry_over(target, part / SEGMENTATIONS, without={f"{name}.nii.gz" for name in own})
        (part / SEGMENTATIONS).chmod(0o755)
        if target.exists():
            os.replace(target, before)
        os.replace(part / SEGMENTATIONS, target)
    finally:
        if before.exists() and not target.exists():
            os.replace(before, target)
        shutil.rmtree(part, ignore_errors=True)
    return target


def _carry_over(there: Path, to: Path, *, without: Collection[str]) -> None:
    """Copy what is not replaced; it is not moved, so that nothing is lost wherever this ends."""
    for path in sorted(there.iterdir()):
        if path.name in without or (to / path.name).exists():
            continue
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, to / path.name, symlinks=True)
            else:
                shutil.copy2(path, to / path.name, follow_symlinks=False)
        except OSError as error:
            raise disk_error(error, path) from error
