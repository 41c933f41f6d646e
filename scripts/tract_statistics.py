"""Losses of the twins and what adaptation recovers of them, with paired intervals over subjects.

Every figure is of subjects: a subject's Dice is the mean over its bundles, then over draws, and whole subjects are
resampled. Losses are differences of twins of one person, after one model of the healthy:

* systematic: A healthy less B healthy, what the scanner costs;
* tumour: B healthy less B with tumour, what the tumour costs there;
* interaction: the tumour's cost under A less its cost under B.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fewscan.judge.statistics import Paired, bootstrap_interval, paired_test

TWINS = ("A_healthy", "A_tumour", "B_healthy", "B_tumour")
LOSSES: Mapping[str, Mapping[str, int]] = {  # sign of each twin
    "systematic": {"A_healthy": 1, "B_healthy": -1},
    "tumour": {"B_healthy": 1, "B_tumour": -1},
    "interaction": {"A_healthy": 1, "A_tumour": -1, "B_healthy": -1, "B_tumour": 1},
    "total": {"A_healthy": 1, "B_tumour": -1},
}
EDGES_MM = (0.0, 1.0, 3.0, 6.0, math.inf)  # of true displacement
FAR_MM = 30.0  # of a bundle from a tumour's core, from which it should lose nothing
RESAMPLES = 5000

Row = dict[str, Any]
Bundles = dict[str, dict[str, list[float]]]  # subject to twin to the Dice of each bundle


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over subjects and its bootstrap interval; NaN where there is none.

    Parameters
    ----------
    value, low, high : float
        In Dice, or as a share.
    """

    value: float
    low: float
    high: float


def numbers(text: str) -> list[float]:
    """Figures as a row stores them; ``-`` is NaN.

    Parameters
    ----------
    text : str
        Separated by spaces.

    Examples
    --------
    >>> numbers("0.5 - 1")
    [0.5, nan, 1.0]
    """
    return [math.nan if word == "-" else float(word) for word in text.split()]


def mean(values: Iterable[float]) -> float:
    """Mean without NaN; NaN of nothing.

    Parameters
    ----------
    values : iterable of float
        Any number.
    """
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def chosen(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Rows with these values in their key.

    Parameters
    ----------
    rows : iterable of dict
        As the harness writes them.
    **wanted : object
        Name and value.
    """
    return [row for row in rows if all(row["key"].get(name) == value for name, value in wanted.items())]


def bundles_of(rows: Sequence[Row]) -> Bundles:
    """Dice of each bundle of each twin, the mean over rows that differ in their draw alone.

    Parameters
    ----------
    rows : sequence of dict
        One a draw.
    """
    people = [person for person in rows[0]["subjects"] if all(person in row["subjects"] for row in rows)]
    found: Bundles = {}
    for person in people:
        found[person] = {}
        for twin in rows[0]["subjects"][person]:
            draws = [numbers(row["subjects"][person][twin]) for row in rows]
            found[person][twin] = [mean(values) for values in zip(*draws, strict=True)]
    return found


def subjects(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mean over bundles of each subject and twin.

    Parameters
    ----------
    rows : sequence of dict
        One a draw.
    """
    return {p: {twin: mean(values) for twin, values in twins.items()} for p, twins in bundles_of(rows).items()}


def loss(twins: Mapping[str, float], kind: str) -> float:
    """One loss of one subject, or of one bundle of one.

    Parameters
    ----------
    twins : mapping of str to float
        Dice of each twin.
    kind : str
        A key of `LOSSES`.

    Examples
    --------
    >>> round(loss({"A_healthy": 0.9, "A_tumour": 0.8, "B_healthy": 0.7, "B_tumour": 0.5}, "interaction"), 3)
    -0.1
    """
    return math.fsum(sign * twins[twin] for twin, sign in LOSSES[kind].items())


def lost(rows: Sequence[Row], kind: str) -> Estimate:
    """A loss over subjects.

    Parameters
    ----------
    rows : sequence of dict
        One a draw.
    kind : str
        A key of `LOSSES`.
    """
    values = [loss(twins, kind) for twins in subjects(rows).values()]
    low, high = bootstrap_interval(values)
    return Estimate(value=mean(values), low=low, high=high)


def against(ours: Sequence[Row], theirs: Sequence[Row], *, twin: str) -> Paired:
    """Paired difference of two networks on one twin.

    Parameters
    ----------
    ours, theirs : sequence of dict
        One a draw.
    twin : str
        One of `TWINS`.
    """
    mine, others = subjects(ours), subjects(theirs)
    same = [person for person in mine if person in others]
    return paired_test([mine[p][twin] for p in same], [others[p][twin] for p in same])


def recovered(after: Sequence[Row], before: Sequence[Row], *, kind: str) -> Estimate:
    """Share of a loss that adaptation brings back.

    Of the systematic loss: how far B healthy has come up towards A healthy as it was before. Of the tumour loss: by how
    much the gap between B healthy and B with tumour has closed. One would be all of it; below zero, it has grown.

    Parameters
    ----------
    after, before : sequence of dict
        One a draw.
    kind : {"systematic", "tumour"}
        Which.
    """
    old, new = subjects(before), subjects(after)
    same = [person for person in new if person in old]
    if kind == "systematic":
        gained = [new[p]["B_healthy"] - old[p]["B_healthy"] for p in same]
    else:
        gained = [loss(old[p], kind) - loss(new[p], kind) for p in same]
    return ratio(gained, [loss(old[p], kind) for p in same])


def ratio(
    gained: Sequence[float], losses: Sequence[float], *, groups: Sequence[str] | None = None, seed: int = 0
) -> Estimate:
    """Sum over sum, whole groups resampled; all NaN where nothing was lost, no interval where that can be by chance.

    Parameters
    ----------
    gained, losses : sequence of float
        One a subject, or several.
    groups : sequence of str, optional
        Subject of each; each its own when left out.
    seed : int
        Of the resampling.

    Examples
    --------
    >>> ratio([0.1, 0.1, 0.1], [0.2, 0.2, 0.2])
    Estimate(value=0.5, low=0.5, high=0.5)
    >>> ratio([0.1, 0.1, 0.1], [0.0, 0.0, 0.0])
    Estimate(value=nan, low=nan, high=nan)
    """
    members: dict[object, list[tuple[float, float]]] = {}
    for name, *one in zip(range(len(losses)) if groups is None else groups, gained, losses, strict=True):
        members.setdefault(name, []).append((one[0], one[1]))
    sums = np.array([np.sum(mine, axis=0) for mine in members.values()]).reshape(-1, 2)
    total = sums.sum(0)
    if not total[1] > 0:
        return Estimate(value=math.nan, low=math.nan, high=math.nan)
    value = round(float(total[0] / total[1]), 12)
    picked = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    again = sums[picked].sum(1)
    if len(sums) < 3 or (again[:, 1] <= 0).any():
        return Estimate(value=value, low=math.nan, high=math.nan)
    low, high = np.quantile(again[:, 0] / again[:, 1], [0.025, 0.975])
    return Estimate(value=value, low=round(float(low), 12), high=round(float(high), 12))


@dataclass(frozen=True, kw_only=True)
class Tract:
    """One bundle of one test person.

    Parameters
    ----------
    person : str
        Whose.
    displacement_mm : float
        True mean displacement of the bundle by the tumour.
    from_core_mm : float
        Its distance from the core.
    before, after : float
        Tumour loss without and with adaptation.
    """

    person: str
    displacement_mm: float
    from_core_mm: float
    before: float
    after: float


def tracts(before: Sequence[Row], after: Sequence[Row], truth: Mapping[str, Mapping[str, Any]]) -> list[Tract]:
    """Tumour loss of each bundle of each person beside its true displacement; without bundles of which none is left.

    Parameters
    ----------
    before, after : sequence of dict
        One a draw.
    truth : mapping of str to mapping
        Of the row of the cohort.
    """
    old, new, found = bundles_of(before), bundles_of(after), []
    for person in (p for p in truth if p in old and p in new):
        moved, apart = (numbers(truth[person][name]) for name in ("displacement_mm", "from_core_mm"))
        lost_of = [
            [h - t for h, t in zip(of[person]["B_healthy"], of[person]["B_tumour"], strict=True)] for of in (old, new)
        ]
        for values in zip(moved, apart, *lost_of, strict=True):
            if all(map(math.isfinite, values)):
                mm, core, b, a = values
                found.append(Tract(person=person, displacement_mm=mm, from_core_mm=core, before=b, after=a))
    return found


def binned(found: Sequence[Tract]) -> list[tuple[float, float, list[Tract]]]:
    """Tracts by their displacement, between two `EDGES_MM`; without empty bins.

    Parameters
    ----------
    found : sequence of Tract
        From `tracts`.
    """
    bins = []
    for low, high in pairwise(EDGES_MM):
        inside = [tract for tract in found if low <= tract.displacement_mm < high]
        if inside:
            bins.append((low, high, inside))
    return bins


def far_target(before: Sequence[Row], truth: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Estimate:
    """Tumour loss of target bundles `FAR_MM` or more from the core: a control that must be about zero.

    Parameters
    ----------
    before : sequence of dict
        One a draw.
    truth : mapping of str to mapping
        Of the row of the cohort.
    names : sequence of str
        Bundles in the order of the figures.
    """
    dice, values = bundles_of(before), []
    for person, told in truth.items():
        place = list(names).index(told["target"])
        if person in dice and numbers(told["from_core_mm"])[place] >= FAR_MM:  # not where nothing is left: NaN
            values.append(dice[person]["B_healthy"][place] - dice[person]["B_tumour"][place])
    low, high = bootstrap_interval(values)
    return Estimate(value=mean(values), low=low, high=high)
