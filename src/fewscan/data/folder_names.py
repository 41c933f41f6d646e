"""What people call the folders of scans and of label maps that lie side by side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fewscan.data.found import (
    LABEL_STEMS,
    LABEL_TAIL,
    called_label,
    entries,
    files_in,
    held_out,
    partner,
    stem_of,
    subfolders,
)

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "scans")
"""Names, in lower case, that mean scans even where no folder of label maps lies beside."""
WITH_LABELS = ("scan", "volumes", "volume", "vol", "ct", "cts", "mr", "mri", "mrs", "raw", "data")
"""Names that mean scans beside a folder of label maps; elsewhere they may be those of anything."""
LABEL_FOLDERS = (
    "labels",
    "label",
    "masks",
    "mask",
    "segmentations",
    "segmentation",
    "segs",
    "seg",
    "annotations",
    "annotation",
    "labelmaps",
    "gt",
    "groundtruth",
    "ground_truth",
)
CONTRAST = re.compile(
    r"(?i)(image|img|scan|vol(ume)?|anat|bold|ct\w*|mri?\w*|t[12]\w*|flair|pdw?|adc|dwi|dti|b\d+|swi|pet|suv|phase\w*|"
    r"peaks|tensor|channel\w*|\d{1,4})"
)
"""Names of channels, which recur in the folders of cases."""


def images_and_labels(root: Path) -> tuple[Path | None, Path | None]:
    """The folders of scans and of label maps in a folder, by their names, whether small or capital; None without one.

    Beside a folder of label maps scans of the same names lie loose in the folder in which it is; else the only other
    one that holds files of the same names is that of the scans, or the only one of these that is called so.

    Parameters
    ----------
    root : Path
        Folder to look at.
    """
    folders = [p for p in subfolders(root) if not held_out(p)]
    images, labels = _called(folders, IMAGE_FOLDERS), _called(folders, LABEL_FOLDERS)
    if images is not None or labels is None:
        return images, labels
    own = files_in(root)
    if _matched(own, {_bare(file) for file in entries(labels)}):  # else predictions below would pass for the scans
        return (None if any(map(called_label, own)) else root), labels
    alike = _alike(folders, labels)
    likely = [p for p in alike if p.name.lower() in WITH_LABELS]
    return next((found[0] for found in (alike, likely) if len(found) == 1), None), labels


def left_over(root: Path, images: Path, *, labels: Path | None) -> tuple[Path, ...]:
    """Folders of files of the same names as the label maps, where others were taken for the scans.

    Parameters
    ----------
    root, images : Path
        A folder, and what `images_and_labels` found there.
    labels : Path, optional
        The same; None without label maps.
    """
    if labels is None or images.name.lower() in IMAGE_FOLDERS:  # where all was said by name
        return ()
    folders = [p for p in subfolders(root) if not held_out(p)]
    return tuple(p for p in _alike(folders, labels) if p != images)


def _alike(folders: Iterable[Path], labels: Path) -> list[Path]:
    """Folders of files that are called like label maps, other than those of these."""
    drawn = {_bare(file) for file in entries(labels)}
    return [p for p in folders if p != labels and _matched(entries(p), drawn)]


def doubt(folders: Mapping[Path, Sequence[Path]]) -> str:
    """What is wrong where folders hold files of the same names and may be those of scans and of label maps.

    Names that recur may be channels as well, in a folder for each case; nothing is said where one is called so, or
    there are more folders than names.

    Parameters
    ----------
    folders : mapping of Path to sequence of Path
        Folders and their files, none of which is called like a label map.
    """
    stems = {folder: {_bare(file) for file in files} for folder, files in folders.items()}
    count = Counter(name for held in stems.values() for name in held)
    alike = [folder for folder, held in stems.items() if 2 * sum(count[name] > 1 for name in held) >= len(held)]
    names = sorted(name for name, n in count.items() if n > 1)
    if len(alike) < 2 or not names:
        return ""
    called = any(folder.name.lower() in (*LABEL_FOLDERS, *IMAGE_FOLDERS, *WITH_LABELS) for folder in alike)
    if not called and (any(map(CONTRAST.fullmatch, names)) or 2 < len(alike) > len(names)):
        return ""
    told = " and ".join(f"{folder.name}/" for folder in alike[:3]) + (" and others" if len(alike) > 3 else "")
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{alike[0].parent}: {told} hold files of the same names ({shown}), and nothing says which are scans and "
        f"which are label maps; call the folders images/ and labels/ ({', '.join(IMAGE_FOLDERS)} are understood, and "
        f"{', '.join(WITH_LABELS)} beside label maps, which may be in {', '.join(LABEL_FOLDERS)}); several channels of "
        "a scan go into one folder, as NAME_0000 and NAME_0001"
    )


def _called(folders: Iterable[Path], names: Sequence[str]) -> Path | None:
    """The folder with the first of some names."""
    there = {p.name.lower(): p for p in reversed(list(folders))}
    return next((there[name] for name in names if name in there), None)


def _matched(files: Sequence[Path], drawn: set[str]) -> bool:
    """Whether label maps belong to some files, none of which is called like a label map in the folder of a case."""
    stems = {_bare(file): file for file in files}
    if any(name.lower() in LABEL_STEMS for name in stems):
        return False
    return any(name in stems or partner(name, stems) for name in drawn)


def _bare(file: Path) -> str:
    """Name of a file's case."""
    return LABEL_TAIL.sub("", stem_of(file)).removesuffix("_0000")
