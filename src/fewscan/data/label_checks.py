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
