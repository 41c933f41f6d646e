"""Durations and sizes as people type them."""

from __future__ import annotations

import re

from fewscan.errors import ConfigError

SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
BYTES = {"": 1, "B": 1}
BYTES |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
BYTES |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}
BYTES |= {letter: 1024**power for power, letter in enumerate("KMGT", start=1)}
NUMBER = r"\d+(?:\.\d+)?"


def duration(text: str) -> float:
    """Seconds in a duration; a bare number means seconds.

    Parameters
    ----------
    text : str
        Such as "90s", "10m", "1h30m" or "2.5h".

    Raises
    ------
    ConfigError
        If it is no duration, or zero.

    Examples
    --------
    >>> duration("1h30m"), duration("90"), duration("0.5m")
    (5400.0, 90.0, 30.0)
    """
    wanted = text.strip().lower()
    parts = re.findall(rf"({NUMBER})([dhms])", wanted)
    if re.fullmatch(NUMBER, wanted):
        parts = [(wanted, "s")]
    elif "".join(number + unit for number, unit in parts) != wanted:
        parts = []
    seconds = sum(float(number) * SECONDS[unit] for number, unit in parts)
    if seconds <= 0:
        raise ConfigError(f"a duration must look like 90s, 10m or 1h30m and be above zero, got {text!r}")
    return seconds


def size(text: str) -> int:
    """Bytes in a size; a bare number means bytes.

    Parameters
    ----------
    text : str
        Such as "4GiB", "800MB" or "4G" (read as GiB).

    Raises
    ------
    ConfigError
        If it is no size, or zero.

    Examples
    --------
    >>> size("4GiB"), size("800MB"), size("1.5 G")
    (4294967296, 800000000, 1610612736)
    """
    match = re.fullmatch(rf"({NUMBER})\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): count for unit, count in BYTES.items()}
    count = units.get(match[2].lower()) if match else None
    amount = int(float(match[1]) * count) if match and count else 0
    if amount < 1:
        raise ConfigError(f"a size must look like 4GiB or 800MB and be above zero, got {text!r}")
    return amount


def show_duration(seconds: float) -> str:
    """A duration in at most two units, for people.

    Parameters
    ----------
    seconds : float
        Not negative.

    Examples
    --------
    >>> show_duration(8.26), show_duration(95), show_duration(5400), show_duration(200_000)
    ('8 s', '1 min 35 s', '1 h 30 min', '2 d 7 h')
    """
    left = round(seconds)
    for unit, smaller, length, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if left >= length:
            rest = left % length // part
            return f"{left // length} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{left} s"
