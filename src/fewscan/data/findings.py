"""What the examiners report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One fault, doubt or decision.

    Parameters
    ----------
    code : str
        Kind, e.g. ``"grid-differs"``.
    severity : {"error", "warning", "note"}
        An error keeps the data from being used for training.
    case : str
        Case id; empty when it concerns the whole data set.
    path : str
        File it concerns; may be empty.
    message : str
        What is so.
    remedy : str
        What to do.
    fixable : bool
        Whether `fewscan.data.repair.fix` can do it.
    held_out : bool
        Whether it would be an error if the case were trained on, and were not set apart or left out.
    """

    code: str
    severity: Severity
    case: str
    path: str
    message: str
    remedy: str
    fixable: bool = False
    held_out: bool = False
