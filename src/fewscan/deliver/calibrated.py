"""The part of the report on what a cross-validation taught of Dice without a reference: expected against measured."""

from __future__ import annotations

from html import escape

from fewscan.deliver import charts
from fewscan.deliver.sections import Run
from fewscan.errors import DataError
from fewscan.judge.confidence import FILE, WANTED, promise, read_calibration


def calibration(run: Run) -> str:
    """Expected against measured Dice of the scans that were left out, and by how much the two differ.

    Parameters
    ----------
    run : Run
        Shown when its folder holds a calibration.
    """
    if not (run.directory / FILE).is_file():
        return ""
    try:
        known = read_calibration(run.directory / FILE)
    except DataError as error:
        return f'<p class="hint">{escape(FILE)}: {escape(str(error))}</p>'
    chart = charts.agreement(known.held_out, labels=("expected Dice", "measured Dice"))
    widths = list(known.widths.values()) or [known.widest]
    level = min(width.level for width in widths)
    few = " So few patients allow no more." if level < WANTED else ""
    held = f" Of such patients the range of a label is to hold {promise(level)}.{few}"
    if known.missed:
        held += f" Labels that were not found, {known.missed}, are no dot and have no range; 0 is expected of them."
    return (
        f'<div>{chart}<p class="hint">A dot is a label of a scan that was left out with all scans of its patient, both '
        "when the model was trained and when expectations were learnt; on the line both agree. They differ by "
        f"{known.error:.3f} on average over {known.patients} patients.{held}</p></div>"
    )
