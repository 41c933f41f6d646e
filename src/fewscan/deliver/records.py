"""What JSON records say, whatever their state: numbers and parts that may be missing, and figures in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewscan.data.bundles import SEGMENTATIONS
from fewscan.deliver.markup import ABSENT, number
from fewscan.naming import BEFORE

OF_BEFORE = (
    f"Of scans marked ({BEFORE}) the Dice expected is that of the model's own answer, which lies in {BEFORE}/, not of "
    "the personalised one."
)


def figure(found: Mapping[str, Any], key: str) -> float:
    """A number; NaN where there is none.

    Parameters
    ----------
    found : mapping
        From JSON.
    key : str
        Its name.

    Examples
    --------
    >>> figure({"dice": 0.5}, "dice"), figure({"dice": None}, "dice")
    (0.5, nan)
    """
    value = found.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def part(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping; an empty one where there is none.

    Parameters
    ----------
    found : mapping
        From JSON.
    key : str
        Its name.
    """
    value = found.get(key)
    return value if isinstance(value, Mapping) else {}


def parts(found: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
    """The mappings inside a mapping, by name.

    Parameters
    ----------
    found : mapping
        From JSON.
    key : str
        Its name.
    """
    return {str(name): row for name, row in part(found, key).items() if isinstance(row, Mapping)}


def folding(share: float) -> str:
    """Share of folded voxels in words.

    Parameters
    ----------
    share : float
        0 to 1; NaN when unknown.

    Examples
    --------
    >>> folding(0), folding(0.00001), folding(0.0213)
    ('none', 'under 0.01 %', '2.13 %')
    """
    if not math.isfinite(share):
        return ABSENT
    return "none" if share == 0 else "under 0.01 %" if share < 1e-4 else number(share, 2, percent=True)


def dropped(case: Mapping[str, Any]) -> dict[str, str]:
    """Atlases that had no vote on a drafted case, and why.

    Parameters
    ----------
    case : mapping
        One of a draft record's ``cases``.
    """
    return {
        name: str(row["reason"]) if "reason" in row else f"{number(figure(row, 'folding'), 1, percent=True)} folded"
        for name, row in parts(case, "atlases").items()
        if row.get("voted") is False
    }


def failed(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Scans that could not be drafted, and why.

    Parameters
    ----------
    cases : mapping of str to mapping
        A draft record's ``cases``.
    """
    return {name: str(row["failed"]) for name, row in cases.items() if "failed" in row}


def mean(row: Mapping[str, Any]) -> float:
    """Mean of the numbers in a row; NaN without any.

    Parameters
    ----------
    row : mapping
        From JSON.
    """
    known = [value for key in row if math.isfinite(value := figure(row, key))]
    return sum(known) / len(known) if known else math.nan


def plain_name(name: str) -> bool:
    """Whether a record names a file in its own folder.

    Parameters
    ----------
    name : str
        As recorded.

    Examples
    --------
    >>> plain_name("case_1.nii.gz"), plain_name("../case_1.nii.gz"), plain_name("..")
    (True, False, False)
    """
    return bool(name) and Path(name).name == name and name != ".." and "\\" not in name


def place_of(prediction: Mapping[str, Any]) -> Path | None:
    """Where the file of a prediction lies, or its folder of masks, in that of its record; None where it is not there.

    Parameters
    ----------
    prediction : mapping
        A row of ``predictions.json``.

    Examples
    --------
    >>> place_of({"path": "case_1.nii.gz"}) == Path("case_1.nii.gz"), place_of({"path": "/elsewhere/case_1.nii.gz"})
    (True, None)
    """
    place = Path(str(prediction.get("path", "")))
    inside = place.parent if place.name == SEGMENTATIONS else place
    return place if plain_name(str(inside)) else None


def expected_of(name: str, expected: Mapping[str, Any]) -> str:
    """Name of a scan beside what is expected of it, marked where that is of the model's own answer, not the one kept.

    Parameters
    ----------
    name : str
        Of the scan.
    expected : mapping
        That of a row of ``predictions.json``.

    Examples
    --------
    >>> expected_of("case_1", {"labels": {}, "of": "before"}), expected_of("case_1", {"labels": {}})
    ('case_1 (before)', 'case_1')
    """
    return f"{name} ({BEFORE})" if expected.get("of") == BEFORE else name


def personalised(prediction: Mapping[str, Any]) -> str:
    """What personalisation changed or why not, on one line; empty where it was not asked.

    Parameters
    ----------
    prediction : mapping
        A row of ``predictions.json``.

    Examples
    --------
    >>> row = {"personalized": {"kept": "after", "reason": "atlases and scan fit each other"}}
    >>> personalised(row | {"before": {"voxels_changed": 0.031}})
    'personalised: 3.1 % of the labelled voxels changed, atlases and scan fit each other'
    >>> personalised(row | {"before": {"voxels_changed": 0.00003}})
    'personalised: less than 0.1 % of the labelled voxels changed, atlases and scan fit each other'
    """
    verdict = part(prediction, "personalized")
    if not verdict:
        return ""
    reason = str(verdict.get("reason", ""))
    if verdict.get("kept") != "after":
        return f"not personalised: {reason}"
    share = figure(part(prediction, "before"), "voxels_changed")
    if not math.isfinite(share):  # older records do not say
        return f"personalised: {reason}"
    some = "less than 0.1 %" if share < 5e-4 else number(share, 1, percent=True)  # which rounds to 0.1 % from there on
    much = "no voxel" if share == 0 else f"{some} of the labelled voxels"
    return f"personalised: {much} changed, {reason}"
