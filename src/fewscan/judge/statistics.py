"""How sure a mean is, and whether two runs differ; exact or resampled, never by assuming a distribution."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two runs on the same patients.

    Parameters
    ----------
    difference : float
        Mean of the first minus the second.
    low, high : float
        Bootstrap interval of the difference; NaN below 3 pairs.
    p : float
        Two-sided Wilcoxon signed-rank test.
    n : int
        Pairs in which both runs have a value.
    wins, losses : int
        Pairs in which the first is larger, or smaller.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int
    wins: int
    losses: int


def bootstrap_interval(
    values: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 5000,
) -> Interval:
    """Percentile bootstrap interval of the mean; (NaN, NaN) below 3 groups, which say nothing of their spread.

    Whole groups are drawn, and each brings all of its values, for the two knees of one patient are not independent.

    Parameters
    ----------
    values : sequence of float
        One per case; NaN are left out.
    groups : sequence of hashable, optional
        The patient of each value; None takes each value for a patient of its own.
    level : float
        Share of resampled means inside.
    seed : int
        Of the resampling.
    resamples : int
        How many.

    Examples
    --------
    >>> bootstrap_interval([0.8, 0.8, 0.8])
    (0.8, 0.8)
    >>> bootstrap_interval([0.8, 0.9])
    (nan, nan)
    >>> bootstrap_interval([0.8, 0.9, 0.7, 0.6], groups=["ann", "ann", "bob", "bob"])
    (nan, nan)
    """
    members: dict[Hashable, list[float]] = {}
    for group, value in zip(range(len(values)) if groups is None else groups, values, strict=True):
        if math.isfinite(value):
            members.setdefault(group, []).append(value)
    if len(members) < 3:
        return math.nan, math.nan
    total = np.array([math.fsum(mine) for mine in members.values()])
    count = np.array([len(mine) for mine in members.values()])
    drawn = np.random.default_rng(seed).integers(0, len(members), (resamples, len(members)))
    means = total[drawn].sum(1) / count[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return round(float(low), 12), round(float(high), 12)  # the mean of equal values is that value


def over_patients(rows: Iterable[tuple[Hashable, float, float]]) -> list[tuple[float, float]]:
    """Both values of each patient, the means of the patient's cases: one with many has no more say than others.

    Parameters
    ----------
    rows : iterable of (patient, float, float)
        A case's patient, and its value in both runs.

    Examples
    --------
    >>> over_patients([("a", 1.0, 0.0), ("a", 0.0, 0.0), ("b", 0.25, 0.5)])
    [(0.5, 0.0), (0.25, 0.5)]
    """
    patients: dict[Hashable, list[tuple[float, float]]] = {}
    for patient, one, other in rows:
        patients.setdefault(patient, []).append((one, other))
    return [mean_pair(pairs) for pairs in patients.values()]


def patient_means(rows: Iterable[tuple[Hashable, float]]) -> list[float]:
    """One value of each patient, the mean of the patient's finite ones; none of a patient who has none.

    Parameters
    ----------
    rows : iterable of (patient, float)
        A case's patient and its value.

    Examples
    --------
    >>> patient_means([("a", 1.0), ("a", 0.0), ("b", 0.25), ("c", math.nan)])
    [0.5, 0.25]
    """
    return [value for value, _ in over_patients((who, v, v) for who, v in rows if math.isfinite(v))]


def mean_pair(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Means of the first and of the second values.

    Parameters
    ----------
    pairs : sequence of (float, float)
        At least one.
    """
    one, other = (math.fsum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return one, other


def paired_test(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare two runs pair by pair.

    Parameters
    ----------
    a, b : sequence of float
        One value per patient, in one order; pairs with a NaN are left out.

    Raises
    ------
    ValueError
        If the lengths differ.

    Examples
    --------
    >>> found = paired_test([0.9, 0.8, 0.9, 0.7, 0.9], [0.8, 0.6, 0.5, 0.2, 0.3])
    >>> found.wins, found.losses, round(found.p, 4)
    (5, 0, 0.0625)
    """
    if len(a) != len(b):
        raise ValueError(f"a paired test needs one value of each run per patient, got {len(a)} and {len(b)}")
    difference = _finite(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    low, high = bootstrap_interval(difference.tolist())
    return Paired(
        difference=float(difference.mean()) if difference.size else math.nan,
        low=low,
        high=high,
        p=signed_rank_p(difference.tolist()),
        n=int(difference.size),
        wins=int((difference > 0).sum()),
        losses=int((difference < 0).sum()),
    )


def signed_rank_p(difference: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, exact also with ties; zeros are dropped.

    The distribution of the rank sum under random signs is built one rank at a time, over doubled mid-ranks so that
    they are whole numbers.

    Parameters
    ----------
    difference : sequence of float
        One per pair; NaN when there is none.

    References
    ----------
    Wilcoxon F., Individual comparisons by ranking methods, 1945, doi 10.2307/3001968.
    """
    d = _finite(difference)
    if not d.size:
        return math.nan
    d = d[d != 0]
    if not d.size:
        return 1.0
    size, where = np.unique(np.abs(d).round(12), return_inverse=True)
    count = np.bincount(where, minlength=size.size)
    doubled = (2 * np.cumsum(count) - count + 1)[where]  # twice the mid-rank
    chance = np.ones(1)
    for rank in doubled:
        longer = np.zeros(chance.size + rank)
        longer[: chance.size] += chance / 2
        longer[rank:] += chance / 2
        chance = longer
    below = int(doubled[d > 0].sum())
    tail = min(chance[: below + 1].sum(), chance[below:].sum())
    return float(min(1.0, 2 * tail))


def _finite(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    return x[np.isfinite(x)]
