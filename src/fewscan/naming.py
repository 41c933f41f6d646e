"""What the labels of a label map are called, and what is recorded of its making."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewscan.data.bundles import ENDINGS, SEGMENTATIONS
from fewscan.data.found import stem_of
from fewscan.data.listing import read_listing, read_names
from fewscan.errors import DataError
from fewscan.learn.checkpoint import load_model

PREDICTIONS = "predictions.json"
"""Record that `predict` leaves beside its label maps."""
BEFORE = "before"
"""Folder in that of the record: the model's own answers, where personalised ones took their places."""


def label_names(thing: Path, given: Path | None = None) -> tuple[Mapping[int, str] | None, int | None]:
    """Names of the labels, and the value that means "not looked at"; None where nobody lists any.

    Parameters
    ----------
    thing : Path
        Label map, or a folder of some.
    given : Path, optional
        ``labels.json``, ``dataset.json`` or the folder of a model; without it the names that `predict` recorded, or
        those listed in the label map's folder or up to two above it. A mask in a folder of bundles is called by its
        file: the numbers of such listings are those of bundles, not of its voxels.

    Raises
    ------
    FewscanError
        If a listing is wrong, what is given names no labels, or the label maps of a folder contradict each other.
    """
    bundle = {1: stem_of(thing)} if thing.absolute().parent.name in (SEGMENTATIONS, ENDINGS) else None
    if given is not None:
        if (given / "model.json").is_file():
            model = load_model(given)
            return (bundle if bundle and model.plan.overlapping else model.names), None
        own, ignore = ({}, None) if given.is_dir() else read_names(given)
        if not own:
            raise DataError(f"{given}: names no labels; give a labels.json, a dataset.json or the folder of a model")
        return own, ignore
    if bundle:
        return bundle, None
    called = _called(thing)
    for value, several in called.items():
        if len(several) > 1:
            raise DataError(
                f"{thing}: label {value} is {' in one label map and '.join(sorted(several)[:2])} in another, as models "
                "with other labels wrote them; give the label maps one by one, or say what the labels are called"
            )
    if called:
        return {value: min(names) for value, names in called.items()}, None
    folder = (thing if thing.is_dir() else thing.parent).absolute()
    for where in (folder, *folder.parents[:2]):
        listed = read_listing(where)
        if listed["names"] or listed["ignore"] is not None:
            return listed["names"] or None, listed["ignore"]
    return None, None


def recorded_names(predictions: Path) -> dict[int, str]:
    """Names that `predict` recorded; none where it did not write these label maps.

    Parameters
    ----------
    predictions : Path
        One label map, or a folder of some: of these the names in which all agree, for models may differ in theirs.
    """
    return {value: min(names) for value, names in _called(predictions).items() if len(names) == 1}


def _called(predictions: Path) -> dict[int, set[str]]:
    """Every name that `predict` recorded for each label of a label map, or of those in a folder."""
    if not predictions.is_dir():
        return {value: {name} for value, name in _labels(record_of(predictions)).items()}
    rows = _rows(predictions.absolute())
    called: dict[int, set[str]] = {}
    for file in sorted(predictions.glob("*.nii*")):
        for value, name in _labels(rows.get(file.name, {})).items():
            called.setdefault(value, set()).add(name)
    return dict(sorted(called.items()))


def record_of(thing: Path) -> dict[str, Any]:
    """What `predict` wrote of a label map of its own, its model and labels among it; empty for any other file.

    Parameters
    ----------
    thing : Path
        Label map.
    """
    return _rows(thing.absolute().parent).get(thing.name, {})


def told_rows(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of a record by their paths, each with the model and the labels that it is of.

    Older records tell of one model and its labels for all rows.

    Parameters
    ----------
    record : mapping
        Content of `PREDICTIONS`.

    Raises
    ------
    KeyError, TypeError, ValueError
        If it is damaged.
    """
    shared = {key: record[key] for key in ("model", "labels") if key in record}
    return {str(row["path"]): shared | dict(row) for row in record["predictions"]}


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of what lies in a folder by file name, also of the models' own answers; none where no record is sound."""
    before = folder.name == BEFORE and not (folder / PREDICTIONS).is_file()
    try:
        record = json.loads(((folder.parent if before else folder) / PREDICTIONS).read_text(encoding="utf-8"))
        rows = told_rows(record)
        if before:
            return {Path(row[BEFORE]["path"]).name: row for row in rows.values() if BEFORE in row}
        return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _labels(row: Mapping[str, Any]) -> dict[int, str]:
    """Labels that a row names; none where it is damaged."""
    try:
        return {int(value): str(name) for value, name in row.get("labels", {}).items()}
    except (ValueError, AttributeError):
        return {}


def predictions_in(run: Path) -> Path | None:
    """Folder that holds the predictions of a run and their record; None where there is none.

    Parameters
    ----------
    run : Path
        Folder of the run, or of the predictions themselves.
    """
    return next((folder for folder in (run / "predictions", run) if (folder / PREDICTIONS).is_file()), None)
