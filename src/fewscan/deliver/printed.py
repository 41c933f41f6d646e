"""The report's part about meshes: whether they may be printed, pictures, figures of each part, how they were found."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from fewscan.deliver import markup
from fewscan.deliver.markup import Cell, cell, number
from fewscan.deliver.records import figure, part, parts
from fewscan.deliver.registered import png
from fewscan.deliver.sections import Run, tile

VIEWS = ("the front", "the left", "above")
PICTURE = re.compile(r"pictures/part_\d+\.png")
"""What a record may name as a picture; nothing else is read."""


def said(record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Headline and remarks of a certificate.

    Parameters
    ----------
    record : mapping
        Content of ``certificate.json``.
    """
    found = parts(record, "parts")
    remarks = [str(remark) for remark in _list(record, "remarks")]
    if record.get("printable") is None:
        return f"Surfaces of {_count(len(found))} were made. They were not examined for printing.", remarks
    bad = [name for name, row in found.items() if not row.get("printable")]
    remarks = [f"{name}: {fault}." for name in bad for fault in _list(found[name], "faults")][:8] + remarks
    if not bad:
        return f"{_count(len(found)).capitalize()} may be printed.", remarks
    if len(bad) == len(found):
        return "This must not be printed as it is.", remarks
    return f"Of {_count(len(found))}, {len(bad)} must not be printed as they are.", remarks


def certificate(run: Run) -> str:
    """Figures, pictures and a row for each part.

    Parameters
    ----------
    run : Run
        Shown when it has a certificate.
    """
    record = run.certificate
    if record is None:
        return ""
    found = parts(record, "parts")
    judged = record.get("printable") is not None
    pictures = [_picture(run, f"pictures/all_{view.split()[-1]}.png", f"from {view}") for view in VIEWS]
    known = {name: str(row.get("picture")) for name, row in found.items()}
    each = [_picture(run, place, name) for name, place in known.items() if PICTURE.fullmatch(place)]
    drawn = f'<div class="planes">{"".join(pictures)}</div>'
    if each:
        drawn += markup.fold(
            f"Each of the {len(each)} parts, from the front", f'<div class="planes">{"".join(each)}</div>'
        )
    facts = {
        "unit": record.get("unit"), "space": record.get("space"), "for": record.get("purpose"),
        "printer": record.get("printer"), "additions": record.get("additions") or None,
        "versions": record.get("versions"),
    }  # fmt: skip
    told = markup.facts({key: content for key, content in facts.items() if content is not None})
    methods = markup.fold("How these numbers are found", markup.facts(part(record, "methods")))
    tiles = f'<ul class="figures">{_tiles(found, judged=judged)}</ul>'
    return tiles + drawn + _findings(found) + _table(found, judged=judged) + told + methods


def _tiles(found: Mapping[str, Mapping[str, Any]], *, judged: bool) -> str:
    error = max((abs(figure(row, "volume_error")) for row in found.values()), default=math.nan)
    far = max((figure(part(row, "deviation"), "largest_voxels") for row in found.values()), default=math.nan)
    rows = [
        ("Volume", number(error, 2, percent=True), "largest error of a part", "against the voxels of the mask"),
        ("Deviation", number(far), "voxels, largest of all parts", "from the boundary of the mask"),
    ]
    if judged:
        good = sum(bool(row.get("printable")) for row in found.values())
        walls = [figure(part(row, "wall"), "smallest_mm") for row in found.values()]
        thin = min((wall for wall in walls if math.isfinite(wall)), default=math.nan)
        grams = sum(g for row in found.values() if math.isfinite(g := figure(row, "material_g")))
        rows.insert(0, ("Printable", f"{good} of {len(found)}", "parts", "closed, sound, thick enough, and they fit"))
        rows += [
            ("Smallest wall", f"{number(thin)} mm", "of all parts", "a thousandth of the surface is thinner"),
            ("Material", f"{grams:.0f} g", "all parts, solid", "without supports"),
        ]
    return "".join(tile(title, value, between=between, meaning=meaning) for title, value, between, meaning in rows)


def _findings(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What is wrong with each part first, then what to know of it, then what was done to it; each thing once."""
    lines = []
    for key, kind in (("faults", "error"), ("remarks", "warning"), ("changed", "note")):
        word = {"faults": "refused", "remarks": "remark", "changed": "changed"}[key]
        parts_of: dict[str, list[str]] = {}
        for name, row in found.items():
            for line in _list(row, key):
                parts_of.setdefault(str(line), []).append(name)
        lines += [
            f'<li class="{kind}"><b>{word}</b> {escape(", ".join(names))}: {escape(line)}</li>'
            for line, names in parts_of.items()
        ]
    return f'<ul class="findings">{"".join(lines)}</ul>' if lines else ""


def _table(found: Mapping[str, Mapping[str, Any]], *, judged: bool) -> str:
    columns = ["Part", "faces", "mask, mL", "volume error", "mean deviation, mm", "largest, mm"]
    columns += ["wall, mm", "gap, mm", "shells", "size, mm", "verdict"] if judged else []
    rows = []
    for name, row in found.items():
        far = part(row, "deviation")
        cells = [
            Cell(name), cell(figure(row, "faces"), 0), cell(figure(row, "mask_ml")),
            cell(figure(row, "volume_error"), 2, percent=True), cell(figure(far, "mean_mm")),
            cell(figure(far, "largest_mm")),
        ]  # fmt: skip
        if judged:
            cells += [
                cell(figure(part(row, "wall"), "smallest_mm")), cell(figure(part(row, "gap"), "smallest_mm")),
                cell(figure(row, "shells"), 0), Cell(markup.plain(row.get("size_mm"))),
                Cell("print" if row.get("printable") else "do not print"),
            ]  # fmt: skip
        rows.append(cells)
    return markup.table(columns, rows, caption="Every part. Click a heading to sort.")


def _picture(run: Run, place: str, caption: str) -> str:
    image = png(run.directory / place)
    if not image:
        return ""
    source = f"data:image/png;base64,{image}"
    return f'<figure><img alt="{escape(caption)}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'


def _list(found: Mapping[str, Any], key: str) -> list[Any]:
    value = found.get(key)
    return value if isinstance(value, list) else []


def _count(n: int) -> str:
    return "one part" if n == 1 else f"{n} parts"
