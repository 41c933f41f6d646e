"""Results as tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fewscan.deliver.records import OF_BEFORE, expected_of

METRICS = {
    "dice": ("Dice", 3),
    "hd95_mm": ("HD95, mm", 2),
    "assd_mm": ("ASSD, mm", 2),
    "surface_dice": ("surface Dice", 3),
    "volume_error": ("volume error", 3),
}
ABSENT = "\N{EN DASH}"
MOST_CASES, MOST_LABELS = 40, 6
BUNDLE_STATES = ("scored", "missed", "not predicted", "extra", "absent")
HELD = (
    "In brackets: of patients like those of the calibration, the share that such a range is to hold on average; where "
    "we tested it, from few patients, such ranges held fewer."
)
NO_LABEL = "No labelled case: training would refuse this."
COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def show_checkup(checkup: Mapping[str, Any], console: Console) -> None:
    """Print what a data set holds, what is wrong with it, and the remedies.

    Parameters
    ----------
    checkup : mapping
        ``Checkup.to_json()``.
    console : Console
        Where to print.
    """
    counts = ", ".join(f"{checkup[role]} {role}" for role in ("labelled", "unlabelled", "test"))
    labels = ", ".join(f"{value} {name}" for value, name in checkup["labels"].items()) or "none"
    kind = f"{checkup['modality']}, channels {', '.join(checkup['channels'])}"
    console.print(escape(f"{checkup['layout']}: {counts}\nlabels: {labels}\nimages: {kind}\n"))
    console.print(_cases(checkup["cases"][:MOST_CASES]))
    if (rest := len(checkup["cases"]) - MOST_CASES) > 0:
        console.print(f"and {rest} more; --json lists them all")
    console.print()
    for finding in checkup["findings"]:
        colour, case = COLOURS[finding["severity"]], f"{finding['case']}: " if finding["case"] else ""
        console.print(f"[{colour}]{finding['severity']:<7}[/{colour}] {escape(case + finding['message'])}")
        if finding["remedy"]:
            console.print(f"        {escape(finding['remedy'])}", style="dim")
    ready = "Nothing stands in the way of training." if checkup["labelled"] else NO_LABEL
    console.print(ready if checkup["usable"] else "Training would refuse this.")


def _cases(rows: Sequence[Mapping[str, Any]]) -> Table:
    heads = ("scan", "role", "voxels", "spacing, mm", "axes", "type", "range", "labels, mL")
    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        voxels, spacing = "x".join(map(str, row["shape"])), "x".join(f"{s:.3g}" for s in row["spacing"])
        amounts = [f"{name} {_number(ml, 2)}" for name, ml in row["labels_ml"].items()]
        labels = ", ".join(amounts[:MOST_LABELS]) + (f" and {n} more" if (n := len(amounts) - MOST_LABELS) > 0 else "")
        span = f"{row['low']:.4g} to {row['high']:.4g}"
        table.add_row(
            escape(row["case"]), row["role"], voxels, spacing, row["axes"], row["dtype"], span, escape(labels)
        )
    return table


def scores(evaluation: Mapping[str, Any]) -> Table:
    """One row for each label and one for the mean over cases: means, and the interval of Dice where there is one.

    Parameters
    ----------
    evaluation : mapping
        ``Evaluation.to_json()``.
    """
    table = Table("label", *(title for title, _ in METRICS.values()), box=None, pad_edge=False, header_style="bold")
    for name, row in evaluation["labels"].items():
        table.add_row(escape(name), *_cells(row))
    table.add_row("all", *_cells(evaluation["summary"]), style="bold")
    return table


def differences(comparison: Mapping[str, Any]) -> Table:
    """One row for each metric and one for each label's Dice: first minus second, over the shared cases.

    Parameters
    ----------
    comparison : mapping
        ``Comparison.to_json()``.
    """
    heads = ("first minus second", "p", "patients", "larger", "smaller")
    table = Table("", *heads, box=None, pad_edge=False, header_style="bold")
    named = {key: (title, comparison["metrics"].get(key), digits) for key, (title, digits) in METRICS.items()}
    named |= {f"label {name}": (f"Dice, {name}", row, 3) for name, row in comparison["labels"].items()}
    for title, row, digits in named.values():
        if row:
            spread = _with_interval({"mean": row["difference"], "low": row["low"], "high": row["high"]}, digits)
            table.add_row(escape(title), spread, _number(row["p"], 4), *(str(row[k]) for k in ("n", "wins", "losses")))
    return table


def volumes(rows: Iterable[tuple[str, Mapping[str, float], float]], *, most: int = MOST_LABELS) -> Table:
    """One row for each predicted scan, with the largest structures' volumes.

    Parameters
    ----------
    rows : iterable of (id, volume in mL by label, seconds)
        As predicted.
    most : int
        Number of labels to show.
    """
    kept = list(rows)
    total: dict[str, float] = {}
    for _, by_label, _ in kept:
        for name, millilitres in by_label.items():
            total[name] = total.get(name, 0.0) + millilitres
    shown = sorted(total, key=lambda name: -total[name])[:most]
    heads = (escape(f"{name}, mL") for name in shown)
    table = Table("scan", *heads, "seconds", box=None, pad_edge=False, header_style="bold")
    for name, by_label, seconds in kept:
        table.add_row(escape(name), *(_number(by_label.get(label), 2) for label in shown), f"{seconds:.1f}")
    return table


def expected(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Table:
    """Expected Dice of each label of each predicted scan, and the slices to look at first.

    Parameters
    ----------
    rows : iterable of (id, expectation)
        As `fewscan.prediction.Prediction` holds it.
    """
    table = Table("scan", "label", "expected Dice", "range", "look first at", box=None, pad_edge=False,
                  header_style="bold", caption_justify="left")  # fmt: skip
    captions = set[str]()
    for scan, found in rows:
        name = expected_of(scan, found)
        if name != scan:
            captions.add(OF_BEFORE)
        labels = sorted(found["labels"].items(), key=lambda row: row[1]["dice"])
        places = zip(found.get("slices", ()), found.get("heights_mm", ()), strict=True)
        slices = ", ".join(f"{z} ({mm:g} mm)" for z, mm in places)
        for i, (label, row) in enumerate(labels):
            told = "not found; 0 if it is there"
            if row.get("found", True):
                told = f"{row['low']:.2f} to {row['high']:.2f} ({row['level']:.0%})"
                captions.add(HELD)
            table.add_row(escape(name if i == 0 else ""), escape(label), f"{row['dice']:.2f}", told,
                          slices if i == 0 else "")  # fmt: skip
        if not labels:
            table.add_row(escape(name), "", "", escape(str(found.get("reason", "no label was found"))), slices)
    table.caption = " ".join(text for text in (HELD, OF_BEFORE) if text in captions)
    return table


def registration(report: Mapping[str, Any]) -> Table:
    """What a registration found, one fact a row.

    Parameters
    ----------
    report : mapping
        ``registration.json``.
    """
    table = Table("", "", show_header=False)
    likeness = report["similarity"]
    steps = " -> ".join(f"{likeness[k]:.4f}" for k in ("before", "affine", "after"))
    table.add_row(f"similarity ({likeness['name']})", f"{steps}  (headers, affine, end)")
    if "dice" in report:
        mean = report["dice"]["mean"]
        table.add_row("mean Dice of the labels", f"{_number(mean['before'], 3)} -> {_number(mean['after'], 3)}")
    table.add_row("folding", f"{100 * report['folding']:.3f} % of voxels")
    table.add_row("volume change", "{smallest:.2f} to {largest:.2f}".format(**report["volume_change"]))
    moved = report["displacement_mm"]
    table.add_row("displacement", f"{moved['mean']:.1f} mm on average, {moved['largest']:.1f} mm at most")
    table.add_row("time", f"{report['seconds']:.1f} s, {report['kernels']} kernels")
    return table


def certificate(record: Mapping[str, Any]) -> Table:
    """One row for each part of a mesh: whether it may be printed, or why not.

    Parameters
    ----------
    record : mapping
        ``certificate.json``.
    """
    judged = record["printable"] is not None
    heads = ("part", "faces", "mask, mL", "volume error", "largest deviation, mm")
    more = ("smallest wall, mm", "verdict") if judged else ()
    table = Table(*heads, *more, box=None, pad_edge=False, header_style="bold")
    for name, part in record["parts"].items():
        error = round(100 * part["volume_error"], 2) + 0.0  # no minus before a zero
        row = [escape(name), str(part["faces"]), _number(part["mask_ml"], 2), f"{error:+.2f} %"]
        row.append(_number(part["deviation"]["largest_mm"], 2))
        if judged:
            verdict = "print" if part["printable"] else "[red]do not print[/red]"
            row += [_number(part["wall"]["smallest_mm"], 2), verdict]
        table.add_row(*row)
    table.columns[-1].no_wrap = True
    return table


def show_certificate(record: Mapping[str, Any], console: Console) -> None:
    """Print what was made of each label, and why parts must not be printed.

    Parameters
    ----------
    record : mapping
        ``certificate.json``.
    console : Console
        Where to print.
    """
    console.print(certificate(record))
    for name, part in record["parts"].items():
        for fault in part.get("faults", []):
            console.print(f"[red]{escape(name)}[/red]: {escape(fault)}")


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = {key: _number((row.get(key) or {}).get("mean"), digits) for key, (_, digits) in METRICS.items()}
    return list((cells | {"dice": _with_interval(row.get("dice") or {}, METRICS["dice"][1])}).values())


def _with_interval(entry: Mapping[str, float | None], digits: int) -> str:
    mean, low, high = (_number(entry.get(key), digits) for key in ("mean", "low", "high"))
    return mean if ABSENT in (low, high) else f"{mean} ({low} to {high})"


def _number(value: float | None, digits: int) -> str:
    return ABSENT if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def bundle_scores(summary: Mapping[str, Mapping[str, float]]) -> Table:
    """One row for each bundle: means over patients, and how many cases were not scored for what reason.

    Parameters
    ----------
    summary : mapping of bundle to figures
        ``tracts.bundles.summary``.
    """
    heads = ("Dice", "overlap", "overreach", "mL", "drawn mL", "ends Dice", "ends, mm", "cases")
    table = Table("bundle", *heads, box=None, pad_edge=False, header_style="bold")
    keys = (("overlap", 3), ("overreach", 3), ("volume_ml", 1), ("reference_ml", 1), ("ends_dice", 3), ("ends_mm", 1))
    for name, row in summary.items():
        counts = [f"{row[state]:.0f} {state}" for state in BUNDLE_STATES if row[state]]
        if 0 < row["patients"] < sum(row[state] for state in BUNDLE_STATES if state != "absent"):
            counts.append(f"of {row['patients']:.0f} patients")
        dice = _with_interval({"mean": row["dice"], "low": row["low"], "high": row["high"]}, 3)
        table.add_row(escape(name), dice, *(_number(row[key], digits) for key, digits in keys), ", ".join(counts))
    return table


def bundle_volumes(report: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row for each tractogram.

    Parameters
    ----------
    report : mapping of bundle to counts
        ``white_matter.masks``.
    """
    heads = ("streamlines", "mL", "points beyond the grid")
    table = Table("bundle", *heads, box=None, pad_edge=False, header_style="bold")
    for name, row in report.items():
        table.add_row(escape(name), str(row["streamlines"]), _number(row["volume_ml"], 2), str(row["points_beyond"]))
    return table


def suggestions(rows: Iterable[Mapping[str, Any]]) -> Table:
    """One row for each scan to label next, with what speaks for it.

    Parameters
    ----------
    rows : iterable of mapping
        ``ranked`` of ``Suggestions.to_json()``.
    """
    table = Table("", "scan", "unsure", "unlike", "why", box=None, pad_edge=False, header_style="bold")
    for place, row in enumerate(rows, start=1):
        doubt = _number(row["unsure"], 2)
        table.add_row(str(place), escape(row["id"]), doubt, _number(row["unlike"], 2), escape(row["reason"]))
    return table
