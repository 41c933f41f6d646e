"""What a run amounts to, in sentences; the words are chosen by the thresholds in `WORDS`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fewscan.deliver.markup import number
from fewscan.judge.results import Evaluation

WORDS = ((0.9, "closely"), (0.8, "well"), (0.7, "roughly"), (0.0, "in part only"))
"""Mean Dice from which predicted and reference outlines are said to agree so."""


def headline(evaluation: Evaluation | None, *, trained: bool) -> str:
    """The one sentence to take away.

    Parameters
    ----------
    evaluation : Evaluation, optional
        None when nothing was judged.
    trained : bool
        Whether there is a model.
    """
    dice = math.nan if evaluation is None else evaluation.spread("dice")["mean"]
    if evaluation is None or math.isnan(dice):
        if trained:
            return "A model was trained. How good it is has not been measured yet."
        return "What the data look like. Nothing was trained or measured yet."
    word = next(word for least, word in WORDS if dice >= least)
    count = len(evaluation.cases)
    scans = "one scan" if count == 1 else f"{count} scans"
    return f"Prediction and reference agree {word} on {scans}: Dice {number(dice)}."


def remarks(evaluation: Evaluation | None, check: Mapping[str, Any] | None) -> list[str]:
    """What else to know before using the result, most telling first.

    Parameters
    ----------
    evaluation : Evaluation, optional
        None when nothing was judged.
    check : mapping, optional
        Content of ``check.json``.
    """
    found = [] if evaluation is None or not evaluation.cases else _judged(evaluation)
    severities = [finding.get("severity") for finding in (check or {}).get("findings", [])]
    counts = [_count(n, severity) for severity in ("error", "warning") if (n := severities.count(severity))]
    if counts:
        found.append(f"The data check found {' and '.join(counts)}; see Data.")
    if evaluation is None:
        found.append("To measure it, predict scans that have a reference and run `fewscan evaluate`.")
    return found


def _judged(evaluation: Evaluation) -> list[str]:
    content = evaluation.to_json()
    summary, labels = content["summary"], content["labels"]
    dice, distance = summary["dice"], summary["hd95_mm"]
    if dice["low"] is None:
        found = ["Too few scans to say how far this carries to the next one: an interval needs at least 3."]
    else:
        found = [
            f"Over many more scans of this kind the mean Dice would lie between {number(dice['low'])} and "
            f"{number(dice['high'])} (95 % interval)."
        ]
    if distance["mean"] is not None:
        found.append(f"On average 95 % of the outline lies within {number(distance['mean'], 1)} mm of the other one.")
    ranked = evaluation.ranked()
    if len(ranked) > 1:
        found.append(f"Look first at {ranked[0].id}, the weakest: Dice {number(ranked[0].mean('dice'))}.")
    known = {name: row["dice"]["mean"] for name, row in labels.items() if row["dice"]["mean"] is not None}
    if len(known) > 1:
        hardest = min(known, key=lambda name: known[name])
        found.append(f"The hardest structure is {hardest}: Dice {number(known[hardest])}.")
    if summary["missed"]:
        found.append(f"{_count(summary['missed'], 'structure')} in the reference found no counterpart at all.")
    if summary["extra"]:
        found.append(f"{_count(summary['extra'], 'structure')} predicted where the reference has none.")
    unmatched = sum(len(ids) for ids in evaluation.unmatched.values())
    if unmatched:
        found.append(f"{_count(unmatched, 'file')} without a counterpart: not judged.")
    return found


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
