"""A mask for each structure of a case, in a folder beside its scan: TotalSegmentator's layout.

A structure without a file was not looked for in that case; an empty file says that it is not there.
"""

from __future__ import annotations

from pathlib import Path

from fewscan.data.found import LABEL_TAIL, files_in, once, stem_of, subfolders
from fewscan.data.headers import suffix_of
from fewscan.data.painting import plain_name

FOLDER = "segmentations"


def is_masks(path: Path) -> bool:
    """Whether a path is a folder of masks.

    Parameters
    ----------
    path : Path
        Any.
    """
    return path.name.lower() == FOLDER and path.is_dir()


def mask_files(folder: Path) -> dict[str, Path]:
    """Masks by structure, sorted: by their names without that of the case in front, and an ending such as ``_seg``.

    Parameters
    ----------
    folder : Path
        For which `is_masks` holds.

    Raises
    ------
    DataError
        If two are of one structure, in two formats or however its name is written.
    """
    case = folder.absolute().parent.name
    called = {file: LABEL_TAIL.sub("", stem_of(file).removeprefix(f"{case}_")) for file in _files(folder)}
    once(((plain_name(name), file) for file, name in called.items()), clash=_two_of_one)
    return {name: file for file, name in called.items()}


def masks_of(case: Path) -> list[Path]:
    """The folder of masks of a case, if it has one: its files are not called like the scans beside it.

    Parameters
    ----------
    case : Path
        Its folder.
    """
    scans = {stem_of(file) for file in files_in(case)}
    folders = [p for p in subfolders(case) if is_masks(p)]
    masks = {p: {stem_of(file) for file in _files(p)} for p in folders}
    return [p for p, names in masks.items() if names and not scans & names]


def _files(folder: Path) -> list[Path]:
    return [file for file in files_in(folder) if suffix_of(file)]


def _two_of_one(name: str, one: Path, other: Path) -> str:
    return f"{one} and {other} are both masks of {name!r}; keep one of the two there"
