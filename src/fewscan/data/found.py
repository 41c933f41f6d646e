"""What the layouts of `fewscan.data.layouts` have in common: cases as files, and by what a label map is told."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fewscan.data import dicom_labels
from fewscan.data.dicom import is_series
from fewscan.data.headers import suffix_of
from fewscan.errors import DataError

LABEL_STEMS = {"seg", "segmentation", "dseg", "label", "labels", "labelmap", "mask", "gt"}
LABEL_HEAD = re.compile(r"(?i)^(seg|segmentation|dseg|label|labels|labelmap|mask|gt)[-_](.+)$")
IMAGE_HEAD = re.compile(r"(?i)^(image|img|scan|volume|vol|ct|cta|mri?|case)[-_](.+)$")
LABEL_TAIL = re.compile(r"(?i)[-_.](seg|segmentation|dseg|label|labels|labelmap|mask|gt)$")
HELD_OUT = ("test", "imagests", "labelsts")
"""Folders whose scans are never trained on, in lower case."""


@dataclass(frozen=True)
class Pair:
    """Files of one case.

    Parameters
    ----------
    images : tuple of Path
        One per channel; a DICOM series is its folder.
    label : Path, optional
        Label map, or a folder of masks that overlap.
    """

    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class Found:
    """What a layout function saw.

    Parameters
    ----------
    layout : str
        Name of the layout.
    pairs, test : mapping of str to Pair
        Case id to files: for training, and set apart for testing.
    names : mapping of int to str
        Listed labels; empty when none are listed.
    channels : tuple of str
        Listed channels; empty when none are listed.
    hint : str
        Modality as far as the layout names it.
    ignore : int, optional
        Label value that means "not looked at".
    overlapping : bool
        Whether labels are masks that may overlap.
    unmatched, unused : tuple of Path
        Label files that belong to no image, and images that are of no case.
    doubts : tuple of str
        Cases of which several files may be the label map, in words.
    """

    layout: str
    pairs: Mapping[str, Pair]
    test: Mapping[str, Pair] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    channels: tuple[str, ...] = ()
    hint: str = ""
    ignore: int | None = None
    overlapping: bool = False
    unmatched: tuple[Path, ...] = ()
    unused: tuple[Path, ...] = ()
    doubts: tuple[str, ...] = ()


def stem_of(path: Path) -> str:
    """Name without image suffix, or the folder's name.

    Parameters
    ----------
    path : Path
        Image file or DICOM folder.

    Examples
    --------
    >>> stem_of(Path("images/patient.01.nii.gz"))
    'patient.01'
    """
    suffix = suffix_of(path) or (".dcm" if path.suffix.lower() == ".dcm" else "")
    return path.name[: -len(suffix)] if suffix else path.name


def entries(folder: Path) -> list[Path]:
    """Image files, DICOM folders and DICOM label files directly inside, sorted; hidden ones left out.

    Parameters
    ----------
    folder : Path
        Folder to list.
    """
    return [p for p in inside(folder) if (is_series(p) if p.is_dir() else suffix_of(p) or dicom_labels.is_label(p))]


def files_in(folder: Path) -> list[Path]:
    """As `entries`, without the DICOM folders, none of which is opened.

    Parameters
    ----------
    folder : Path
        Folder to list.
    """
    return [p for p in inside(folder) if p.is_file() and (suffix_of(p) or dicom_labels.is_label(p))]


def inside(folder: Path) -> list[Path]:
    """What lies directly in a folder, sorted, hidden names left out; nothing where it may not be listed.

    Parameters
    ----------
    folder : Path
        Folder to list.
    """
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except PermissionError:
        return []


def subfolders(folder: Path) -> list[Path]:
    """Folders of `inside` that may be read: ``lost+found`` or ``System Volume Information`` hold no case.

    Parameters
    ----------
    folder : Path
        Folder to list.
    """
    return [p for p in inside(folder) if p.is_dir() and readable(p)]


def readable(folder: Path) -> bool:
    """Whether a folder may be listed, and its files be looked at.

    Parameters
    ----------
    folder : Path
        Any that exists.
    """
    try:
        os.scandir(folder).close()
        os.stat(os.path.join(folder, os.curdir))
    except PermissionError:
        return False
    return True


def walk(folder: Path) -> Iterator[Path]:
    """A folder and those below it, as `subfolders` lists them; links are not followed, since they may lead in a circle.

    Parameters
    ----------
    folder : Path
        Where to begin.
    """
    yield folder
    for below in subfolders(folder):
        yield from [below] if below.is_symlink() else walk(below)


def below(folder: Path) -> list[Path]:
    """Files in a folder and below it, sorted.

    Parameters
    ----------
    folder : Path
        Where to begin; passed over are the folders that `walk` passes over.
    """
    return sorted(file for here in walk(folder) for file in inside(here) if file.is_file())


def called_label(file: Path) -> bool:
    """Whether a file is called like a label map: ``seg.nii.gz``, ``p1_seg.nii.gz``.

    Parameters
    ----------
    file : Path
        Any.
    """
    return label_name(stem_of(file))


def label_name(name: str) -> bool:
    """Whether a name without its suffix is that of a label map: ``seg``, ``p1_seg``.

    Parameters
    ----------
    name : str
        Of a file, or what is left of it without that of its case.
    """
    return name.lower() in LABEL_STEMS or bool(LABEL_TAIL.search(name))


def partner(name: str, scans: Iterable[str]) -> str | None:
    """The scan that a label map such as ``seg_1`` belongs to: ``1``, or the only one like ``ct_1``, ``image_1``.

    Parameters
    ----------
    name : str
        Of the label map, without suffix.
    scans : iterable of str
        Names of scans, without suffix.

    Examples
    --------
    >>> [partner("seg_1", scans) for scans in (["ct_0", "ct_1"], ["ct_1", "mr_1"], ["1"])]
    ['ct_1', None, '1']
    """
    if (called := LABEL_HEAD.match(name)) is None:
        return None
    rest, known = called[2], list(scans)
    mine = [scan for scan in known if (head := IMAGE_HEAD.match(scan)) is not None and head[2] == rest]
    return rest if rest in known else mine[0] if len(mine) == 1 else None


def held_out(folder: Path) -> bool:
    """Whether what lies in a folder is set apart for testing.

    Parameters
    ----------
    folder : Path
        Inside a data set.
    """
    return folder.name.lower() in HELD_OUT


def folder_name(folder: Path) -> str:
    """What a folder is called, also where it is given as ``.`` or ``..``.

    Parameters
    ----------
    folder : Path
        Any.
    """
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def by_stem(files: Sequence[Path]) -> dict[str, Path]:
    """Scans by name.

    Parameters
    ----------
    files : sequence of Path
        Of one folder.

    Raises
    ------
    DataError
        If two have one name and differ in their format.
    """
    return once(
        ((stem_of(file), file) for file in files),
        clash=lambda name, first, second: f"{first} and {second} are both called {name!r}; keep one of the two there",
    )


def once(named: Iterable[tuple[str, Path]], *, clash: Callable[[str, Path, Path], str]) -> dict[str, Path]:
    """Files by name, of which each is that of one.

    Parameters
    ----------
    named : iterable of (str, Path)
        Names and their files; the same file may come again.
    clash : callable
        Gets a name and its first and second file, and says what is wrong.

    Raises
    ------
    DataError
        If two files have one name.
    """
    found: dict[str, Path] = {}
    for name, file in named:
        if (first := found.setdefault(name, file)) != file:
            raise DataError(clash(name, first, file))
    return found


def chosen_label(case: str, files: Sequence[Path], *, doubts: list[str]) -> Path | None:
    """The label map of a case; of several, which go into ``doubts``, the first.

    Parameters
    ----------
    case : str
        Its id.
    files : sequence of Path
        What may be its label map.
    doubts : list of str
        Gets what is wrong.
    """
    if len(files) > 1:
        doubts.append(f"{files[0]} and {files[1]} may both be the label map of {case}; keep one of the two there")
    return files[0] if files else None
