"""What the pages made from results are built of: table lines, and one set-up of plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table.

    Parameters
    ----------
    cells : sequence of str
        Left to right.
    """
    return "| " + " | ".join(cells) + " |"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table.

    Parameters
    ----------
    heads : sequence of str
        Of the columns.
    rows : iterable of sequence of str
        As many cells each.
    """
    return [line(heads), line(["---"] * len(heads)), *(line(row) for row in rows)]


def pyplot() -> Any:
    """Matplotlib without a screen, whose files do not differ from run to run."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fewscan"
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, out: Path) -> None:
    """Bare axes with a faint grid, as SVG.

    Parameters
    ----------
    figure : Figure
        Of matplotlib.
    out : Path
        SVG file.
    """
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})
    pyplot().close(figure)
