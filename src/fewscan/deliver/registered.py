"""The report's part about a registration: figures, pictures that switch between before and after, each structure."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from fewscan.deliver import markup, warps
from fewscan.deliver.markup import Cell, cell, number, signed
from fewscan.deliver.pictures import PLANES
from fewscan.deliver.records import figure, folding, part, parts
from fewscan.deliver.sections import Run, tile

FOLDER = "pictures"
STATES = (
    ("fixed", "fixed scan", ""),
    ("before", "moving scan, before", "before_labels"),
    ("warped", "moving scan, registered", "warped_labels"),
)
"""Picture, its name, and the outline of the moving scan's labels in it."""

LIKENESS = {
    "lncc": "local correlation",
    "mi": "mutual information",
    "mind": "minus the difference of descriptors",
    "mse": "minus the squared difference",
}
TRANSFORMS = {
    "rigid": "rotation and translation",
    "affine": "affine",
    "deformable": "affine, then a smooth deformation",
}
PATH = re.compile(r"[MLZ\d. -]*")
MOST_BYTES = 200_000  # of a picture: more was not written by us
PNG = b"\x89PNG\r\n\x1a\n"
TIMES = "\u00d7"
BARS = (100.0, 50.0, 20.0, 10.0, 5.0, 2.0, 1.0)  # mm


def registration(run: Run) -> str:
    """What a registration changed, in figures and pictures.

    Parameters
    ----------
    run : Run
        Shown when it has a record of one.
    """
    record = run.registration
    if record is None:
        return ""
    folder = run.directory / FOLDER
    shown = _Pictures(folder) if record.get("pictures") else None
    parts = [_figures(record)]
    if shown is not None and shown.complete:
        parts += [_flicker(shown), _further(shown, deformable=record.get("transform") == "deformable")]
    else:
        parts.append('<p class="hint">The pictures do not lie beside the record; register again to make them.</p>')
    return "".join([*parts, _structures(record), _facts(record)])


class _Pictures:
    """What `warps.write_pictures` left in a folder; nothing else in it is read."""

    def __init__(self, folder: Path) -> None:
        self.images = {name: png(folder / name) for name in warps.FILES if name != warps.LINES}
        self.lines = _lines(folder / warps.LINES)

    @property
    def complete(self) -> bool:
        """Whether every picture is there."""
        return all(self.images.values())

    def has(self, name: str) -> bool:
        """Whether any plane has such a line."""
        return any(lines.get(name) for lines in self.lines.values())

    def path(self, plane: str, name: str, *, kind: str) -> str:
        """A line of a plane as SVG; nothing where there is none."""
        data = self.lines.get(plane, {}).get(name)
        good = isinstance(data, str) and data and PATH.fullmatch(data)
        return f'<path class="{kind}" d="{data}"/>' if good else ""

    def drawn(self, plane: tuple[str, int, str, str], kind: str, *, paths: str) -> str:
        """One picture with its lines."""
        name, _, left, top = plane
        side, length = self.lines.get(name, {}).get("side_mm"), warps.UNITS
        bar = text = ""
        if isinstance(side, int | float) and side > 0:
            mm = next((mm for mm in BARS if mm <= side / 3), BARS[-1])
            wide = mm / side * length
            bar = f'<path class="bar" d="M{0.95 * length - wide:.1f} {0.95 * length:g}h{wide:.1f}"/>'
            text = f'<span class="bar-text">{mm:g} mm</span>'
        href = f"data:image/png;base64,{self.images[f'{name}_{kind}.png']}"
        image = f'<image width="{length}" height="{length}" href="{href}"/>'
        svg = f'<svg class="plane" viewBox="0 0 {length} {length}" role="img" aria-label="{name}, {kind}">'
        marks = f'<span class="left">{left}</span><span class="top">{top}</span>{text}'
        frame = f'<div class="frame">{svg}{image}{paths}{bar}</svg>{marks}</div>'
        return f"<figure>{frame}<figcaption>{name}</figcaption></figure>"


def png(path: Path) -> str:
    """A picture of ours in base 64; empty where there is none.

    Parameters
    ----------
    path : Path
        PNG file.
    """
    try:
        content = path.read_bytes() if path.stat().st_size <= MOST_BYTES else b""
    except OSError:
        return ""
    return base64.b64encode(content).decode() if content.startswith(PNG) else ""


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = content.items() if isinstance(content, dict) else ()
    return {name: lines for name, lines in found if isinstance(lines, dict)}


def _figures(record: Mapping[str, Any]) -> str:
    likeness, dice = part(record, "similarity"), part(part(record, "dice"), "mean")
    change, moved = part(record, "volume_change"), part(record, "displacement_mm")
    name = LIKENESS.get(str(likeness.get("name")), "likeness")
    rows = [
        (
            "Likeness", _number(likeness, "after", 2),
            f"{_number(likeness, 'before', 2)} before, {_number(likeness, 'affine', 2)} after the affine part",
            f"{name} of fixed and moving scan; larger is more alike",
        ),
        (
            "Folding", folding(figure(record, "folding")), "of the voxels",
            "where the map turns space inside out and cannot be trusted",
        ),
        (
            "Displacement", f"{_number(moved, 'mean', 1)} mm", f"{_number(moved, 'largest', 1)} mm at most",
            "mean length, without the affine part",
        ),
        (
            "Volume change", _times(change, "largest"), f"{_times(change, 'smallest')} at least",
            "of a voxel at most, without the affine part; 1 is unchanged",
        ),
    ]  # fmt: skip
    if dice:
        figures = _number(dice, "after", 2), f"{_number(dice, 'before', 2)} before"
        rows.insert(0, ("Mean Dice", *figures, "overlap of fixed and moving labels: 0 none, 1 identical"))
    tiles = [tile(title, value, between=between, meaning=meaning) for title, value, between, meaning in rows]
    return f'<ul class="figures">{"".join(tiles)}</ul>'


def _flicker(shown: _Pictures) -> str:
    """Three states of one place on the page, of which one is seen; all of them in print."""
    switch = "".join(
        f'<label><input type="radio" name="state" id="show-{kind}"{" checked" if kind == "warped" else ""}>'
        f"{name}</label>"
        for kind, name, _ in STATES
    )
    kinds = (("reference", "fixed labels", "fixed_labels"), ("prediction", "moving labels", "warped_labels"))
    legend = "".join(
        f'<label><input type="checkbox" id="show-{kind}-lines" checked><i class="{kind}"></i>{name}</label>'
        for kind, name, line in kinds
        if shown.has(line)
    )
    states = []
    for kind, name, moving in STATES:
        lines = {"fixed_labels": "reference", moving: "prediction"}
        drawn = _planes(shown, kind, lines)
        states.append(f'<div class="state {kind}"><h3>{name.capitalize()}</h3>{drawn}</div>')
    return (
        f'<div class="flicker"><p class="legend switch">{switch}<button type="button" hidden>flicker</button></p>'
        f'<p class="legend">{legend}</p>{"".join(states)}</div>'
    )


def _further(shown: _Pictures, *, deformable: bool) -> str:
    """Checkerboard, grid and map of volumes, one line of three planes each."""
    board = _planes(shown, "checkerboard", {})
    drawn = [("Checkerboard", "squares of the fixed and of the registered scan in turns", board)]
    if deformable:
        outline = "fixed_labels" if shown.has("fixed_labels") else "warped_labels"
        grid, volume = _planes(shown, "fixed", {"grid": "grid"}), _planes(shown, "volume", {outline: "thin"})
        drawn += [
            ("Deformed grid", "a straight grid on the moving scan, as it comes to lie on the fixed one", grid),
            (
                "Volume change",
                "blue: smaller in the moving scan than in the fixed one; orange: larger",
                _scale() + volume,
            ),
        ]
    return "".join(
        f'<article class="warp"><h3>{title} <small>{meaning}</small></h3>{body}</article>'
        for title, meaning, body in drawn
    )


def _planes(shown: _Pictures, kind: str, lines: Mapping[str, str]) -> str:
    """The three planes of one kind of picture, with lines and the class of each."""
    drawn = []
    for plane in PLANES:
        paths = "".join(shown.path(plane[0], name, kind=style) for name, style in lines.items())
        drawn.append(shown.drawn(plane, kind, paths=paths))
    return f'<div class="planes">{"".join(drawn)}</div>'


def _scale() -> str:
    """What the colours of the map of volumes mean."""
    stops = ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in warps.ramp(9).tolist())
    most, colour = f"{warps.LARGEST_CHANGE:g}", ", ".join(map(str, warps.FOLDED))
    bar = f'<i style="background: linear-gradient(to right, {stops})"></i>'
    folded = f'<i class="folded" style="background: rgb({colour})"></i>'
    return (
        f'<p class="legend"><span class="ramp">1/{most}{bar}{most}</span><span class="ramp">{folded}folded</span></p>'
    )


def _structures(record: Mapping[str, Any]) -> str:
    labels = parts(part(record, "dice"), "labels")
    rows = []
    for name, row in sorted(labels.items(), key=lambda item: figure(item[1], "after")):
        before, after = (figure(row, key) for key in ("before", "after"))
        rows.append([Cell(name), cell(before, bar=True), cell(after, bar=True), signed(after - before)])
    if not rows:
        return ""
    columns = ["Structure", "Dice before", "Dice registered", "change"]
    return markup.table(columns, rows, caption="Overlap of each structure, weakest first. Click a heading to sort.")


def _facts(record: Mapping[str, Any]) -> str:
    grid, seconds = part(record, "grid"), figure(record, "seconds")
    facts = {
        "fixed scan": record.get("fixed"),
        "moving scan": record.get("moving"),
        "map": TRANSFORMS.get(str(record.get("transform")), record.get("transform")),
        "voxels deformed on": grid.get("shape"),
        "their size, mm": grid.get("spacing_mm"),
        "time": markup.duration(seconds) if seconds >= 0 else None,
        "kernels": record.get("kernels"),
        "versions": record.get("versions"),
    }
    told = markup.facts({key: value for key, value in facts.items() if value is not None})
    lines = _matrix(record.get("matrix"))
    return told + (markup.fold("Affine part, fixed to moving, RAS+ mm", lines) if lines else "")


def _matrix(matrix: Any) -> str:
    rows = matrix if isinstance(matrix, list) else []
    if not rows or not all(isinstance(row, list) and all(isinstance(v, int | float) for v in row) for row in rows):
        return ""
    lines = "\n".join("  ".join(f"{value:10.5f}" for value in row) for row in rows)
    return f'<pre class="matrix">{escape(lines)}</pre>'


def _number(found: Mapping[str, Any], key: str, digits: int) -> str:
    return number(figure(found, key), digits)


def _times(found: Mapping[str, Any], key: str) -> str:
    value = figure(found, key)
    return f"{TIMES} {value:.2g}" if math.isfinite(value) else markup.ABSENT
