"""The shift card as one offline page, in the style of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fewscan.data.io import atomic
from fewscan.deliver import charts, markup
from fewscan.deliver.markup import Cell, cell, number
from fewscan.deliver.records import figure, part, parts
from fewscan.deliver.report import render
from fewscan.deliver.sections import tile
from fewscan.judge.lesions import TEMPLATES
from fewscan.judge.looks import AWAY_MM, ENOUGH

MEANINGS = {
    "intensity scale": "how far apart dark and bright tissue lie in the file's own numbers",
    "contrast": "where the middle grey lies between dark (0) and bright (1): gamma, another sequence",
    "fine detail": "noise and finest structure, as a share of the intensity scale; blurring lowers it",
    "voxel size": "from the header",
    "field of view": "from the header",
    "disorder of directions": "how much voxels that touch differ in direction: 0 not at all, 0.67 no order",
    "crossing fibres": "share of the tissue in which there is a second peak",
}
"""What each kind of systematic difference is."""

MEASURES = {
    "excess": "mean |log det J| near the lesion minus far from it: how much more tissue must swell or shrink",
    "displacement_mm": "mean displacement around the lesion beyond an affine map, mm",
    "turned_deg": "mean rotation around the lesion beyond an affine map, degrees: fibres turn with it",
}
"""What is measured around lesions."""

RULE_OF_THUMB = "How many cases a repair takes is a rule of thumb; fewscan transfer measures it."

UNITS = {"voxel size": ", mm", "field of view": ", mm"}
AXES = ("left-right", "back-front", "foot-head")


def write_card(record: Mapping[str, Any], out: Path) -> Path:
    """Write the page.

    Parameters
    ----------
    record : mapping
        From `fewscan.shifting.shift`.
    out : Path
        HTML file.
    """
    built = (
        ("Systematic", _systematic(record)),
        ("Features", _distances(part(record, "systematic"))),
        ("Lesions", _lesions(part(record, "lesion"))),
        ("Accuracy", _dice(part(record, "dice"))),
        ("About", _about(record)),
    )
    headline = str(record.get("advice", ""))
    page = render("shift", headline, remarks=_remarks(record), parts=[(title, body) for title, body in built if body])
    with atomic(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def _remarks(record: Mapping[str, Any]) -> list[str]:
    source, target = part(record, "source"), part(record, "target")
    found = [
        f"{figure(source, 'scans'):.0f} scans of {source.get('name')} against {figure(target, 'scans'):.0f} of "
        f"{target.get('name')}."
    ]
    if not record.get("tellable", True):
        found.append(
            f"With {figure(source, 'patients'):.0f} and {figure(target, 'patients'):.0f} patients chance explains any "
            "difference: nothing is named."
        )
    old, new = (figure(part(part(record, "dice"), side), "mean") for side in ("source", "target"))
    if math.isfinite(old) and math.isfinite(new):
        found.append(f"The model's Dice is {number(old)} on the first and {number(new)} on the second.")
    lesion = part(record, "lesion")
    near, far = figure(lesion, "dice_near"), figure(lesion, "dice_far")
    if math.isfinite(near) and math.isfinite(far):
        found.append(f"Near lesions its Dice is {number(near)}, far from them {number(far)}.")
    found += _caveats(record)
    return [*found, RULE_OF_THUMB]


def _caveats(record: Mapping[str, Any]) -> list[str]:
    """What could not be measured as it should be, and which masks told nothing."""
    lesion, found = part(record, "lesion"), []
    healthy = figure(lesion, "healthy")
    if healthy <= TEMPLATES:
        found.append(
            f"The source has {healthy:.0f} {'patient' if healthy == 1 else 'patients'}; to tell whether tissue around "
            f"lesions is deformed takes at least {TEMPLATES + 1} healthy ones: nothing was registered."
        )
    elif lesion and not lesion.get("tellable", True):
        well, ill = (f"{n} {'patient' if n == 1 else 'patients'}" for n in lesion.get("patients") or (0, 0))
        found.append(
            f"Around lesions of {ill}, beside the same places of {well} without, chance explains any deformation: "
            "none is named."
        )
    if near := _names(record, "near_lesions"):
        found.append(
            f"Less than {ENOUGH} voxels of tissue lie more than {AWAY_MM:.0f} mm away from the lesion in {near}: all "
            "tissue counts there."
        )
    if unused := _names(lesion, "unused"):
        found.append(f"Masks that are named like no case of the target were not used: {unused}.")
    if empty := _names(lesion, "empty"):
        found.append(f"Masks without a voxel on their scan, taken for no lesion: {empty}.")
    return found


def _names(record: Mapping[str, Any], key: str) -> str:
    return ", ".join(str(name) for name in record.get(key) or ())


def _systematic(record: Mapping[str, Any]) -> str:
    kinds = parts(part(record, "systematic"), "kinds")
    named = [str(name) for name in part(record, "systematic").get("named") or ()]
    rows, lines = [], []
    for kind, found in kinds.items():
        value, low, high = (figure(found, key) for key in ("value", "low", "high"))
        chance = f"{low:+.1f} to {high:+.1f}"
        verdict = Cell("differs" if kind in named else "as by chance")
        rows.append([Cell(kind), Cell(f"{value:+.1f}", value), Cell(chance), cell(figure(found, "p"), 3), verdict])
        lines.append(charts.Row(name=kind, values=[], mean=value, low=low, high=high, text=f"{value:+.1f}"))
    if not rows:
        return ""
    ends = [v for line in lines for v in (line.mean, line.low, line.high)]
    chart = charts.dots(lines, charts.axis_for([*ends, 0.0]))
    hint = (
        '<p class="hint">Ring: target minus source, in standard deviations within a population. Bar: the middle 95 % '
        "of what comes when patients are dealt to the two at random.</p>"
    )
    caption = "Measured in tissue away from lesions, where enough is left. p is corrected for the number of kinds."
    table = markup.table(["Kind", "difference", "by chance", "p", "verdict"], rows, caption=caption)
    panels = "".join(_panel(record, kind) for kind in (named or list(kinds)[:2]))
    return f'{chart}{hint}<div class="panels">{panels}</div>{table}'


def _panel(record: Mapping[str, Any], kind: str) -> str:
    """Each scan's number, source above target; of several columns the one that differs most."""
    sides = {side: parts(part(record, "scans"), side) for side in ("source", "target")}
    table = {side: [(case, _column(row, kind)) for case, row in rows.items()] for side, rows in sides.items()}
    width = min((len(values) for rows in table.values() for _, values in rows), default=0)
    if not width:
        return ""
    means = [
        [sum(v[c] for _, v in rows) / max(len(rows), 1) for rows in table.values()] for c in range(width)
    ]  # fmt: skip
    column = max(range(width), key=lambda c: abs(means[c][1] - means[c][0]))
    log = kind != "contrast"
    lines = []
    for side, rows in table.items():
        values = [(case, math.exp(v[column]) if log else v[column]) for case, v in rows]
        mean = sum(v for _, v in values) / max(len(values), 1)
        lines.append(charts.Row(name=side, values=values, mean=mean, low=math.nan, high=math.nan, text=f"{mean:.3g}"))
    axis = charts.axis_for([v for line in lines for _, v in line.values])
    where = f" ({AXES[column]})" if kind in UNITS else ""
    title = escape(f"{kind}{where}{UNITS.get(kind, '')}")
    return f"<div><h3>{title} <small>{escape(MEANINGS.get(kind, ''))}</small></h3>{charts.dots(lines, axis)}</div>"


def _column(row: Mapping[str, Any], kind: str) -> list[float]:
    values = row.get(kind)
    return [float(v) for v in values] if isinstance(values, list) else []


def _distances(found: Mapping[str, Any]) -> str:
    rows = [
        [
            Cell(name),
            Cell(f"{figure(row, 'value'):.3g}"),
            Cell(f"up to {figure(row, 'high'):.3g}"),
            cell(figure(row, "p"), 3),
        ]
        for name, row in parts(found, "distances").items()
    ]
    caption = (
        "Distances of the populations as the model sees them: normalised intensities, and features of its encoder. "
        "p is corrected for their number."
    )
    return markup.table(["Distance", "measured", "by chance", "p"], rows, caption=caption) if rows else ""


def _lesions(lesion: Mapping[str, Any]) -> str:
    if not lesion:
        return ""
    measured = []
    for name, row in parts(lesion, "measures").items():
        value, low, high = (figure(row, key) for key in ("value", "low", "high"))
        chance = f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) else markup.ABSENT
        measured.append([Cell(MEASURES.get(name, name)), cell(value, 3), Cell(chance), cell(figure(row, "p"), 3)])
    caption = "Around lesions minus around the same places of healthy scans; both against healthy templates."
    first = markup.table(["Measure", "difference", "by chance", "p"], measured, caption=caption)
    rows = []
    for case, row in parts(lesion, "cases").items():
        distances = _finite(part(row, "distance_mm"))
        nearest = min(distances, key=lambda name: distances[name]) if distances else ""
        told = f"{nearest}, {distances[nearest]:.0f} mm" if nearest else markup.ABSENT
        numbers = [cell(figure(row, key), 3) for key in ("volume change", "volume change, far")]
        numbers.append(cell(figure(row, "turned_deg"), 1))
        numbers.append(cell(max(_finite(part(row, "pushed_mm")).values(), default=math.nan), 1))
        numbers += [cell(figure(row, key), 2, bar=True) for key in ("dice_near", "dice_far")]
        rows.append([Cell(case), *numbers, Cell(told), Cell("; ".join(map(str, row.get("why") or ())))])
    columns = ["Case", "|log det J| near", "far", "turned, degrees", "pushed, mm", "Dice near", "Dice far",
               "nearest structure", "look at it, because"]  # fmt: skip
    near, registered = figure(lesion, "near_mm"), figure(lesion, "registered")
    caption = (
        f"Each case with a lesion; healthy scans were registered onto {registered:.0f} of {len(rows)}, only these have "
        f"|log det J| and an angle. Near: within {near:.0f} mm of the lesion. Pushed: the structure that is moved "
        "furthest, if all of the lesion's volume pushed tissue away; what grows into tissue instead pushes less."
    )
    second = markup.table(columns, rows, caption=caption)
    return f'<div class="wrapped">{first}{second}</div>'


def _finite(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(v) for name, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


def _dice(found: Mapping[str, Any]) -> str:
    tiles = []
    for side in ("source", "target"):
        row = part(found, side)
        mean, count = figure(row, "mean"), len(part(row, "cases"))
        if math.isfinite(mean):
            seen = "scans named as those it was trained on" if row.get("trained") else f"{count} labelled scans"
            if left := int(figure(row, "left_out")) if math.isfinite(figure(row, "left_out")) else 0:
                seen += f", without {left} named as it was trained on"
            tiles.append(tile(f"Dice, {side}", number(mean), between=seen, meaning="of the labels that both know"))
    return f'<ul class="figures">{"".join(tiles)}</ul>' if tiles else ""


def _about(record: Mapping[str, Any]) -> str:
    facts: dict[str, Any] = {"time": markup.duration(max(figure(record, "seconds"), 0.0))}
    facts |= MEANINGS
    return markup.fold("What is measured", markup.facts(facts | {"versions": record.get("versions")}))


def lines(record: Mapping[str, Any]) -> Sequence[str]:
    """The card for a terminal.

    Parameters
    ----------
    record : mapping
        From `fewscan.shifting.shift`.
    """
    found = [str(record.get("advice", ""))]
    for kind, row in parts(part(record, "systematic"), "kinds").items():
        found.append(f"{kind}: {figure(row, 'value'):+.1f} SD, p = {figure(row, 'p'):.3f}")
    return [*found, *_caveats(record), RULE_OF_THUMB]
