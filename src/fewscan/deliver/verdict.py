"""What a run amounts to, in sentences; the words are chosen by the thresholds in `WORDS`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fewscan.deliver.markup import number
from fewscan.deliver.records import dropped, failed, figure, folding, part, parts
from fewscan.judge.results import Evaluation
from fewscan.space import affine

WORDS = ((0.9, "closely"), (0.8, "well"), (0.7, "roughly"), (0.0, "in part only"))
"""Mean Dice from which predicted and reference outlines are said to agree so."""

EXTREME = 5.0
"""Local change of volume beyond which a registration is doubted."""

FEW = " So few scans make even that interval too narrow."


def headline(evaluation: Evaluation | None, *, trained: bool, segments: bool = True, predicted: int = 0) -> str:
    """The one sentence to take away.

    Parameters
    ----------
    evaluation : Evaluation, optional
        None when nothing was judged.
    trained : bool
        Whether there is a model.
    segments : bool
        Whether it has a segmenter, or registers only.
    predicted : int
        How many scans were segmented.
    """
    dice = math.nan if evaluation is None else evaluation.spread("dice")["mean"]
    if evaluation is None or math.isnan(dice):
        if trained and not segments:
            return "A registration network was trained. How well it registers has not been measured yet."
        if trained:
            return "A model was trained. How good it is has not been measured yet."
        if predicted:
            scans = "One scan was" if predicted == 1 else f"{predicted} scans were"
            return f"{scans} segmented. How well has not been measured yet."
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
    if part(model or {}, "guard").get("kept") == "apart":
        found.append("Unlabelled scans taught the segmenter nothing good: the one from before was kept; see Training.")
    scans = part(model or {}, "scans")
    if scans.get("help") is False and "seen" in scans:
        why = (
            "longer training on the drawn labels promised more" if "unseen" in scans else "it did not fit the drawn yet"
        )
        found.append(f"The segmenter learnt nothing from unlabelled scans: {why}.")
    moved = part(model or {}, "transfer")
    if moved.get("kept") == "base" and part(moved, "shared").get("lost"):
        found.append("Adapting cost Dice on labels that were known before: the model before was kept; see Transfer.")
    elif moved.get("kept") == "base":
        found.append(
            "The new scans taught the model nothing that could be shown: the one before was kept; see Transfer."
        )
    elif moved:
        before, after = figure(moved, "base"), figure(moved, "adapted")
        if moved.get("by") == "cross-validation":
            found.append(f"Adapting raised the cross-validated Dice from {number(before)} to {number(after)}.")
        else:
            found.append("Nothing shows yet that adapting helps on other patients: label a second one; see Transfer.")
    if evaluation is None and (model or {}).get("segments") is False:
        found.append("To measure it, run `fewscan register` with --model on two labelled scans.")
    elif evaluation is None:
        found.append("To measure it, predict scans that have a reference and run `fewscan evaluate`.")
    return found


def registered(record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Headline and remarks of a registration.

    Parameters
    ----------
    record : mapping
        Content of ``registration.json``.
    """
    likeness, dice = part(record, "similarity"), part(part(record, "dice"), "mean")
    pairs = {
        "mean Dice": (figure(dice, "before"), figure(dice, "after")),
        "likeness": (figure(likeness, "before"), figure(likeness, "after")),
    }
    told = [_changed(name, *pair) for name, pair in pairs.items() if all(map(math.isfinite, pair))]
    share = figure(record, "folding")
    if math.isfinite(share):
        told.append("nothing folds" if share == 0 else f"{folding(share)} of the voxels fold")
    said = ", ".join([*told[:-1], f"and {told[-1]}"]) if told[2:] else " and ".join(told) or "two scans were registered"
    found = []
    if pairs["likeness"][1] <= pairs["likeness"][0]:
        found.append("The scans did not become more alike: do not use this registration.")
    found += _overlaps(record) + _scaled(record)
    if lost := record.get("lost_labels"):
        found.append(
            f"Not on the fixed scan, because they lie beyond it or are smaller than its voxels: {', '.join(lost)}."
        )
    if share > 0:
        found.append("Where the map folds it turns space inside out: trust neither labels nor volumes there.")
    change = part(record, "volume_change")
    small, large = figure(change, "smallest"), figure(change, "largest")
    if small < 1 / EXTREME or large > EXTREME:
        found.append(
            f"Volumes change more than {EXTREME:.0f}-fold in places, by factors of {number(small, 3)} to "
            f"{number(large, 1)}: look at the map of volumes, and doubt what was measured there."
        )
    return said[0].upper() + said[1:] + ".", found


def drafted(record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Headline and remarks of drafted labels.

    Parameters
    ----------
    record : mapping
        Content of ``draft.json``.
    """
    every, judged = parts(record, "cases"), part(record, "leave_one_out")
    lost = failed(every)
    cases = {name: case for name, case in every.items() if name not in lost}
    dice, low, high = (figure(judged, key) for key in ("dice", "low", "high"))
    count = figure(judged, "n")
    said = f"Labels were drafted for {_count(len(cases), 'scan')}"
    found = ["Correct the drafts before you train on them."] if cases else []
    if missed := len(lost) + len(part(judged, "failed")):
        found.append(f"{_count(missed, 'scan')} could not be drafted; see Drafts.")
    if not math.isfinite(dice):
        if not part(judged, "failed"):
            found.append("A figure takes a second labelled scan, of another patient; until then look at each draft.")
        return f"{said}. Nothing tells yet how good they are.", found
    if math.isfinite(low):
        found.append(
            f"On {count:.0f} labelled scans the mean Dice is uncertain: 95 % interval {number(low)} to {number(high)}."
            + (FEW if count < 10 else "")
        )
    else:
        found.append("Too few labelled scans to say how far this carries: an interval needs at least 3 patients.")
    if len(cases) > 1:
        least = min(cases, key=lambda name: figure(cases[name], "sure"))
        sure = number(figure(cases[least], "sure"), 0, percent=True)
        found.append(f"Look first at {least}: the vote was least sure there, {sure} on average.")
    if gone := sum(bool(dropped(case)) for case in cases.values()):
        found.append(f"On {_count(gone, 'scan')} an atlas did not fit and had no vote; see Drafts.")
    return f"{said}. Labelled ones, drafted the same way, reach Dice {number(dice)}.", found


def _scaled(record: Mapping[str, Any]) -> list[str]:
    """Doubts about an affine part that no two people of one kind need."""
    try:
        matrix = np.array(record["matrix"], float)
        if affine.plausible(matrix):
            return []
        scale = float(np.linalg.det(matrix[:3, :3]))
    except (KeyError, TypeError, ValueError, IndexError, np.linalg.LinAlgError):  # damaged: other parts say so
        return []
    return [
        f"The affine part changes volumes by a factor of {number(scale, 3)}: do both headers give their voxels in mm, "
        "and do both scans show the same part of the body?"
    ]


def _changed(name: str, before: float, after: float) -> str:
    how = "rises" if after > before else "falls" if after < before else "stays"
    return f"{name} {how} from {number(before)} to {number(after)}"


def _overlaps(record: Mapping[str, Any]) -> list[str]:
    """What the overlap of structures says of a registration."""
    labels = {name: figure(row, "after") for name, row in parts(part(record, "dice"), "labels").items()}
    if not labels:
        return ["Likeness alone can deceive. Labels of both scans would show whether structures meet."]
    weakest = min(labels, key=lambda name: labels[name])
    found = [f"Look first at {weakest}: Dice {number(labels[weakest])}."] if len(labels) > 1 else []
    before = {name: figure(row, "before") for name, row in parts(part(record, "dice"), "labels").items()}
    worse = [name for name in labels if labels[name] < before[name]]
    if worse:
        overlap = "overlaps" if len(worse) == 1 else "overlap"
        found.append(f"{_count(len(worse), 'structure')} {overlap} less than before: {', '.join(worse[:5])}.")
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
    unmatched = sum(len(evaluation.unmatched.get(key, ())) for key in ("predictions", "references"))
    if bundles := evaluation.unmatched.get("bundles"):
        found.append(f"{_count(len(bundles), 'bundle')} of the reference predicted in no case: not judged.")
    if cases := evaluation.unmatched.get("cases"):
        found.append(f"{_count(len(cases), 'case')} with no bundle to compare: not judged.")
    if ends := evaluation.unmatched.get("ends"):
        found.append(f"No ends predicted in {_count(len(ends), 'case')} whose reference has them: not judged.")
    if unmatched:
        found.append(f"{_count(unmatched, 'file')} without a counterpart: not judged.")
    return found


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
