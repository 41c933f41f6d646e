"""The report's part about training: a curve for each phase, and whether teaching by unlabelled scans was kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fewscan.deliver import charts, markup, pictures
from fewscan.deliver.markup import Cell, cell
from fewscan.deliver.records import figure, part
from fewscan.deliver.sections import Run

PHASES = {
    "segment": "segmenter, on drawn labels",
    "anatomy": "segmenter, on labels proposed for unlabelled scans",
    "register": "registration network, on pairs of scans",
    "warm-up": "weights that are new, on a frozen trunk",
    "adapt": "the adapted segmenter",
    "folds": "segmenters of the cross-validation",
}
"""A phase's name in the history, in words."""

SIGNS = {
    "consistency": "same answer to unlabelled scans and to disturbed copies of them, Dice",
    "labelled": "answer to the labelled scans it was trained on, Dice",
}
"""What the guard of joint training compares."""

History = Sequence[Mapping[str, Any]]


def training(run: Run) -> str:
    """The curves, how long it took, and what came of teaching.

    Parameters
    ----------
    run : Run
        Shown when it has a history, or a model with a verdict on teaching.
    """
    history = [h for h in run.history or () if math.isfinite(h.get("loss", math.nan))]
    taught = teaching(run.model or {})
    if not history:
        return taught
    phases = by_phase(history)
    steps, seconds = history[-1].get("step", len(history)), history[-1]["seconds"]
    facts = {"steps": steps, "time": markup.duration(seconds)}
    if len(phases) == 1:
        facts["loss at the end"] = f"{_end([h['loss'] for h in history]):.3g}"
    facts["steps per second"] = f"{steps / max(seconds, 1e-9):.3g}"
    return _curves(phases) + markup.facts(facts) + taught


def by_phase(history: History) -> dict[str, History]:
    """Lines of a history by the name of their phase, in words; those of annealing after a stop have none of their own.

    Parameters
    ----------
    history : sequence of mapping
        Lines of ``history.jsonl``.

    Examples
    --------
    >>> lines = [{"phase": "segment"}, {"phase": "register"}, {"phase": "stopping: annealing what there is"}]
    >>> {name: len(part) for name, part in by_phase(lines).items()}
    {'segmenter, on drawn labels': 1, 'registration network, on pairs of scans': 1}
    """
    names = [str(line.get("phase", "")) for line in history]
    kinds = [name for name in dict.fromkeys(names) if not name.startswith("stopping")]
    if len(kinds) <= 1:
        return {PHASES.get(kinds[0], kinds[0]) if kinds else "": history}
    return {PHASES.get(k, k): [h for h, name in zip(history, names, strict=True) if name == k] for k in kinds}


def teaching(model: Mapping[str, Any]) -> str:
    """The verdict of joint training's guard; nothing where there was none.

    Parameters
    ----------
    model : mapping
        Content of ``model.json``.
    """
    verdict = model.get("guard")
    if not isinstance(verdict, Mapping) or not verdict.get("kept"):
        return ""
    before, after = (part(verdict, key) for key in ("apart", "joint"))
    rows = []
    for key, meaning in SIGNS.items():
        first, second = (figure(found, key) for found in (before, after))
        rows.append([Cell(meaning), cell(first, 3), cell(second, 3)])
    said = (
        "Unlabelled scans taught the segmenter, and neither sign speaks against it: it was kept."
        if verdict["kept"] == "joint"
        else "After unlabelled scans had taught the segmenter it was worse by at least one of two signs: the one from "
        "before was kept."
    )
    table = markup.table(
        ["Sign", "before teaching", "after"], rows, caption="Two signs that need no further label. Neither is accuracy."
    )
    return f'<div class="teaching"><h3>Teaching</h3><p>{said}</p>{table}</div>'


def _curves(phases: Mapping[str, History]) -> str:
    seconds = max(lines[-1]["seconds"] for lines in phases.values())
    unit, name = (60.0, "minutes") if seconds >= 180 else (1.0, "seconds")
    drawn = [(title, _curve(lines, unit, name)) for title, lines in phases.items()]
    if len(drawn) == 1:
        return drawn[0][1]
    panels = "".join(f"<div><h3>{escape(title.capitalize())}</h3>{chart}</div>" for title, chart in drawn)
    rows = []
    for title, lines in phases.items():
        terms = dict.fromkeys(key for line in lines for key in part(line, "terms"))
        ends = {key.replace("_", " "): _end([figure(part(h, "terms"), key) for h in lines]) for key in terms}
        said = ", ".join(f"{key} {value:.3g}" for key, value in ends.items())
        rows.append([Cell(title), Cell(f"{_end([h['loss'] for h in lines]):.3g}"), Cell(said or markup.ABSENT)])
    table = markup.table(["Phase", "loss", "unweighted terms"], rows, caption="Where each phase ended.")
    note = (
        '<p class="hint">Faint: values as logged; strong: their running median. Phases take turns and have losses of '
        "their own: compare a curve with itself only.</p>"
    )
    return f'<div class="panels phases">{panels}</div>{note}<div class="wrapped">{table}</div>'


def _curve(lines: History, unit: float, name: str) -> str:
    loss = [h["loss"] for h in lines]
    if len(loss) < 2:
        return '<p class="hint">One value only: no curve.</p>'
    return charts.curve(
        [h["seconds"] / unit for h in lines], loss, middle=pictures.smoothed(loss), labels=(name, "loss")
    )  # fmt: skip


def _end(values: Sequence[float]) -> float:
    """Last value of the smoothed curve."""
    known = [value for value in values if math.isfinite(value)]
    return pictures.smoothed(known)[1][-1] if known else math.nan
