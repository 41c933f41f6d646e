"""The part of the report on predicted scans: volumes, what personalisation kept and changed, what Dice to expect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from fewscan.deliver import markup
from fewscan.deliver.before_after import changes
from fewscan.deliver.markup import Cell, cell, number
from fewscan.deliver.records import OF_BEFORE, expected_of, figure, part, personalised
from fewscan.deliver.sections import Run
from fewscan.judge.confidence import promise

EVIDENCE = {
    "agreement / worth": ("agreement", "atlases_worth"),
    "likeness / least": ("likeness", "likeness_floor"),
    "strength": ("strength",),
    "reached": ("reached",),
    "consistency / after": ("consistency", "consistency_after"),
}
"""Figures behind a verdict, and the column that shows them, those side by side that are to be compared."""


def predictions(run: Run) -> str:
    """Volumes and time of each predicted scan, what personalisation made of it, what Dice to expect, and who has none.

    Parameters
    ----------
    run : Run
        Shown when it has predictions, or scans that could not be predicted.
    """
    lost = "".join(
        f'<li class="error"><b>{escape(name)}</b> could not be predicted: {escape(why)}</li>'
        for name, why in (run.failed or {}).items()
    )
    failures = f'<ul class="findings">{lost}</ul>' if lost else ""
    if not run.predictions:
        return failures
    names = list(dict.fromkeys(n for p in run.predictions for n in p.get("volumes_ml", {})))[:12]
    shown = any(personalised(p) for p in run.predictions)
    rows = []
    for p in run.predictions:
        volumes = p.get("volumes_ml", {})
        rows.append(
            [
                Cell(str(p.get("id", ""))),
                *(cell(volumes.get(n, math.nan)) for n in names),
                cell(p.get("seconds") or math.nan, 1),
                *([Cell("yes" if kept_after(p) else "no")] if shown else []),
            ]
        )
    columns = ["Case", *(f"{n}, mL" for n in names), "seconds", *(["personalised"] if shown else [])]
    told = "".join(
        f'<li class="warning"><b>{escape(str(p.get("id", "")))}</b> {escape(str(p["warning"]))}</li>'
        for p in run.predictions
        if p.get("warning")
    )
    reasons = f'<ul class="findings">{told}</ul>' if told else ""
    told = markup.table(columns, rows, caption="Predicted volumes") + failures + reasons
    return told + verdicts(run.predictions) + changes(run) + expectations(run.predictions)


def expectations(predicted: Sequence[Mapping[str, Any]]) -> str:
    """Expected Dice of each label, worst first, and where to look; empty where nothing was learnt from folds.

    Parameters
    ----------
    predicted : sequence of mapping
        Rows of ``predictions.json``.
    """
    rows, held, warned, marked = [], list[float](), dict[str, None](), False
    for p in predicted:
        found = p.get("expected")
        if not isinstance(found, Mapping) or not isinstance(found.get("labels"), Mapping):
            continue
        slices = ", ".join(str(z) for z in found.get("slices", ())) or "-"
        case = str(p.get("id", ""))
        scan = expected_of(case, found)
        marked |= scan != case
        if found.get("warning"):
            warned[str(found["warning"])] = None
        for name, row in found["labels"].items():
            if isinstance(row, Mapping):
                between = "not found; 0 if it is there"
                if row.get("found") is not False:
                    between = f"{number(row.get('low'))} to {number(row.get('high'))}"
                    if math.isfinite(level := figure(row, "level")):
                        held.append(level)
                dice = figure(row, "dice")
                cells = [Cell(scan), Cell(str(name)), cell(dice), Cell(between), Cell(slices)]
                rows.append((dice if math.isfinite(dice) else math.inf, cells))
    if not rows:
        return ""
    ordered = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    told = "Expected Dice, worst first. Slices count upwards from the lowest axial one."
    told += f" {OF_BEFORE}" if marked else ""
    if held:
        told += f" Of patients like those of the cross-validation each range is to hold {promise(min(held))}."
    told += "".join(f" Beware: {warning}." for warning in warned)
    return markup.table(["Case", "label", "expected Dice", "range", "look first at slices"], ordered, caption=told)


def verdicts(predicted: Sequence[Mapping[str, Any]]) -> str:
    """Why each scan was personalised or not, with the figures behind it; empty where it was not asked for.

    Parameters
    ----------
    predicted : sequence of mapping
        Rows of ``predictions.json``.
    """
    asked = [p for p in predicted if part(p, "personalized")]
    if not asked:
        return ""
    found = [part(part(p, "personalized"), "evidence") for p in asked]
    known = {name: keys for name, keys in EVIDENCE.items() if any(keys[0] in row for row in found)}
    rows = [
        [Cell(str(p.get("id", ""))), Cell(personalised(p)), *(_side_by_side(row, keys) for keys in known.values())]
        for p, row in zip(asked, found, strict=True)
    ]
    caption = (
        "What spoke for and against personalisation. Agreement is the Dice of the atlases' vote and the first mask, "
        "beside what such a vote is worth; likeness, how well the deformed atlases fit the scan, beside the least that "
        "is usual among themselves; strength, how much of the change to make; consistency, the Dice of an answer with "
        "those to disturbed views of the scan, beside that of the refined copy."
    )
    columns = ["Case", "verdict", *known]
    return f'<div class="wrapped verdicts">{markup.table(columns, rows, caption=caption)}</div>'


def _side_by_side(evidence: Mapping[str, Any], keys: Sequence[str]) -> Cell:
    """One or two figures, ordered by the first; the second alone may be missing, as where nothing was refined."""
    told = [number(figure(evidence, key)) for key in keys if key == keys[0] or key in evidence]
    return replace(cell(figure(evidence, keys[0])), text=" / ".join(told))


def kept_after(prediction: Mapping[str, Any]) -> bool:
    """Whether the personalised answer was kept.

    Parameters
    ----------
    prediction : mapping
        A row of ``predictions.json``.
    """
    return part(prediction, "personalized").get("kept") == "after"
