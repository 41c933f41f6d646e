"""Charts as SVG and HTML that stretch with the page: places are percentages, text keeps its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Row:
    """One label's dots.

    Parameters
    ----------
    name : str
        Shown before the dots.
    values : sequence of (str, float)
        Case and number; NaN are left out.
    mean, low, high : float
        Mean and its interval; NaN draws none.
    text : str
        The mean in words, shown after the dots.
    """

    name: str
    values: Sequence[tuple[str, float]]
    mean: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Axis:
    """A range and its marks.

    Parameters
    ----------
    low, high : float
        Ends.
    step : float
        Between two marks.
    """

    low: float
    high: float
    step: float

    def at(self, value: float) -> str:
        """Place as a percentage with a little room at both ends.

        Parameters
        ----------
        value : float
            Moved into the range when outside.
        """
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return f"{2 + 96 * share:.2f}%"

    @property
    def marks(self) -> list[float]:
        """Where the marks are."""
        count = math.floor((self.high - self.low) / self.step + 1e-6)
        return [self.low + i * self.step for i in range(count + 1)]


def axis_for(values: Sequence[float], *, floor: float | None = None, ceiling: float | None = None) -> Axis:
    """Round range around values with about five marks.

    Parameters
    ----------
    values : sequence of float
        NaN are left out.
    floor, ceiling : float, optional
        Fixed lower or upper end.

    Examples
    --------
    >>> axis_for([0.62, 0.9], ceiling=1.0)
    Axis(low=0.6, high=1.0, step=0.1)
    """
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low = min(finite) if floor is None else floor
    high = max(finite) if ceiling is None else ceiling
    span = max(high - low, 1e-3)
    power = 10.0 ** math.floor(math.log10(span / 3))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= 5)
    low = low if floor is not None else round(math.floor(low / step + 1e-9) * step, 10)
    high = high if ceiling is not None else round(math.ceil(high / step - 1e-9) * step, 10)
    return Axis(low, high if high > low else low + step, round(step, 10))


def dots(rows: Sequence[Row], axis: Axis) -> str:
    """One line of dots per row, with its mean and interval.

    Parameters
    ----------
    rows : sequence of Row
        In the order shown.
    axis : Axis
        Shared by all rows.
    """
    lines = [_dots_row(row, axis) for row in rows]
    marks = "".join(f'<text x="{axis.at(m)}" y="12">{m:g}</text>' for m in (round(m, 6) for m in axis.marks))
    scale = (
        f'<div class="dots-row scale"><span></span><svg height="16" aria-hidden="true">{marks}</svg><span></span></div>'
    )
    return f'<div class="dots">{"".join(lines)}{scale}</div>'


def _dots_row(row: Row, axis: Axis) -> str:
    parts = [f'<line class="grid" x1="{axis.at(m)}" x2="{axis.at(m)}" y1="0" y2="100%"/>' for m in axis.marks]
    seen = [(case, value) for case, value in row.values if math.isfinite(value)]
    for i, (case, value) in enumerate(seen):
        y = 15 + ((i * 0.618034) % 1 - 0.5) * 14 * (len(seen) > 1)
        title = f"<title>{escape(case)}: {value:.3g}</title>"
        parts.append(f'<circle class="dot" cx="{axis.at(value)}" cy="{y:.1f}" r="3.2">{title}</circle>')
    if math.isfinite(row.low):
        parts.append(f'<line class="interval" x1="{axis.at(row.low)}" x2="{axis.at(row.high)}" y1="15" y2="15"/>')
    if math.isfinite(row.mean):
        parts.append(f'<circle class="mean" cx="{axis.at(row.mean)}" cy="15" r="4.6"/>')
    picture = f'<svg height="30" role="img" aria-label="{escape(row.name)}: {escape(row.text)}">{"".join(parts)}</svg>'
    before, after = f"<span>{escape(row.name)}</span>", f'<span class="number">{escape(row.text)}</span>'
    return f'<div class="dots-row">{before}{picture}{after}</div>'


def curve(
    x: Sequence[float], raw: Sequence[float], *, middle: tuple[Sequence[int], Sequence[float]], labels: tuple[str, str]
) -> str:
    """A line over its scattered raw values.

    Parameters
    ----------
    x : sequence of float
        Rising.
    raw : sequence of float
        One per ``x``.
    middle : (indices into ``x``, values)
        The line that is read.
    labels : (str, str)
        What the two axes show.
    """
    across, up = axis_for(x, floor=0.0, ceiling=x[-1]), axis_for(middle[1], floor=0.0)

    def place(i: float, v: float) -> str:
        clipped = min(v, up.high)
        return f"{100 * (i - across.low) / (across.high - across.low):.2f},{100 - 100 * clipped / up.high:.2f}"

    every = max(1, len(x) // 600)
    behind = " ".join(place(a, b) for a, b in list(zip(x, raw, strict=True))[::every] if math.isfinite(b))
    front = " ".join(place(x[i], v) for i, v in zip(*middle, strict=True) if math.isfinite(v))
    grid = "".join(f'<path class="grid" d="M0 {100 - 100 * m / up.high:.2f}h100"/>' for m in up.marks)
    high = "".join(
        f'<span style="bottom:{100 * m / up.high:.2f}%">{m:g}</span>' for m in (round(m, 6) for m in up.marks)
    )
    wide = "".join(
        f'<span style="left:{100 * (m - across.low) / (across.high - across.low):.2f}%">{m:g}</span>'
        for m in (round(m, 6) for m in across.marks)
    )
    lines = f'{grid}<polyline class="raw" points="{behind}"/><polyline class="line" points="{front}"/>'
    frame = f'viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(labels[1])}"'
    svg = f"<svg {frame}>{lines}</svg>"
    return (
        f'<div class="curve"><p class="axis-name">{escape(labels[1])}</p><div class="up">{high}</div>{svg}'
        f'<div class="across">{wide}</div><p class="axis-name across-name">{escape(labels[0])}</p></div>'
    )


def growth(
    points: Sequence[tuple[float, float, float, float]],
    line: Sequence[tuple[float, float]],
    *,
    ahead: Sequence[tuple[float, float, float, float]] = (),
    labels: tuple[str, str],
) -> str:
    """Points with intervals and a line through them, over numbers of which each mark is twice the one before.

    Parameters
    ----------
    points : sequence of (x, y, low, high)
        Measured; NaN draws no interval.
    line : sequence of (x, y)
        Empty for none.
    ahead : sequence of (x, y, low, high)
        Expected, shown hollow.
    labels : (str, str)
        What the two axes show.
    """
    every = [*points, *ahead]
    first, last = min(row[0] for row in every), max(row[0] for row in every)
    wide = math.log2(last / first) or 1.0
    up = axis_for([v for row in every for v in row[1:]], ceiling=1.0)

    def across(x: float) -> str:
        return f"{2 + 96 * math.log2(x / first) / wide:.2f}%"

    def high(y: float) -> str:
        return f"{100 - 100 * (min(max(y, up.low), up.high) - up.low) / (up.high - up.low):.2f}%"

    parts = [f'<line class="grid" x1="0" x2="100%" y1="{high(m)}" y2="{high(m)}"/>' for m in up.marks]
    for (x1, y1), (x2, y2) in pairwise(line):
        parts.append(f'<line class="line" x1="{across(x1)}" x2="{across(x2)}" y1="{high(y1)}" y2="{high(y2)}"/>')
    for kind, rows in (("dot", points), ("mean", ahead)):
        for x, y, below, above in rows:
            if math.isfinite(below):
                ends = f'y1="{high(below)}" y2="{high(above)}"'
                parts.append(f'<line class="interval" x1="{across(x)}" x2="{across(x)}" {ends}/>')
            title = f"<title>{x:g}: {y:.3f}</title>"
            parts.append(f'<circle class="{kind}" cx="{across(x)}" cy="{high(y)}" r="4.6">{title}</circle>')
    beside = "".join(f'<span style="bottom:{100 - float(high(m)[:-1]):.2f}%">{m:g}</span>' for m in
                     (round(m, 6) for m in up.marks))  # fmt: skip
    below_ = "".join(f'<span style="left:{across(x)}">{x:g}</span>' for x in sorted({row[0] for row in every}))
    return _framed("".join(parts), beside=beside, below=below_, labels=labels, what=labels[1])


def _framed(drawn: str, *, beside: str, below: str, labels: tuple[str, str], what: str) -> str:
    """A drawing with its marks and the names of its axes."""
    svg = f'<svg role="img" aria-label="{escape(what)}">{drawn}</svg>'
    return (
        f'<div class="curve growth"><p class="axis-name">{escape(labels[1])}</p><div class="up">{beside}</div>{svg}'
        f'<div class="across">{below}</div><p class="axis-name across-name">{escape(labels[0])}</p></div>'
    )


def agreement(points: Sequence[tuple[str, float, float]], *, labels: tuple[str, str]) -> str:
    """Dots over one range on both axes, and the line on which the two agree.

    Parameters
    ----------
    points : sequence of (str, x, y)
        What it is, and both numbers, at most 1; NaN are left out.
    labels : (str, str)
        What the two axes show.
    """
    seen = [(name, x, y) for name, x, y in points if math.isfinite(x) and math.isfinite(y)]
    axis = axis_for([v for _, x, y in seen for v in (x, y)], ceiling=1.0)
    marks = [round(m, 6) for m in axis.marks]

    def high(value: float) -> str:
        return f"{100 - float(axis.at(value)[:-1]):.2f}%"

    parts = [f'<line class="grid" x1="0" x2="100%" y1="{high(m)}" y2="{high(m)}"/>' for m in marks]
    ends = f'x1="{axis.at(axis.low)}" x2="{axis.at(1.0)}" y1="{high(axis.low)}" y2="{high(1.0)}"'
    parts.append(f'<line class="line" {ends}/>')
    for name, x, y in seen:
        title = f"<title>{escape(name)}: {x:.3f} expected, {y:.3f} measured</title>"
        parts.append(f'<circle class="dot" cx="{axis.at(x)}" cy="{high(y)}" r="3.2">{title}</circle>')
    beside = "".join(f'<span style="bottom:{axis.at(m)}">{m:g}</span>' for m in marks)
    below = "".join(f'<span style="left:{axis.at(m)}">{m:g}</span>' for m in marks)
    return _framed("".join(parts), beside=beside, below=below, labels=labels, what=f"{labels[1]} against {labels[0]}")
