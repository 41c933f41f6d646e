"""Small pieces of HTML; everything that comes from a file is escaped here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

SEGMENT = r"[^\s/\\:;](?:(?:(?!\.\w+[\s,)]|\sand/or\b)[^/\\:;\n])*[^\s/\\:;'\"])?"
"""A folder's name, which may hold spaces; a file name's end or "and/or" shows that prose has begun."""
FOLDERS = re.compile(rf"(?<![\w./])/(?:{SEGMENT}/)+|(?<!\w)(?:[A-Za-z]:[\\/]|\\\\)(?:{SEGMENT}[\\/])*")
"""The folders of an absolute path: POSIX, Windows drive or share."""
ABSENT = "–"  # noqa: RUF001
LAST = -1e9  # sorts below any difference that is shown


@dataclass(frozen=True)
class Cell:
    """A table cell.

    Parameters
    ----------
    text : str
        Shown; escaped by `table`.
    key : float or str
        What sorting compares; None takes the text.
    share : float, optional
        Length of a bar behind the text, 0 to 1.
    """

    text: str
    key: float | str | None = None
    share: float | None = None


def number(value: float | None, digits: int = 2, *, percent: bool = False) -> str:
    """A number for people; a dash where there is none.

    Parameters
    ----------
    value : float, optional
        None and NaN are nothing.
    digits : int
        After the point.
    percent : bool
        Times 100, with a sign.

    Examples
    --------
    >>> number(0.8649), number(0.051, 1, percent=True)
    ('0.86', '5.1 %')
    >>> number(-0.001)
    '0.00'
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    shown = round(100 * value if percent else value, digits) + 0.0  # no minus before a zero
    return f"{shown:.{digits}f} %" if percent else f"{shown:.{digits}f}"


def cell(value: float, digits: int = 2, *, percent: bool = False, bar: bool = False) -> Cell:
    """A numeric table cell that sorts by value, with what has no value last.

    Parameters
    ----------
    value : float
        NaN shows a dash.
    digits : int
        After the point.
    percent : bool
        Times 100, with a sign.
    bar : bool
        Draw the value, 0 to 1, behind the text.
    """
    known = math.isfinite(value)
    return Cell(number(value, digits, percent=percent), value if known else -1.0, value if bar and known else None)


def signed(value: float) -> Cell:
    """A table cell for a difference, with what has no value last.

    Parameters
    ----------
    value : float
        NaN shows a dash.
    """
    return Cell(f"{round(value, 2) + 0.0:+.2f}", value) if math.isfinite(value) else Cell(ABSENT, LAST)


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str) -> str:
    """A table that a click on a heading sorts, where scripts run; the first column names the row.

    Parameters
    ----------
    columns : sequence of str
        Headings.
    rows : sequence of sequence of Cell
        One cell per column.
    caption : str
        What it shows.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(_cell(c, first=i == 0) for i, c in enumerate(row))}</tr>" for row in rows)
    return (
        f'<p class="caption">{escape(caption)}</p>'
        f'<div class="table" tabindex="0"><table aria-label="{escape(caption)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Mapping[str, Any]) -> str:
    """Names and values; mappings inside are shown as lines of their own.

    Parameters
    ----------
    pairs : mapping
        Anything that JSON holds.
    """
    rows = "".join(f"<dt>{escape(str(k).replace('_', ' '))}</dt><dd>{_value(v)}</dd>" for k, v in pairs.items())
    return f'<dl class="facts">{rows}</dl>'


def fold(title: str, body: str) -> str:
    """Something most readers skip.

    Parameters
    ----------
    title : str
        Always seen.
    body : str
        HTML seen after a click, and in print.
    """
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def duration(seconds: float) -> str:
    """Seconds as people say them.

    Parameters
    ----------
    seconds : float
        At least 0.

    Examples
    --------
    >>> duration(0.42), duration(181), duration(7500)
    ('0.4 s', '3 min 1 s', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def without_folders(text: str) -> str:
    """The text with absolute paths cut to their file names: a report travels, folders tell whose machine it was.

    Parameters
    ----------
    text : str
        Such as the message of an error.

    Examples
    --------
    >>> without_folders("/home/ann/data/case_1.nii.gz: 3 and/or 4")
    'case_1.nii.gz: 3 and/or 4'
    >>> without_folders(r"D:\\Ann Smith\\knee.nii and /Users/Ann Smith/hip.nii")
    'knee.nii and hip.nii'
    """
    return FOLDERS.sub("", text)


def _cell(found: Cell, *, first: bool) -> str:
    key = "" if found.key is None else f' data-key="{escape(str(found.key))}"'
    if first:
        return f'<th scope="row"{key}>{escape(found.text)}</th>'
    bar = "" if found.share is None else f' class="bar" style="--share:{100 * found.share:.1f}%"'
    return f"<td{key}{bar}>{escape(found.text)}</td>"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        lines = [f"{escape(str(k))} <b>{escape(plain(v))}</b>" for k, v in value.items()]
    elif isinstance(value, list) and all(isinstance(v, str) for v in value):
        lines = [escape(plain(v)) for v in value]
    else:
        lines = [escape(plain(value))]
    shown = "<br>".join(lines) or ABSENT
    return f'<div class="columns">{shown}</div>' if len(lines) > 6 else shown


def plain(value: Any) -> str:
    """Anything that JSON holds, on one line.

    Parameters
    ----------
    value : any
        Number, text, list or mapping.
    """
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return " x ".join(plain(v) for v in value) if len(value) <= 4 else ", ".join(plain(v) for v in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    return without_folders(str(value))
