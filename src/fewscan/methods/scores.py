"""Dice of two models on the same labelled cases, by label and by patient: what speaks for or against a change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fewscan.data.painting import plain_name
from fewscan.judge.metrics import dice
from fewscan.judge.statistics import mean_pair, over_patients
from fewscan.learn import grafting, infer
from fewscan.learn.answers import Segmented
from fewscan.learn.checkpoint import Model
from fewscan.learn.hardware import Hardware
from fewscan.space.volume import IGNORE, Case

LOST = 0.02  # Dice that may be lost: on the labels known before, and between the answers to a scan and a disturbed copy
LOST_ONE = 0.05  # ... of a single known label, whose mean over few patients tells less

Scores = dict[str, dict[str, float]]  # case to label to Dice


def score(model: Model, case: Case, *, hardware: Hardware) -> dict[str, float]:
    """Dice of each label of a case that occurs in it or in the model's answer; labels belong together by name.

    Parameters
    ----------
    model : Model
        Whose channels the case has.
    case : Case
        Labelled.
    hardware : Hardware
        Where to predict.

    Raises
    ------
    ModelError
        If the case lacks a channel of the model.
    """
    image = grafting.arranged(case.image, model.plan, case=case.id)
    answer = infer.segment(model, image, predictor=infer.torch_predictor(model, hardware))
    return score_answer(answer, case, model=model)


def score_answer(answer: Segmented, case: Case, *, model: Model) -> dict[str, float]:
    """As `score`, of an answer that is there already.

    Parameters
    ----------
    answer : Segmented
        Of the model, on the case's grid.
    case : Case
        Labelled.
    model : Model
        Whose labels the answer has.
    """
    assert case.label is not None
    numbers = {plain_name(name): value for value, name in model.names.items()}
    looked = case.label.data != IGNORE
    found = {}
    for value, name in case.label.names.items():
        if case.drawn is None or value in case.drawn:
            number = numbers.get(plain_name(name))
            mask = np.zeros(looked.shape, bool) if number is None else answer.mask(number, model.plan) & looked
            if not np.isnan(overlap := dice(mask, case.label.mask(value))):
                found[name] = overlap
    return found


def shared_labels(
    base: Model, labels: Mapping[str, Mapping[str, float]], *, before: Scores, after: Scores, whose: Mapping[str, str]
) -> dict[str, Any]:
    """Whether labels that the trained model knows lost too much: their mean where there are others, and each of them.

    What is new is won from 0 and must not hide a loss, and neither must one label hide that of another. A single label
    is lost where more patients lose than gain of it: one false voxel in one of many is no sign.

    Parameters
    ----------
    base : Model
        The trained one.
    labels : mapping of str to mapping
        From `by_label`.
    before, after : mapping of str to mapping
        Dice by case and label.
    whose : mapping of str to str
        Patient of each case.
    """
    known = {plain_name(name) for name in base.names.values()}
    shared = {name for name in labels if plain_name(name) in known}
    below = [name for name in sorted(shared) if labels[name]["adapted"] < labels[name]["base"] - LOST_ONE]
    worse = [name for name in below if _more_lose(name, before=before, after=after, whose=whose)]
    found: dict[str, Any] = {"worse": worse} if worse else {}
    if shared and shared != labels.keys():
        rows = []
        for case in before:
            one, other = ({n: row[case][n] for n in shared & row[case].keys()} for row in (before, after))
            rows += [(whose[case], *paired(one, other))] if one or other else []  # else none of them was looked for
        means = before_and_after(rows)
        found |= {"labels": sorted(shared), **means}
    lost = "base" in found and found["adapted"] < found["base"] - LOST
    return found | ({"lost": bool(lost or worse)} if found else {})


def _more_lose(name: str, *, before: Scores, after: Scores, whose: Mapping[str, str]) -> bool:
    """Whether a label is worse in more patients than it is better in."""
    changes: dict[str, float] = {}
    for case in before:
        if name in before[case] | after[case]:
            change = after[case].get(name, 1.0) - before[case].get(name, 1.0)
            changes[whose[case]] = changes.get(whose[case], 0.0) + change
    return sum(value < 0 for value in changes.values()) > sum(value > 0 for value in changes.values())


def said_of(shared: Mapping[str, Any]) -> str:
    """What became of the labels that the trained model knows, in words.

    Parameters
    ----------
    shared : mapping
        From `shared_labels`.
    """
    told = ""
    if "base" in shared:
        told += f"; on the labels known before {shared['base']:.3f} before, {shared['adapted']:.3f} adapted"
        told += f", where no more than {LOST:g} may be lost for new ones" if shared["lost"] else ""
    if worse := shared.get("worse"):
        told += f"; {', '.join(worse)} lost more than {LOST_ONE:g}"
    return told + (" (--set transfer.guard=false keeps the adapted one)" if shared.get("lost") else "")


def by_label(before: Scores, after: Scores, *, whose: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Mean Dice of each label by both models, over patients.

    Parameters
    ----------
    before, after : mapping of str to mapping
        Dice by case and label.
    whose : mapping of str to str
        Patient of each case.
    """
    found: dict[str, list[tuple[str, float, float]]] = {}
    for case in before:
        for name in before[case] | after[case]:
            found.setdefault(name, []).append((whose[case], before[case].get(name, 1.0), after[case].get(name, 1.0)))
    return {name: before_and_after(rows) for name, rows in found.items()}


def before_and_after(rows: Sequence[tuple[str, float, float]]) -> dict[str, float]:
    """Mean before and after over patients, each the mean of its scans: one with many has no more say than others.

    Parameters
    ----------
    rows : sequence of tuple
        Patient, and a scan's Dice by both models; at least one.
    """
    base, adapted = mean_pair(over_patients(rows))
    return {"base": base, "adapted": adapted}


def paired(one: Mapping[str, float], other: Mapping[str, float]) -> tuple[float, float]:
    """Mean Dice of a case by two models. A label that only the other's row has is rightly absent: 1, as `mean_dice`.

    Parameters
    ----------
    one, other : mapping of str to float
        Dice by label.
    """
    names = one.keys() | other.keys()
    first, second = (float(np.mean([row.get(n, 1.0) for n in names])) if names else 1.0 for row in (one, other))
    return first, second


def trained_on(provenance: Mapping[str, Any], *, before: bool = False) -> set[str]:
    """Names of the cases that a model's segmenter has learnt from.

    Parameters
    ----------
    provenance : mapping
        Of the model.
    before : bool
        Of a transferred model, those of the models it came from; otherwise those of its last population, none where
        the model that it started from was kept.
    """
    record = provenance.get("transfer")
    if not isinstance(record, Mapping):
        return set(map(str, provenance.get("labelled", ())))
    if not before:
        return set(map(str, provenance.get("labelled", ()))) if record.get("kept") == "adapted" else set()
    found, came = set[str](), record.get("from")
    while isinstance(came, Mapping):
        found |= {str(name) for name in came.get("labelled") or ()}
        came = came.get("from")
    return found


def ever_trained_on(provenance: Mapping[str, Any]) -> set[str]:
    """Names of the cases that a model, or one that it came from, has learnt from.

    Parameters
    ----------
    provenance : mapping
        Of the model.
    """
    return trained_on(provenance) | trained_on(provenance, before=True)
