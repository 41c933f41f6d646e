"""The report's part about what to label next: the scans in order, why, and the learning curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from fewscan.deliver import charts, markup
from fewscan.deliver.markup import Cell, cell, number
from fewscan.deliver.records import figure, part
from fewscan.deliver.sections import Run, tile

SHOWN = 20  # of the scans; the others are folded away
BENDS = 40  # of the drawn curve


def suggestions(run: Run) -> str:
    """Learning curve, scans in the order in which to label them, and what could not be used.

    Parameters
    ----------
    run : Run
        Shown when it has suggestions.
    """
    if run.suggestions is None:
        return ""
    record = run.suggestions
    parts = [_said(record), _curve(part(record, "curve")), _ranked(record), _skipped(record)]
    return f'<div class="suggested">{"".join(parts)}</div>'


def said(record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Headline and remarks of a folder that holds nothing but suggestions.

    Parameters
    ----------
    record : mapping
        ``suggest.json``.
    """
    rows = _rows(record, "ranked")
    if not rows:
        return "What more labelled scans are expected to bring.", []
    first = rows[0]
    return f"Label {first.get('id')} next: {first.get('reason')}.", []


def _rows(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = record.get(key)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def _said(record: Mapping[str, Any]) -> str:
    lines = record.get("remarks")
    said = "".join(f"<p>{escape(markup.without_folders(str(line)))}</p>" for line in lines or ())
    return f"<div>{said}</div>" if said else ""


def _curve(curve: Mapping[str, Any]) -> str:
    measured, expected = _points(curve, "measured"), _points(curve, "expected")
    if not measured:
        return ""
    tiles = [
        tile(
            f"Dice with {labels:g} labelled scans",
            number(dice, 3),
            between=f"{number(low, 3)} to {number(high, 3)}" if math.isfinite(low) else "no interval",
            meaning="expected of a model trained like those judged",
        )
        for labels, dice, low, high in expected
    ]
    figures = f'<ul class="figures">{"".join(tiles)}</ul>' if tiles else ""
    chart = charts.growth(measured, _line(curve, [*measured, *expected]), ahead=expected,
                          labels=("labelled scans", "Dice"))  # fmt: skip
    note = (
        '<p class="hint">Filled: measured on scans that the model had not seen. Hollow: expected. Bars: 95 % intervals '
        "over the judged patients; which scans happened to be labelled is not in them. Far beyond the last measured "
        "size the curve is a guess.</p>"
    )
    rows = [[Cell(f"{x:g}", x), cell(y, 3), cell(low, 3), cell(high, 3)] for x, y, low, high in measured]
    table = markup.table(["Labelled scans", "Dice", "from", "to"], rows, caption="Measured at each size.")
    return f"{figures}<div>{chart}{note}</div><div>{table}</div>"


def _points(curve: Mapping[str, Any], key: str) -> list[tuple[float, float, float, float]]:
    found = [tuple(figure(row, name) for name in ("labels", "dice", "low", "high")) for row in _rows(curve, key)]
    return [(x, y, low, high) for x, y, low, high in found if x > 0 and math.isfinite(y)]


def _line(curve: Mapping[str, Any], points: Sequence[tuple[float, ...]]) -> list[tuple[float, float]]:
    """The fitted power law between the ends; nothing where none was fitted."""
    floor, gain, rate = (figure(curve, key) for key in ("floor", "gain", "rate"))
    if not all(math.isfinite(value) for value in (floor, gain, rate)):
        return []
    places = np.geomspace(min(row[0] for row in points), max(row[0] for row in points), BENDS).tolist()
    return [(x, min(1.0, max(0.0, 1 - floor - gain * x**-rate))) for x in places]


def _ranked(record: Mapping[str, Any]) -> str:
    rows = [
        [
            Cell(str(row.get("id")), place), Cell(str(place), place), cell(figure(row, "unsure"), bar=True),
            cell(figure(row, "unlike")), Cell(str(row.get("nearest") or markup.ABSENT)), Cell(str(row.get("reason"))),
        ]
        for place, row in enumerate(_rows(record, "ranked"), start=1)
    ]  # fmt: skip
    if not rows:
        return ""
    heads = ["Scan", "place", "unsure", "unlike", "nearest", "why"]
    caption = (
        "Scans to label next, in order. Unsure: doubt in the answer, 0 to 1. Unlike: distance to the nearest scan that "
        "is labelled or stands above, 1 as usual between labelled scans."
    )
    head = f'<div class="wrapped">{markup.table(heads, rows[:SHOWN], caption=caption)}</div>'
    if len(rows) <= SHOWN:
        return head
    rest = markup.table(heads, rows[SHOWN:], caption="The others, in order.")
    return head + markup.fold(f"{len(rows) - SHOWN} more", rest)


def _skipped(record: Mapping[str, Any]) -> str:
    skipped = part(record, "skipped")
    rows = [[Cell(str(case)), Cell(markup.without_folders(str(why)))] for case, why in skipped.items()]
    if not rows:
        return ""
    return f'<div class="wrapped">{markup.table(["Scan", "why"], rows, caption="Could not be used.")}</div>'
