"""The report's part about drafted labels: what they are worth, and which to look at first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fewscan.deliver import markup
from fewscan.deliver.markup import Cell, cell, number
from fewscan.deliver.records import dropped, failed, figure, mean, part, parts
from fewscan.deliver.sections import COLUMNS_OF_LABELS, Run, tile

NO_DRAFT = (
    "None of the labelled scans could be drafted from the others: nothing measures these drafts. Look at each one."
)
NO_FIGURE = "Nothing measures these drafts: that takes a second labelled scan, of another patient. Look at each one."


def drafts(run: Run) -> str:
    """Leave-one-out figure, the cases behind it, and how sure the vote was for each draft.

    Parameters
    ----------
    run : Run
        Shown when it has a record of drafts.
    """
    record = run.draft
    if record is None:
        return ""
    seconds = figure(record, "seconds")
    facts = {
        "labelled scans vote": {"joint": "jointly", "local": "by local likeness", "majority": "equally"}.get(
            str(record.get("fusion")), record.get("fusion")
        ),
        "time": markup.duration(seconds) if seconds >= 0 else None,
        "versions": record.get("versions"),
    }
    told = markup.facts({key: content for key, content in facts.items() if content is not None})
    return _worth(part(record, "leave_one_out")) + _cases(parts(record, "cases")) + told


def _worth(found: Mapping[str, Any]) -> str:
    dice = figure(found, "dice")
    lost = {str(case): str(why) for case, why in part(found, "failed").items()}
    if not math.isfinite(dice):
        return f'<p class="fine">{NO_DRAFT if lost else NO_FIGURE}</p>{_lost(lost)}'
    low, high = figure(found, "low"), figure(found, "high")
    between = f"{number(low)} to {number(high)}" if math.isfinite(low) else "no interval: too few scans"
    meaning = "each labelled scan drafted from the others, against its own labels"
    worth = tile("Leave-one-out Dice", number(dice), between=between, meaning=meaning)
    by_case = parts(found, "cases")
    names = list(dict.fromkeys(name for row in by_case.values() for name in row))
    shown = names if 1 < len(names) <= COLUMNS_OF_LABELS else []
    rows = []
    for case, row in sorted(by_case.items(), key=lambda item: mean(item[1])):
        rows.append([Cell(case), cell(mean(row), bar=True), *(cell(figure(row, name)) for name in shown)])
    columns = ["Labelled scan", "Dice", *(f"Dice {name}" for name in shown)]
    table = markup.table(columns, rows, caption="Each labelled scan as drafted from the others, weakest first.")
    return f'<ul class="figures">{worth}</ul>{table if rows else ""}{_lost(lost)}'


def _cases(cases: Mapping[str, Mapping[str, Any]]) -> str:
    rows, lost = [], failed(cases)
    done = {name: case for name, case in cases.items() if name not in lost}
    for name, case in sorted(done.items(), key=lambda item: figure(item[1], "sure")):
        gone = dropped(case)
        said = ", ".join(f"{atlas} ({markup.without_folders(why)})" for atlas, why in gone.items())
        atlases = len(parts(case, "atlases"))
        votes = Cell(f"{atlases - len(gone)} of {atlases}", float(atlases - len(gone)))
        sure = figure(case, "sure")
        rows.append([Cell(name), cell(sure, 0, percent=True, bar=True), votes, Cell(said or "none")])
    if not cases:
        return '<p class="hint">No scan was without labels: nothing was drafted.</p>'
    caption = "Drafted scans, least sure first: mean share of the vote that the chosen label has."
    return (
        markup.table(["Drafted scan", "sure", "atlases that voted", "dropped"], rows, caption=caption) + _lost(lost)
        if rows
        else _lost(lost)
    )


def _lost(found: Mapping[str, str]) -> str:
    if not found:
        return ""
    rows = [[Cell(case), Cell(markup.without_folders(why))] for case, why in found.items()]
    return f'<div class="wrapped">{markup.table(["Scan", "why"], rows, caption="Could not be drafted.")}</div>'
