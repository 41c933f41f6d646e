"""Write docs/benchmarks.md from benchmarks/results/*.json; ``--check`` only says whether it is up to date."""

from __future__ import annotations

import json
import sys
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
    return "\n".join([*lines, "", *_measured_with(ordered), ""])


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
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/benchmarks.md is out of date; run make docs")


if __name__ == "__main__":
    main()
