"""How many more labels? Error against the number of labelled scans, as a power law, and what it says of more.

The error, 1 - Dice, is taken to be ``a + b k^-c`` of k labelled scans: a floor, and a part that labels take away
(Cortes et al. 1994, NeurIPS 6; Hestness et al. 2017, arXiv 1712.00409). For each ``c`` of a grid the best ``a`` and
``b``, neither below zero, are exact, so that no start has to be guessed. The interval comes of drawing the judged
patients anew. It says nothing of which scans happened to be labelled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fewscan.judge.looks import Array
from fewscan.judge.results import plain
from fewscan.judge.statistics import bootstrap_interval

SIZES, SPAN = 3, 2.0  # sizes, and largest over smallest, below which nothing is said
PATIENTS = 3  # below which there is no interval
RATES = np.geomspace(0.1, 2.0, 96)  # of c
RESAMPLES = 2000
FLAT = 0.005  # Dice to be gained by twice the labels below which no gain is said to be seen


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One scan that was judged.

    Parameters
    ----------
    labels : int
        Labelled scans that its model was trained on.
    case, patient : str
        Which.
    dice : float
        Mean over its labels.
    """

    labels: int
    case: str
    patient: str
    dice: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """Mean Dice at a number of labelled scans.

    Parameters
    ----------
    labels : int
        Labelled scans.
    dice, low, high : float
        Measured or expected, with a 95 % interval; NaN where there is none.
    scans : int
        Judged for it; 0 where it is expected.
    """

    labels: int
    dice: float
    low: float
    high: float
    scans: int = 0


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """What was measured at each size, the curve through it, and what it says of more labels.

    Parameters
    ----------
    measured : tuple of Point
        By size.
    expected : tuple of Point
        At the labels there are, at twice and at four times as many; empty where nothing can be said.
    floor, gain, rate : float
        Of the power law; NaN where none was fitted.
    sentence : str
        What to take away, or why nothing can be said.
    """

    measured: tuple[Point, ...]
    expected: tuple[Point, ...]
    floor: float
    gain: float
    rate: float
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; NaN becomes None."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def learning_curve(observations: Sequence[Observation], *, now: int, seed: int = 0) -> LearningCurve:
    """Fit the curve, where there is enough to fit it to.

    Parameters
    ----------
    observations : sequence of Observation
        Scans judged by models that had not seen them; those without a Dice are left out.
    now : int
        Labelled scans there are.
    seed : int
        Of the resampling.
    """
    rows = [row for row in observations if math.isfinite(row.dice)]
    sizes = sorted({row.labels for row in rows})
    measured = tuple(_measured(k, [row for row in rows if row.labels == k], seed=seed) for k in sizes)
    reason = _too_little(sizes)
    if reason:
        return LearningCurve(
            measured=measured, expected=(), floor=math.nan, gain=math.nan, rate=math.nan, sentence=reason
        )
    patients = sorted({row.patient for row in rows})
    sums, counts = np.zeros((len(patients), len(sizes))), np.zeros((len(patients), len(sizes)))
    for row in rows:
        place = patients.index(row.patient), sizes.index(row.labels)
        sums[place] += 1 - row.dice
        counts[place] += 1
    asked = [now, 2 * now, 4 * now]
    law = fit(np.array(sizes), sums.sum(0)[None], counts=counts.sum(0)[None])[0]
    best = _at(law[None], asked)[0]
    spread = _resampled(sizes, sums, counts, asked=asked, seed=seed)
    expected = tuple(
        Point(labels=k, dice=float(dice), low=float(low), high=float(high))
        for k, dice, (low, high) in zip(asked, best, spread, strict=True)
    )
    floor, gain, rate = law.tolist()
    return LearningCurve(
        measured=measured, expected=expected, floor=floor, gain=gain, rate=rate, sentence=_sentence(expected)
    )


def fit(sizes: Array, sums: Array, *, counts: Array) -> Array:
    """Floor, gain and rate (R, 3) of the power law with the least squared error over scans.

    Parameters
    ----------
    sizes : (K,) number
        Labelled scans.
    sums, counts : (R, K) float
        For each of R sets of scans, errors summed up at each size, and how many there are.

    Examples
    --------
    >>> k = np.array([1.0, 2, 4, 8])
    >>> error = 0.1 + 0.4 / k
    >>> [round(float(x), 2) for x in fit(k, error[None], counts=np.ones((1, 4)))[0]]
    [0.1, 0.4, 1.0]
    """
    x = sizes[None].astype(float) ** -RATES[:, None]  # (G, K)
    n, y = counts.sum(1)[:, None], sums.sum(1)[:, None]
    nx, nxx, xy = counts @ x.T, counts @ (x**2).T, sums @ x.T  # (R, G)
    slope = (n * xy - nx * y) / np.maximum(n * nxx - nx**2, 1e-12)
    floor = (y - slope * nx) / n
    steep = np.maximum(xy / np.maximum(nxx, 1e-12), 0)  # best where the floor is zero
    slope, floor = np.where(floor < 0, steep, slope), np.maximum(floor, 0)
    slope, floor = np.where(slope < 0, 0, slope), np.where(slope < 0, y / n, floor)
    cost = floor**2 * n + slope**2 * nxx + 2 * floor * slope * nx - 2 * floor * y - 2 * slope * xy
    best = cost.argmin(1)
    rows = np.arange(len(best))
    return np.stack([floor[rows, best], slope[rows, best], RATES[best]], 1)


def _measured(labels: int, rows: Sequence[Observation], *, seed: int) -> Point:
    values = [row.dice for row in rows]
    low, high = bootstrap_interval(values, groups=[row.patient for row in rows], seed=seed)
    return Point(labels=labels, dice=float(np.mean(values)), low=low, high=high, scans=len(rows))


def _too_little(sizes: Sequence[int]) -> str:
    said = ", ".join(map(str, sizes)) or "none"
    if len(sizes) < SIZES:
        return (
            f"Models of {len(sizes)} size(s) were judged ({said} labelled scans): with fewer than {SIZES} nothing can "
            "be said of more labels."
        )
    if sizes[-1] < SPAN * sizes[0]:
        return (
            f"The sizes judged ({said} labelled scans) are too close to say anything of more labels: the largest must "
            "be twice the smallest."
        )
    return ""


def _at(laws: Array, asked: Sequence[int]) -> Array:
    """Dice on each of R curves at each size, (R, N)."""
    floor, gain, rate = (laws[:, i, None] for i in range(3))
    dice: Array = np.clip(1 - floor - gain * np.array(asked, float)[None] ** -rate, 0, 1)
    return dice


def _resampled(
    sizes: Sequence[int], sums: Array, counts: Array, *, asked: Sequence[int], seed: int
) -> list[tuple[float, float]]:
    """Middle 95 % of the curves through patients drawn anew, at each size asked for."""
    people = len(sums)
    if people < PATIENTS:
        return [(math.nan, math.nan)] * len(asked)
    drawn = np.random.default_rng(seed).multinomial(people, [1 / people] * people, RESAMPLES).astype(float)
    number = drawn @ counts
    drawn = drawn[(number > 0).sum(1) >= SIZES]
    laws = fit(np.array(sizes), drawn @ sums, counts=drawn @ counts)
    low, high = np.quantile(_at(laws, asked), [0.025, 0.975], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _sentence(expected: Sequence[Point]) -> str:
    now, twice, four = expected
    said = [
        f"{p.dice:.3f}" + (f" ({p.low:.3f} to {p.high:.3f})" if math.isfinite(p.low) else "") for p in (twice, four)
    ]
    more = f"Dice {now.dice:.3f} with {now.labels} labelled scans, {said[0]} expected with {twice.labels}, {said[1]} "
    more += f"with {four.labels}."
    if not math.isfinite(twice.low):
        more += f" Fewer than {PATIENTS} patients were judged: there is no interval."
    return more if twice.dice - now.dice >= FLAT else f"No gain from more scans of this kind is seen: {more}"
