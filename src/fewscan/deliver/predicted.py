"""The part of the report on predicted scans: volumes, what personalisation kept, what Dice to expect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fewscan.deliver import markup
from fewscan.deliver.markup import Cell, cell, number
from fewscan.deliver.sections import Run


def predictions(run: Run) -> str:
    """Volumes and time of each predicted scan.

    Parameters
    ----------
    run : Run
        Shown when it has predictions.
    """
    if not run.predictions:
        return ""
    names = list(dict.fromkeys(n for p in run.predictions for n in p.get("volumes_ml", {})))[:12]
    verdicts = [personalized(p) for p in run.predictions]
    shown = any(verdicts)
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
        f'<li class="note"><b>{escape(str(p.get("id", "")))}</b> {escape(verdict)}</li>'
        for p, verdict in zip(run.predictions, verdicts, strict=True)
        if verdict
    )
    told += "".join(
        f'<li class="warning"><b>{escape(str(p.get("id", "")))}</b> {escape(str(p["warning"]))}</li>'
        for p in run.predictions
        if p.get("warning")
    )
    reasons = f'<ul class="findings">{told}</ul>' if told else ""
    return markup.table(columns, rows, caption="Predicted volumes") + reasons + expectations(run.predictions)


def expectations(predicted: Sequence[Mapping[str, Any]]) -> str:
    """Expected Dice of each label, worst first, and where to look; empty where nothing was learnt from folds.

    Parameters
    ----------
    predicted : sequence of mapping
        Rows of ``predictions.json``.
    """
    rows, levels = [], list[float]()
    for p in predicted:
        found = p.get("expected")
        if not isinstance(found, Mapping) or not isinstance(found.get("labels"), Mapping):
            continue
        slices = ", ".join(str(z) for z in found.get("slices", ())) or "-"
        for name, row in found["labels"].items():
            if isinstance(row, Mapping):
                levels.append(float(row.get("level", math.nan)))
                between = f"{number(row.get('low'))} to {number(row.get('high'))}"
                if row.get("found") is False:
                    between = "not found; 0 if it is there"
                rows.append((row.get("dice", math.nan), [Cell(str(p.get("id", ""))), Cell(str(name)),
                             cell(row.get("dice", math.nan)), Cell(between), Cell(slices)]))  # fmt: skip
    if not rows:
        return ""
    ordered = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    told = (
        f"Expected Dice, worst first; each range is to hold {min(levels):.0%} or more of patients like those of the "
        "cross-validation, which is what these showed and no guarantee. Slices count upwards from the lowest axial one."
    )
    return markup.table(["Case", "label", "expected Dice", "range", "look first at slices"], ordered, caption=told)


def personalized(prediction: Mapping[str, Any]) -> str:
    """Why personalisation was kept or not, with its figures; empty where it was not asked.

    Parameters
    ----------
    prediction : mapping
        A row of ``predictions.json``.
    """
    verdict = prediction.get("personalized")
    if not isinstance(verdict, Mapping):
        return ""
    evidence = verdict.get("evidence")
    told = evidence if isinstance(evidence, Mapping) else {}
    figures = ", ".join(f"{key} {number(told.get(key))}" for key in ("agreement", "likeness", "changed") if key in told)
    kept = "personalised" if kept_after(prediction) else "not personalised"
    return f"{kept}: {verdict.get('reason', '')}" + (f" ({figures})" if figures else "")


def kept_after(prediction: Mapping[str, Any]) -> bool:
    """Whether the personalised answer was kept.

    Parameters
    ----------
    prediction : mapping
        A row of ``predictions.json``.
    """
    verdict = prediction.get("personalized")
    return isinstance(verdict, Mapping) and verdict.get("kept") == "after"
