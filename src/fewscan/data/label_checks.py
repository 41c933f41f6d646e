"""What is odd in a label map taken by itself, in what may be one, and where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data import annotation
from fewscan.data.dataset import CaseFiles, Dataset
from fewscan.data.findings import Finding
from fewscan.data.label_maps import left_out, names_itself
from fewscan.data.listing import read_listing
from fewscan.data.masks import is_masks
from fewscan.data.painting import plain_name
from fewscan.space.volume import IGNORE

FULL, TINY = 0.9, 5
SHOWN = 3  # names of files


def how_to_label(dataset: Dataset) -> str:
    """What a label map must be called to be found, with some of the names that were seen.

    Parameters
    ----------
    dataset : Dataset
        Without a label.
    """
    images = [image.name for case in dataset.cases for image in case.images]
    seen = [*images[:SHOWN], *(["..."] if len(images) > SHOWN else [])]
    return (
        "a label map is called NAME_seg.nii.gz beside its scan NAME.nii.gz, or like the scan, in labels/ where scans "
        f"are in images/; seen were {', '.join(seen) or 'no scans'}"
    )


def mask_among_channels(case: CaseFiles, path: Path, *, data: NDArray[Any]) -> Iterator[Finding]:
    """What may be a mask though it is taken for a channel.

    Parameters
    ----------
    case : CaseFiles
        Of several files.
    path : Path
        One of these.
    data : number
        What it holds.
    """
    if len(case.images) > 1 and data.min() == 0 and data.max() == 1 and bool(((data == 0) | (data == 1)).all()):
        message = f"{path.name} is taken for a channel of the scan, and holds nothing but 0 and 1, as a mask does"
        remedy = f"if it is one, put it into {path.parent.name}/segmentations/, under the name of its structure"
        yield Finding("mask-as-channel", "warning", case.id, str(path), message, remedy)


def not_listed(case: CaseFiles, path: Path, *, dataset: Dataset) -> Iterator[Finding]:
    """Segments that are drawn and not listed, where others of the file are.

    Parameters
    ----------
    case : CaseFiles
        With a label.
    path : Path
        That label.
    dataset : Dataset
        Where it belongs.
    """
    if lost := left_out(path, dataset.names, ignore=dataset.ignore):
        message = f"{', '.join(lost.values())}: not in the list, so taken for background"
        remedy = "add them to labels.json, or give them the names that are listed, if they are to be learnt"
        yield Finding("segment-not-listed", "warning", case.id, str(path), message, remedy)


def without_structure(dataset: Dataset) -> Iterator[Finding]:
    """Whether some structures are listed that no label file has, where files name them: these are not learnt.

    Parameters
    ----------
    dataset : Dataset
        Any; bundles have a finding of their own.
    """
    files = [case.label for case in dataset.labelled if case.label is not None and names_itself(case.label)]
    if not files or dataset.overlapping:
        return
    known = {plain_name(name) for name in dataset.names.values()}
    lost = [name for name in read_listing(dataset.root)["names"].values() if plain_name(name) not in known]
    if lost:
        message = f"{', '.join(lost)}: listed in labels.json or dataset.json, but in no case; not learnt"
        what = "masks in segmentations/" if is_masks(files[0]) else "structures"
        remedy = f"name the {what} as they are listed, or take what is not there off the list"
        yield Finding("label-without-file", "warning", "", str(dataset.root), message, remedy)


def unmatched(path: Path, *, dataset: Dataset) -> Finding:
    """What is said of a label file that is of no case.

    Parameters
    ----------
    path : Path
        One of ``dataset.unmatched``.
    dataset : Dataset
        Where it lies.
    """
    mine = [case for case in dataset.unlabelled if path.is_dir() and case.images[0].parent == path.parent]
    if mine:
        message = f"{path.name}/ holds no mask of a structure that is listed, so the case is taken as unlabelled"
        remedy = "name the masks as the structures are listed, or take the folder away"
        return Finding("label-unmatched", "warning", mine[0].id, str(path), message, remedy)
    remedy = "rename it like one, or take it away"
    return Finding("label-unmatched", "warning", "", str(path), f"label map {path.name} belongs to no image", remedy)


def content(label: NDArray[np.uint16], case: CaseFiles, *, dataset: Dataset) -> Iterator[Finding]:
    """What is odd in a label map taken by itself.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        Label map of the case.
    case : CaseFiles
        With a label.
    dataset : Dataset
        Where it belongs.
    """
    path, drawn = str(case.label), (label > 0) & (label < IGNORE)
    count = int(drawn.sum())
    unknown = sorted(set(np.unique(label).tolist()) - {0, IGNORE, *dataset.names})
    if unknown:
        message = f"holds labels {unknown[:8]} that are not in the list"
        remedy = "add them to labels.json, or let --fix write a list that names them after their numbers"
        yield Finding("label-not-listed", "error", case.id, path, message, remedy, True)
    if count == 0:
        remedy = "if the structure is truly absent keep it, else draw it or take the label map away"
        yield Finding("label-empty", "warning", case.id, path, "nothing is labelled", remedy)
    elif count < TINY:
        yield Finding("label-tiny", "warning", case.id, path, f"{count} voxels are labelled", "look at it in a viewer")
    elif count > FULL * label.size:
        message = f"{100 * count / label.size:.0f} % of all voxels are labelled"
        yield Finding("label-full", "warning", case.id, path, message, "check that background is 0")
    blank = annotation.blank_slices(label)
    if blank is not None:
        axis, slices = blank
        way = ("left to right", "back to front", "bottom to top")[axis]
        message = f"drawn in {int((~slices).sum())} of {slices.size} slices from {way}"
        remedy = "training does not look at the other slices; if they are truly empty, set an ignore value instead"
        yield Finding("blank-slices", "note", case.id, path, message, remedy)
    elif count and any(_single(drawn, axis) for axis in range(3)):
        remedy = "if only this slice was drawn, draw one more so that the others are taken as not looked at"
        yield Finding("one-slice", "warning", case.id, path, "only one slice is labelled", remedy)


def _single(drawn: NDArray[np.bool_], axis: int) -> bool:
    """Whether the label is one slice thick in a grid of many."""
    others = tuple(a for a in range(3) if a != axis)
    return drawn.shape[axis] >= 8 and int(drawn.any(axis=others).sum()) == 1
