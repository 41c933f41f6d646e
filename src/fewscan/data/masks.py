"""A mask for each structure of a case, in a folder beside its scan: TotalSegmentator's layout.

A structure without a file was not looked for in that case; an empty file says that it is not there.
"""

from __future__ import annotations

from pathlib import Path

from fewscan.data.found import files_in, stem_of, subfolders
from fewscan.data.headers import suffix_of

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
    """Masks by structure, sorted.

    Parameters
    ----------
    folder : Path
        For which `is_masks` holds.
    """
    return {stem_of(file): file for file in files_in(folder) if suffix_of(file)}


def masks_of(case: Path) -> list[Path]:
    """The folder of masks of a case, if it has one: its files are not called like the scans beside it.

    Parameters
    ----------
    case : Path
        Its folder.
    """
    scans = {stem_of(file) for file in files_in(case)}
    folders = [p for p in subfolders(case) if is_masks(p)]
    return [p for p in folders if mask_files(p) and not scans & mask_files(p).keys()]
