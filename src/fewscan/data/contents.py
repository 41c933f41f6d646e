"""By what a scan is known again, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fewscan.data.dataset import CaseFiles, Dataset
from fewscan.data.dicom import describe_series, is_series, on_disk
from fewscan.data.formats import peek
from fewscan.data.found import stem_of
from fewscan.data.headers import suffix_of
from fewscan.data.io import sha256
from fewscan.errors import FewscanError

PIECES, PIECE = 16, 65536  # so many are read of a file, or slices of a series, spread over it: hundredths of a second


def content_of(thing: Path, *, whole: bool = False) -> str:
    """Digest of a sample of the bytes of a scan or label map; empty where it cannot be read.

    The folder and the names of its files have no say, nor has what else lies there; but the name of a mask has, which
    is that of its structure. Packing a file anew has a say, since bytes are compared, not voxels.

    Parameters
    ----------
    thing : Path
        Image file, DICOM series, or folder of masks.
    whole : bool
        Take every byte: a label may be corrected in one voxel.
    """
    try:
        parts = sorted(name + (sha256(file) if whole else _sample(file)) for file, name in _files(thing, whole=whole))
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:32]
    except (OSError, FewscanError):
        return ""


def contents_of(case: CaseFiles, dataset: Dataset) -> list[str]:
    """By what a case is known again: a sample of its images, every byte of its label, and how both are read.

    Parameters
    ----------
    case : CaseFiles
        With or without a label.
    dataset : Dataset
        Its data set: of the same bytes other names are other labels.
    """
    told = [content_of(image) for image in case.images]
    if case.label is not None:
        drawn = None if case.drawn is None else sorted(case.drawn)
        read = [sorted(dataset.names.items()), dataset.ignore, drawn, dataset.channels]
        told += [content_of(case.label, whole=True), hashlib.sha256(json.dumps(read).encode()).hexdigest()[:32]]
    return told


def contents_by_case(dataset: Dataset) -> dict[str, str]:
    """By what each labelled case of a data set is known again.

    Parameters
    ----------
    dataset : Dataset
        All of it; every byte of its labels is read.
    """
    return {case.id: " ".join(contents_of(case, dataset)) for case in dataset.labelled}


def same(before: str, now: str) -> bool:
    """Whether two contents, such as `contents_by_case` tells, agree in all that the earlier one says.

    Parameters
    ----------
    before, now : str
        Digests with spaces between; an older version may have kept fewer.
    """
    known = before.split()
    return bool(known) and now.split()[: len(known)] == known


def bytes_of(file: Path) -> str:
    """Digest of all bytes of a file, whatever they are; empty where it cannot be read.

    Parameters
    ----------
    file : Path
        Any.
    """
    try:
        return sha256(file)
    except OSError:
        return ""


def _files(thing: Path, *, whole: bool) -> list[tuple[Path, str]]:
    """Those that hold it, and what of their names has a say; of a file also the payload: a header may be of many."""
    place = on_disk(thing)
    if not place.is_dir():
        return [(file, "") for file in {thing, thing if suffix_of(thing) is None else peek(thing).payload}]
    if not is_series(thing):
        masks = (file for file in place.rglob("*") if file.is_file() and not file.name.startswith("."))
        return [(file, f"{stem_of(file)}:") for file in masks]
    slices = list(describe_series(thing).files)
    if not whole and len(slices) > PIECES:
        slices = [slices[(len(slices) - 1) * k // (PIECES - 1)] for k in range(PIECES)]
    return [(file, "") for file in slices]


def _sample(file: Path) -> str:
    """Digest of a file's length and of pieces spread over it, the first and the last among them."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= PIECES * PIECE:
            digest.update(stream.read())
        else:
            for k in range(PIECES):
                stream.seek((size - PIECE) * k // (PIECES - 1))
                digest.update(stream.read(PIECE))
    return digest.hexdigest()
