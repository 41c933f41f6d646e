"""The part of the report on what personalisation changed: volumes, Dice between both answers, outlines of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data import io
from fewscan.data.bundles import names_in
from fewscan.deliver import markup, pictures, scans, sections
from fewscan.deliver.markup import Cell, cell, signed
from fewscan.deliver.records import figure, mean, part, personalised, place_of
from fewscan.deliver.sections import Run
from fewscan.errors import FewscanError
from fewscan.naming import BEFORE, PREDICTIONS, predictions_in
from fewscan.space.combinations import mask_of
from fewscan.space.geometry import check_same
from fewscan.space.volume import Labelmap

PICTURED = 6  # scans, those that changed most
LINES = (("own", "reference", "the model's own answer"), ("personalised", "prediction", "personalised"))
"""Name of a switch, the kind of outline that it switches, and what that is."""


def changes(run: Run) -> str:
    """What personalisation changed in the scans where its answer was kept, most changed first.

    Parameters
    ----------
    run : Run
        Shown when its predictions hold answers from before.
    """
    changed = [row for row in run.predictions or () if part(row, BEFORE)]
    if not changed:
        return ""
    changed.sort(key=lambda row: _dice(row) if math.isfinite(_dice(row)) else math.inf)
    return _volumes(changed) + _outlines(changed, predictions_in(run.directory), run.scans)


def _dice(row: Mapping[str, Any]) -> float:
    """Mean over the labels that either answer holds."""
    return mean(part(part(row, BEFORE), "dice"))


def _volumes(changed: list[Mapping[str, Any]]) -> str:
    rows = []
    for row in changed:
        after, before = (part(found, "volumes_ml") for found in (row, part(row, BEFORE)))
        dice = part(part(row, BEFORE), "dice")
        for name in sorted(dice, key=lambda name: figure(dice, name)):
            ml = [figure(found, name) for found in (before, after)]
            figures = [cell(ml[0]), cell(ml[1]), signed(ml[1] - ml[0]), cell(figure(dice, name), 3)]
            rows.append([Cell(str(row.get("id", ""))), Cell(name), *figures])
    columns = ["Case", "label", "own, mL", "personalised, mL", "change, mL", "Dice between both"]
    caption = "What personalisation changed, most changed first: the model's own answer beside the one that was kept."
    return markup.table(columns, rows, caption=caption)


def _outlines(changed: list[Mapping[str, Any]], folder: Path | None, named: Mapping[str, Path]) -> str:
    if folder is None:
        return ""
    switches = "".join(
        f'<label><input type="checkbox" id="show-{name}" checked><i class="{kind}"></i>{said}</label>'
        for name, kind, said in LINES
    )
    cards = "".join(_card(row, folder, named) for row in changed[:PICTURED])
    more = len(changed) - PICTURED
    left = f" Of {len(changed)} personalised scans the {PICTURED} that changed most are drawn." if more > 0 else ""
    hint = f'<p class="hint">Each cut is the one in which most voxels changed.{left}</p>'
    return f'<div class="overlays compared"><p class="legend">{switches}</p>{cards}{hint}</div>'


def _card(row: Mapping[str, Any], folder: Path, named: Mapping[str, Path]) -> str:
    """Outlines of both answers over the scan, with the verdict."""
    name, place = str(row.get("id", "")), place_of(row)
    verdict = escape(markup.without_folders(personalised(row)))
    head = f"<header><h3>{escape(name)}</h3><p>{verdict}</p></header>"
    try:
        lost = "its file is not beside the record"
        planes, told = ([], lost) if place is None else _planes(name, place, folder, named)
    except FewscanError as error:
        planes, told = [], f"No picture: {markup.without_folders(str(error))}"
    hint = f'<p class="hint">{escape(told)}</p>' if told else ""
    return f"<article>{head}{sections.side_by_side(planes) if planes else ''}{hint}</article>"


def _planes(name: str, place: Path, folder: Path, named: Mapping[str, Path]) -> tuple[list[pictures.Plane], str]:
    """Cuts, and what is missing in them."""
    before, after = _both(name, place, folder)
    scan = scans.recalled(folder / PREDICTIONS, name, named=named)
    image, remark = scans.on_grid(scan, after.geometry, what=f"{name}, scan and prediction")
    told = f"Outlines alone. {remark}" if image is None else ""
    return pictures.three_planes(before, after, image=image, most_of=_differing(before, after)), told


def _both(name: str, place: Path, folder: Path) -> tuple[Labelmap, Labelmap]:
    """The model's own answer and the one that was kept; of bundles that overlap both hold the same, maybe empty."""
    paths = [folder / BEFORE / place, folder / place]
    masks = names_in(*paths)
    before, after = (sections.bundles(path, names=masks) if masks else io.read_labels(path) for path in paths)
    check_same(before.geometry, after.geometry, what=f"{name}, before and after")
    return before, after


def _differing(one: Labelmap, other: Labelmap) -> NDArray[np.bool_]:
    """Voxels (X, Y, Z) whose labels are not the same."""
    if one.table is None or other.table is None:
        unlike: NDArray[np.bool_] = one.data != other.data
        return unlike
    found = np.zeros(one.data.shape, np.bool_)
    for held, too in zip(one.table.T, other.table.T, strict=True):  # which list the same labels, see `_both`
        found |= mask_of(one.data, held) != mask_of(other.data, too)
    return found
