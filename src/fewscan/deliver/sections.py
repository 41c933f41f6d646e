"""The parts of the report: each a function from a run to HTML, empty when the run lacks its files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fewscan.data import io
from fewscan.data.bundles import bundle_files, grid_of, read_bundles
from fewscan.data.formats import segments_of
from fewscan.data.label_maps import fits, names_itself
from fewscan.deliver import charts, markup, pictures, scans
from fewscan.deliver.markup import Cell, cell, number
from fewscan.errors import FewscanError
from fewscan.judge.metrics import RULES
from fewscan.judge.results import CaseScore, Evaluation
from fewscan.naming import label_names
from fewscan.space.geometry import check_same
from fewscan.space.volume import Labelmap

METRICS = (
    ("dice", "Dice", "overlap: 0 none, 1 identical", 2, False),
    ("hd95_mm", "HD95, mm", "95 % of the outline is closer than this", 1, False),
    ("assd_mm", "ASSD, mm", "mean distance of the outlines", 2, False),
    ("surface_dice", "Surface Dice", "share of the outline within one voxel edge", 2, False),
    ("volume_error", "Volume error", "share of the reference volume", 1, True),
)
SEVERITIES = ("error", "warning", "note")
COLUMNS_OF_LABELS = 6
"""So many labels get a column of their own in the table of cases; more would not be read."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run's folder holds; None for what it does not.

    Parameters
    ----------
    directory : Path
        The folder.
    check : mapping, optional
        ``check.json``.
    model : mapping, optional
        ``model/model.json``.
    history : sequence of mapping, optional
        ``model/history.jsonl``.
    evaluation : Evaluation, optional
        ``evaluation.json``.
    predictions : sequence of mapping, optional
        ``predictions/predictions.json``.
    failed : mapping of str to str, optional
        Scans that could not be predicted, and why, from the same file.
    registration : mapping, optional
        ``registration.json``.
    draft : mapping, optional
        ``draft.json``.
    certificate : mapping, optional
        ``certificate.json``.
    suggestions : mapping, optional
        ``suggest.json``.
    scans : mapping of str to Path
        Where scans lie by name, as the caller says; the folder does not hold that.
    """

    directory: Path
    check: Mapping[str, Any] | None = None
    model: Mapping[str, Any] | None = None
    history: Sequence[Mapping[str, Any]] | None = None
    evaluation: Evaluation | None = None
    predictions: Sequence[Mapping[str, Any]] | None = None
    failed: Mapping[str, str] | None = None
    registration: Mapping[str, Any] | None = None
    draft: Mapping[str, Any] | None = None
    certificate: Mapping[str, Any] | None = None
    suggestions: Mapping[str, Any] | None = None
    scans: Mapping[str, Path] = field(default_factory=dict)


def figures(run: Run) -> str:
    """The five means with their intervals.

    Parameters
    ----------
    run : Run
        Shown when it has an evaluation.
    """
    if run.evaluation is None or not run.evaluation.cases:
        return ""
    tiles = []
    for key, title, meaning, digits, percent in METRICS:
        row = run.evaluation.spread(key)
        low, high = (number(row[end], digits, percent=percent) for end in ("low", "high"))
        between = f"{low} to {high}" if math.isfinite(row["low"]) else "no interval"
        value = number(row["mean"], digits, percent=percent)
        tiles.append(tile(title, value, between=between, meaning=meaning))
    rules = markup.fold("How these numbers are defined", markup.facts(RULES))
    return f'<ul class="figures">{"".join(tiles)}</ul>{rules}'


def tile(title: str, value: str, *, between: str, meaning: str) -> str:
    """One large figure, an item of a list of class ``figures``.

    Parameters
    ----------
    title : str
        Its name.
    value : str
        The figure.
    between : str
        Its interval, or what to compare it with.
    meaning : str
        In a few words.
    """
    return (
        f"<li><h3>{escape(title)}</h3><p class='value'>{escape(value)}</p><p class='between'>{escape(between)}</p>"
        f"<p class='meaning'>{escape(meaning)}</p></li>"
    )


def overlays(run: Run) -> str:
    """Outlines of the worst, the median and the best case.

    Parameters
    ----------
    run : Run
        Shown when it has an evaluation whose files are still there.
    """
    ranked = [] if run.evaluation is None else run.evaluation.ranked()
    places = {"Best": len(ranked) - 1, "Median": len(ranked) // 2, "Worst": 0} if ranked else {}
    chosen: dict[str, str] = {}
    for title, place in places.items():
        chosen.setdefault(ranked[place].id, title)  # fewer than three cases: each shown once
    by_id = {case.id: case for case in ranked}
    cards = [_card(title, by_id[case], run) for case, title in chosen.items()]
    if not cards:
        return ""
    legend = "".join(
        f'<label><input type="checkbox" id="show-{kind}" checked><i class="{kind}"></i>{kind}</label>'
        for kind in ("reference", "prediction")
    )
    return f'<div class="overlays"><p class="legend">{legend}</p>{"".join(cards)}</div>'


def labels(run: Run) -> str:
    """Dots of every case, mean and interval, for each label.

    Parameters
    ----------
    run : Run
        Shown when it has an evaluation.
    """
    found = run.evaluation
    if found is None or not found.cases:
        return ""
    panels = []
    for key, title, meaning, digits, percent in METRICS[:2]:
        fixed = {"ceiling": 1.0} if key == "dice" else {"floor": 0.0}
        rows = [
            _row(found, key, name, digits, percent) for name in (None, *(found.names if len(found.names) > 1 else ()))
        ]
        axis = charts.axis_for([v for row in rows for _, v in row.values], **fixed)
        panels.append(f"<div><h3>{title} <small>{escape(meaning)}</small></h3>{charts.dots(rows, axis)}</div>")
    note = '<p class="hint">Each small dot is a scan; the ring is the mean, the bar its 95 % interval.</p>'
    return f'<div class="panels">{"".join(panels)}</div>{note}'


def cases(run: Run) -> str:
    """A row per judged case.

    Parameters
    ----------
    run : Run
        Shown when it has an evaluation.
    """
    found = run.evaluation
    if found is None or not found.cases:
        return ""
    names = found.names if 1 < len(found.names) <= COLUMNS_OF_LABELS else ()
    columns = ["Case", *(title for _, title, *_ in METRICS), *(f"Dice {name}" for name in names)]
    rows = []
    for case in sorted(found.cases, key=lambda c: (not math.isnan(c.mean("dice")), c.mean("dice"))):
        row = [Cell(case.id)]
        row += [cell(case.mean(key), d if p else 2, percent=p, bar=key == "dice") for key, _, _, d, p in METRICS]
        row += [cell(case.labels[n].dice if n in case.labels else math.nan) for n in names]
        rows.append(row)
    return markup.table(columns, rows, caption="Every judged scan, weakest first. Click a heading to sort.")


def data_check(run: Run) -> str:
    """What was found in the data and what is wrong with it.

    Parameters
    ----------
    run : Run
        Shown when it has a check.
    """
    if run.check is None:
        return ""
    findings = sorted(run.check.get("findings", []), key=lambda f: SEVERITIES.index(f["severity"]))
    lines = "".join(_finding(f) for f in findings)
    said = f'<ul class="findings">{lines}</ul>' if lines else '<p class="fine">Nothing was found wrong.</p>'
    dataset = {k: v for k, v in run.check.items() if k not in ("findings", "cases") and v not in (None, [], {}, "")}
    rows: Sequence[Mapping[str, Any]] = run.check.get("cases", [])
    columns = list(dict.fromkeys(k for row in rows for k, v in row.items() if not _crowded(v)))
    body = [[Cell(markup.plain(row.get(k)), _sort_key(row.get(k))) for k in columns] for row in rows]
    heads = [column.replace("_", " ") for column in columns]
    table = markup.fold(f"All {len(rows)} scans", markup.table(heads, body, caption="Scans as read")) if rows else ""
    return said + markup.facts(dataset) + table


def provenance(run: Run) -> str:
    """Everything needed to make the model again.

    Parameters
    ----------
    run : Run
        Shown when it has a model.
    """
    if run.model is None:
        return ""
    short = {k: v for k, v in run.model.items() if len(str(v)) <= 300}
    long = {k: v for k, v in run.model.items() if k not in short}
    return markup.facts(short) + "".join(markup.fold(k.replace("_", " "), _long(v)) for k, v in long.items())


def _long(value: Any) -> str:
    return markup.facts(value if isinstance(value, Mapping) else {"": value})


def _row(found: Evaluation, key: str, name: str | None, digits: int, percent: bool) -> charts.Row:
    spread = found.spread(key, label=name)
    mean, low, high = (spread[k] for k in ("mean", "low", "high"))
    values = list(zip([case.id for case in found.cases], found.values(key, label=name), strict=True))
    title = name or (found.names[0] if len(found.names) == 1 else "all structures")
    return charts.Row(
        name=title, values=values, mean=mean, low=low, high=high, text=number(mean, digits, percent=percent)
    )


def _card(title: str, case: CaseScore, run: Run) -> str:
    dice, distance = number(case.mean("dice")), number(case.mean("hd95_mm"), 1)
    measured = f'<p class="number">Dice <b>{dice}</b> · HD95 <b>{distance}</b> mm</p>'
    head = f"<header><h3>{title}</h3><p>{escape(case.id)}</p>{measured}</header>"
    try:
        reference, prediction, image = judged(case, run.directory, named=run.scans)
        drawn = side_by_side(pictures.three_planes(reference, prediction, image=image))
    except FewscanError as error:
        return f'<article>{head}<p class="hint">No picture: {escape(markup.without_folders(str(error)))}</p></article>'
    lost = image is None and case.image is not None
    hint = f'<p class="hint">Outlines alone. {escape(scans.LOST)}</p>' if lost else ""
    return f"<article>{head}{drawn}{hint}</article>"


def side_by_side(planes: Sequence[pictures.Plane]) -> str:
    """Cuts with their directions and scale bars.

    Parameters
    ----------
    planes : sequence of Plane
        From `pictures.three_planes`.
    """
    drawn = "".join(
        f'<figure><div class="frame">{p.svg}<span class="left">{p.left}</span><span class="top">{p.top}</span>'
        f'<span class="bar-text">{p.bar_mm:g} mm</span></div><figcaption>{p.name}</figcaption></figure>'
        for p in planes
    )
    return f'<div class="planes">{drawn}</div>'


def judged(
    case: CaseScore, directory: Path, *, named: Mapping[str, Path]
) -> tuple[Labelmap, Labelmap, NDArray[Any] | None]:
    """Reference, prediction and scan of a judged case, on one grid; None where the scan is not found.

    Parameters
    ----------
    case : CaseScore
        Of the run's evaluation.
    directory : Path
        The run.
    named : mapping of str to Path
        Scans by name, as the caller says.

    Raises
    ------
    FewscanError
        If a label map is gone or a file damaged, or one lies on another grid.
    """
    beside = directory / "predictions" / case.prediction.name
    predicted, drawn = scans.lies_at(case.prediction, directory, beside), scans.lies_at(case.reference, directory)
    kept = None if case.image is None else scans.lies_at(case.image, directory)
    image = scans.place(case.id, kept, named=named)
    if bundle_files(drawn):
        reference, prediction = (bundles(folder, names=list(case.labels)) for folder in (drawn, predicted))
        return _with_scan(reference, prediction, image, what=case.id)
    names = (label_names(predicted)[0] or label_names(drawn)[0]) if names_itself(drawn) else None
    if names and segments_of(drawn) and not fits(drawn, names):
        names = None  # judged by number
    reference = io.read_labels(drawn, names=names, ignore=case.ignore, source=image)
    return _with_scan(reference, io.read_labels(predicted), image, what=case.id)


def _with_scan(
    reference: Labelmap, prediction: Labelmap, path: Path | None, *, what: str
) -> tuple[Labelmap, Labelmap, NDArray[Any] | None]:
    check_same(prediction.geometry, reference.geometry, what=what)
    if path is None:
        return reference, prediction, None
    image, geometry = scans.first_channel(path)
    check_same(geometry, reference.geometry, what=what)
    return reference, prediction, image


def bundles(folder: Path, *, names: Sequence[str] = ()) -> Labelmap:
    """Masks that overlap, as one map of combinations on their own grid.

    Parameters
    ----------
    folder : Path
        In TractSeg's layout.
    names : sequence of str
        Which to read; all when empty.

    Raises
    ------
    FewscanError
        If a mask cannot be read, or lies on another grid than the first.
    """
    grid = grid_of(folder)
    return read_bundles(folder, names=dict(enumerate(names or bundle_files(folder), start=1)), like=grid)


def _finding(found: Mapping[str, Any]) -> str:
    severity, case = (escape(str(found.get(key) or "")) for key in ("severity", "case"))
    message, remedy = (escape(markup.without_folders(str(found.get(key) or ""))) for key in ("message", "remedy"))
    about = f"{case}: " if case and case not in message else ""
    return f'<li class="{severity}"><b>{severity}</b> {about}{message} <em>{remedy}</em></li>'


def _crowded(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > COLUMNS_OF_LABELS


def _sort_key(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
