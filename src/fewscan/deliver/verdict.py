"""What a run amounts to, in sentences; the words are chosen by the thresholds in `WORDS`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fewscan.deliver.markup import number
from fewscan.judge.results import Evaluation

WORDS = ((0.9, "closely"), (0.8, "well"), (0.7, "roughly"), (0.0, "in part only"))
"""Mean Dice from which predicted and reference outlines are said to agree so."""

FEW = " So few scans make even that interval too narrow."


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
    count = evaluation.spread("dice")["n"]
    scans = "one scan" if count == 1 else f"{count} scans"
    return f"Prediction and reference agree {word} on {scans}: Dice {number(dice)}."


def remarks(
    evaluation: Evaluation | None, check: Mapping[str, Any] | None, *, model: Mapping[str, Any] | None = None
) -> list[str]:
    """What else to know before using the result, most telling first.

    Parameters
    ----------
    evaluation : Evaluation, optional
        None when nothing was judged.
    check : mapping, optional
        Content of ``check.json``.
    model : mapping, optional
        Content of ``model.json``; its ``labelled`` names the cases trained on.
    """
    found = [] if evaluation is None or not evaluation.cases else _judged(evaluation)
    listed = (model or {}).get("labelled")
    trained = {str(case) for case in listed} if isinstance(listed, list) else set()
    if evaluation is not None and (seen := sum(case.id in trained for case in evaluation.cases)):
        said = "was trained on: its figures say" if seen == 1 else "were trained on: their figures say"
        found.insert(0, f"{seen} of these scans {said} nothing about new ones.")
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
        found = ["Too few scans to say how far this carries to the next one: an interval needs at least 3 patients."]
    else:
        found = [
            f"With these {dice['n']} scans the mean Dice is uncertain: 95 % interval {number(dice['low'])} to "
            f"{number(dice['high'])}." + (FEW if dice["n"] < 10 else "")
        ]
    if distance["mean"] is not None:
        apart = " (missed structures not counted)" if summary["missed"] else ""
        distance_mm = number(distance["mean"], 1)
        found.append(f"On average 95 % of the outline lies within {distance_mm} mm of the other one{apart}.")
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
