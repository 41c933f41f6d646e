"""Write docs/benchmarks.md from benchmarks/results/*.json; ``--check`` only says whether it is up to date."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
HEAD = """\
# Benchmarks

Generated from `benchmarks/results/*.json` by `make docs`: do not edit. Each table is written by the program of the same
name in `benchmarks/`. A row is measured once for each state of the code, named here by its hash.
"""
EMPTY = "\nNo results yet.\n"
HIDDEN = {"key", "code", "provenance", "cases"}

Row = dict[str, Any]


def page(results: Path) -> str:
    """The whole page.

    Parameters
    ----------
    results : Path
        Folder of result files.
    """
    sections = [section(path.stem, json.loads(path.read_text())["rows"]) for path in sorted(results.glob("*.json"))]
    return HEAD + ("".join(sections) or EMPTY)


def section(name: str, rows: list[Row]) -> str:
    """One benchmark: its table, and what it was measured with.

    Parameters
    ----------
    name : str
        Of the benchmark.
    rows : list of dict
        As the harness writes them.
    """
    keys = _union(row["key"] for row in rows)
    values = [name for name in _union(rows) if name not in HIDDEN]
    ordered = sorted(rows, key=lambda row: [_order(row["key"].get(key)) for key in keys])
    lines = [f"\n## {name.replace('_', ' ')}\n", _line(keys + values), _line(["---"] * len(keys + values))]
    for row in ordered:
        lines.append(_line([_cell(row["key"].get(k)) for k in keys] + [_cell(row.get(v)) for v in values]))
    summary = SUMMARIES.get(name, lambda rows: [])(rows)
    return "\n".join([*lines, "", *summary, *_measured_with(ordered), ""])


def _few_label(rows: list[Row]) -> list[str]:
    """Means over seeds, and where the plot is."""
    lines = []
    for system in _union([row["key"]["system"]] for row in rows):
        for k in sorted({row["key"]["k"] for row in rows}):
            dice = [row["dice"] for row in rows if (row["key"]["system"], row["key"]["k"]) == (system, k)]
            if len(dice) > 1:
                spread = statistics.stdev(dice)
                lines.append(
                    f"{system}, k={k}: mean Dice {statistics.mean(dice):.4f} over {len(dice)} seeds, SD {spread:.4f}."
                )
    return [*lines, "", "![Dice and HD95 against the number of labelled scans](few_label.svg)", ""]


def _generality(rows: list[Row]) -> list[str]:
    """Mean and spread over tasks."""
    dice = [row["dice"] for row in rows]
    spread = f", SD {statistics.stdev(dice):.3f}" if len(dice) > 1 else ""
    return [f"Mean Dice over {len(dice)} tasks {statistics.mean(dice):.3f}{spread}.", ""]


SUMMARIES: dict[str, Callable[[list[Row]], list[str]]] = {"few_label": _few_label, "generality": _generality}


def plot_few_label(rows: list[Row], out: Path) -> None:
    """Dice and HD95 against k, one line a system, one dot a run.

    Parameters
    ----------
    rows : list of dict
        Of ``few_label.json``.
    out : Path
        SVG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fewscan"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colours = {"fewscan": "#0072b2", "nnunetv2": "#d55e00"}
    for system in _union([row["key"]["system"]] for row in rows):
        runs = [row for row in rows if row["key"]["system"] == system]
        labels = sorted({row["key"]["k"] for row in runs})
        for axis, value in zip(axes, ("dice", "hd95_mm"), strict=True):
            means = [statistics.mean(row[value] for row in runs if row["key"]["k"] == k) for k in labels]
            axis.plot(labels, means, color=colours.get(system), label=system)
            axis.plot([row["key"]["k"] for row in runs], [row[value] for row in runs], "o", color=colours.get(system))
    for axis, title in zip(axes, ("Dice", "HD95, mm"), strict=True):
        axis.set(xscale="log", xticks=(1, 5, 20), xticklabels=("1", "5", "20"), xlabel="labelled scans", ylabel=title)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def _measured_with(rows: list[Row]) -> list[str]:
    groups = _union([_setting(row)] for row in rows)
    return [f"Measured on {group}." for group in groups]


def _setting(row: Row) -> str:
    origin, machine = row["provenance"], row["provenance"]["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB"
    return f"{where}; {versions}; code {row['code'][:8]}, {origin['date'][:10]}"


def _union(groups: Any) -> list[str]:
    """Every name, in the order of first sight."""
    return list(dict.fromkeys(name for group in groups for name in group))


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then words; a row without the key comes first."""
    if value is None:
        return 0, 0.0, ""
    return (1, float(value), "") if isinstance(value, int | float) else (2, 0.0, str(value))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(number)}" for name, number in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Write the page, or with ``--check`` end with exit code 1 where it is out of date."""
    text = page(RESULTS)
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        few = RESULTS / "few_label.json"
        if few.exists():
            plot_few_label(json.loads(few.read_text())["rows"], PAGE.parent / "few_label.svg")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/benchmarks.md is out of date; run make docs")


if __name__ == "__main__":
    main()
