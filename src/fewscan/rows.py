"""Rows of the record beside predictions: how they are read, and how they compare with the files that they tell of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewscan.data import places
from fewscan.data.bundles import SEGMENTATIONS
from fewscan.data.contents import bytes_of
from fewscan.deliver.markup import without_folders
from fewscan.deliver.records import part, plain_name
from fewscan.naming import told_rows

LABELS, WRITTEN = "labels", "written"
Begun = dict[str, list[str]]
"""Of a prediction that is not finished: what is written, such as `LABELS`, and the names of what is in it."""


def stored(file: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Begun], dict[str, str]]:
    """Predictions by path, those that are not finished, and why some failed; raises where the record is not sound.

    Parameters
    ----------
    file : Path
        The record; it need not exist.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, {}, {}
    rows, begun = told_rows(found), part(found, "unfinished")
    lists = {
        name: {key: [str(v) for v in labels] for key, labels in part(begun, name).items() if isinstance(labels, list)}
        for name in begun
    }
    return rows, lists, {str(name): str(why) for name, why in part(found, "failed").items()}


def digests(target: Path, labels: Iterable[str]) -> list[str]:
    """By what a prediction is known again, of a folder each of its masks; empty for what is missing.

    Parameters
    ----------
    target : Path
        Label map, or folder of masks.
    labels : iterable of str
        The model's.
    """
    masks = [target / f"{label}.nii.gz" for label in labels if plain_name(label)]
    return [bytes_of(file) for file in (masks if target.name == SEGMENTATIONS else [target])]


def corrected(row: Mapping[str, Any], target: Path) -> bool:
    """Whether somebody has changed a prediction, or a mask of it, since it was written; older rows do not say.

    Parameters
    ----------
    row : mapping
        Of the record.
    target : Path
        Label map, or folder of masks.
    """
    then, now = row.get(WRITTEN), digests(target, part(row, LABELS).values())
    if not isinstance(then, list):
        return False
    return any(known and found and found != known for known, found in zip(then, now, strict=False))


def plain_reason(reason: str, images: Sequence[Path]) -> str:
    """Why a scan failed, without the folders that it lies in.

    Parameters
    ----------
    reason : str
        As it was raised.
    images : sequence of Path
        Of the scan.
    """
    for image in images:
        reason = reason.replace(str(image), image.name).replace(f"{image.parent}{os.sep}", "")
    return without_folders(reason)


def still_there(failed: Mapping[str, str], record: Path) -> dict[str, str]:
    """Scans that have failed, without those that were taken away since: they are no fault any more.

    Parameters
    ----------
    failed : mapping of str to str
        Why, by the ids of scans.
    record : Path
        Beside which it is kept where they lay.
    """
    known = places.recall(record) if failed else {}
    lay = {name: known.get(name, {}).get("image") for name in failed}
    return {name: why for name, why in failed.items() if (place := lay[name]) is None or place.exists()}
