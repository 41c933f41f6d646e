"""What the labels of a label map are called, and what is recorded of its making."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewscan.data.bundles import ENDINGS, SEGMENTATIONS
from fewscan.data.layouts import stem_of
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
        If a listing is wrong, or what is given names no labels.
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
    recorded = recorded_names(thing)
    if recorded:
        return recorded, None
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
        Folder of label maps, or one of them.
    """
    first = min(predictions.glob("*.nii*"), default=predictions) if predictions.is_dir() else predictions
    return {int(value): str(name) for value, name in record_of(first).get("labels", {}).items()}


def record_of(thing: Path) -> dict[str, Any]:
    """What `predict` wrote beside a label map of its own; empty for any other file.

    Parameters
    ----------
    thing : Path
        Label map.
    """
    folder, name = thing.absolute().parent, thing.name
    if folder.name == BEFORE and not (folder / PREDICTIONS).is_file():
        folder, name = folder.parent, f"{BEFORE}/{name}"
    try:
        record = json.loads((folder / PREDICTIONS).read_text(encoding="utf-8"))
        mine = [row for row in record["predictions"] if name in (row["path"], row.get(BEFORE, {}).get("path"))]
        return dict(record) if mine else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def predictions_in(run: Path) -> Path | None:
    """Folder that holds the predictions of a run and their record; None where there is none.

    Parameters
    ----------
    run : Path
        Folder of the run, or of the predictions themselves.
    """
    return next((folder for folder in (run / "predictions", run) if (folder / PREDICTIONS).is_file()), None)
