"""How far one population of scans is from another, and of what kind the difference is.

Systematic differences, of acquisition and pre-processing, are looked for in tissue away from lesions: intensity scale,
contrast, fine detail, voxel size, field of view, and of directions how disordered they are and how many fibres cross;
and in the features of a model's encoder. Each is held against what chance gives when patients are dealt to the two
populations at random (permutation; the largest of all kinds for the verdict, and the rarest of all distances, so that
looking at many kinds finds no more than 5 % of false ones, and neither does looking at many distances: Westfall & Young
1993). The split into a systematic and a lesion-specific part follows
Riccardi et al., Medical Image Analysis 2025, doi 10.1016/j.media.2025.103766; of that paper only the abstract was
readable, the measures are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewscan.judge.lesions import pushed_said
from fewscan.judge.looks import Array, Look

PERMUTATIONS = 999
FEWEST = 3  # patients on each side, below which nothing is named
DIMENSIONS = 8  # of the features, by principal components, in which Gaussians are compared
RARE = 0.05
LOST = 0.1  # Dice by which a model may be worse on the target before the advice says so
FLOORS = {
    "intensity scale": 0.05, "contrast": 0.02, "fine detail": 0.1, "voxel size": 0.03, "field of view": 0.05,
    "disorder of directions": 0.05, "crossing fibres": 0.1,
}  # fmt: skip
"""Kinds of systematic difference, each with the spread within a population that is assumed at least; the last two of
directions only."""

GEOMETRIC = ("voxel size", "field of view")  # read off the header: where one differs, the others may follow from it


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A distance between two populations, and what chance gives.

    Parameters
    ----------
    value : float
        Measured; 0 or so where there is no difference.
    low, high : float
        Middle 95 % of what comes when patients are dealt out at random.
    p : float
        Share of such draws that are at least as far apart, the measured one counted in.
    """

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, kw_only=True)
class Systematic:
    """What differs between two populations, whatever a lesion does.

    Parameters
    ----------
    kinds : mapping of str to Distance
        Target minus source for each kind, in standard deviations within a population; of several channels or axes the
        one that differs most. ``p`` is corrected for the number of kinds.
    distances : mapping of str to Distance
        Wasserstein distance of the intensities; maximum mean discrepancy and Fréchet distance of the features. ``p`` is
        corrected for the number of distances.
    named : tuple of str
        Kinds that chance does not explain, the most telling first.
    """

    kinds: dict[str, Distance]
    distances: dict[str, Distance]
    named: tuple[str, ...]


def systematic(source: Sequence[Look], target: Sequence[Look], *, seed: int = 0) -> Systematic:
    """Hold two populations against each other.

    Parameters
    ----------
    source, target : sequence of Look
        At least one each; with too few patients (`tellable`) nothing is named.
    seed : int
        Of the permutations.
    """
    looks = [*source, *target]
    patients = [("source", one.patient) for one in source] + [("target", one.patient) for one in target]
    draws = _draws(patients, seed=seed)
    seen = {kind: floor for kind, floor in FLOORS.items() if kind in looks[0].numbers}
    z = {kind: _standardised([one.numbers[kind] for one in looks], draws, floor=f) for kind, f in seen.items()}
    largest = np.max([np.abs(values) for values in z.values()], axis=0)
    kinds = {}
    for kind, values in z.items():
        low, high = np.quantile(values[1:], [0.025, 0.975])
        p = float(np.mean(largest >= abs(values[0]) - 1e-12))
        kinds[kind] = Distance(value=float(values[0]), low=float(low), high=float(high), p=p)
    enough = tellable(*(len({p for p in patients if p[0] == side}) for side in ("source", "target")))
    known = [kind for kind, found in kinds.items() if enough and found.p <= RARE]
    named = sorted(known, key=lambda kind: (kind not in GEOMETRIC, kind != "voxel size", -abs(kinds[kind].value)))
    return Systematic(kinds=kinds, distances=_distances(looks, draws), named=tuple(named))


def tellable(source: int, target: int) -> bool:
    """Whether so many patients on each side can show any difference: three and three can be dealt in ten ways only.

    Parameters
    ----------
    source, target : int
        Patients.

    Examples
    --------
    >>> tellable(3, 3), tellable(3, 4), tellable(2, 40)
    (False, True, False)
    """
    ways = math.comb(source + target, source) / (2 if source == target else 1)  # sides of one size may change places
    return min(source, target) >= FEWEST and 1 / ways <= RARE


def _draws(patients: Sequence[tuple[str, str]], *, seed: int) -> NDArray[np.bool_]:
    """Who is of the target, (1 + permutations, scans): first as it is, then with whole patients dealt out anew.

    A name that occurs in both populations is taken for two people: data sets number their patients alike.
    """
    everyone = list(dict.fromkeys(patients))
    column = np.array([everyone.index(one) for one in patients])
    first = np.array([[side == "target" for side, _ in everyone]])
    rng = np.random.default_rng(seed)
    rest = np.stack([rng.permutation(first[0]) for _ in range(PERMUTATIONS)])
    found: NDArray[np.bool_] = np.concatenate([first, rest])[:, column]
    return found


def _standardised(numbers: Sequence[Array], draws: NDArray[np.bool_], *, floor: float) -> Array:
    """Difference of the means over the deviation within, of the column where that is largest; for each draw."""
    x = np.stack(numbers)  # scans, columns
    a, b = draws.astype(float), (~draws).astype(float)
    na, nb = a.sum(1, keepdims=True), b.sum(1, keepdims=True)
    ma, mb = a @ x / na, b @ x / nb
    within = (a @ x**2 - na * ma**2 + b @ x**2 - nb * mb**2) / np.maximum(na + nb - 2, 1)
    z = (ma - mb) / np.maximum(np.sqrt(np.maximum(within, 0)), floor)
    return np.take_along_axis(z, np.abs(z).argmax(1)[:, None], 1)[:, 0]


def _distances(looks: Sequence[Look], draws: NDArray[np.bool_]) -> dict[str, Distance]:
    quantiles = np.stack([one.quantiles for one in looks])

    def wasserstein(target: NDArray[np.bool_]) -> float:
        gap = quantiles[target].mean(0) - quantiles[~target].mean(0)
        return float(np.abs(gap).mean(1).max())  # of several channels the one that differs most

    measures: dict[str, Callable[[NDArray[np.bool_]], float]] = {"intensity, Wasserstein": wasserstein}
    if all(len(one.features) for one in looks):
        measures |= _of_features(looks)
    values = {name: np.array([measure(draw) for draw in draws]) for name, measure in measures.items()}
    rarity = {name: _as_far(row) for name, row in values.items()}
    rarest = np.min(list(rarity.values()), axis=0)
    found = {}
    for name, row in values.items():
        low, high = np.quantile(row[1:], [0.025, 0.975])
        p = float(np.mean(rarest <= rarity[name][0] + 1e-12))
        found[name] = Distance(value=float(row[0]), low=float(low), high=float(high), p=p)
    return found


def _as_far(values: Array) -> Array:
    """For each draw, the share of draws that are at least as far apart."""
    below = np.searchsorted(np.sort(values), values - 1e-12)
    share: Array = 1 - below / len(values)
    return share


def _of_features(looks: Sequence[Look]) -> dict[str, Callable[[NDArray[np.bool_]], float]]:
    """Maximum mean discrepancy of the scans' mean features, Fréchet distance of the features themselves."""
    means = np.stack([one.features.mean(0) for one in looks])
    pooled = np.concatenate([one.features - one.features.mean(0) for one in looks])
    scale = np.maximum(pooled.std(0), 1e-6)
    points = means / scale
    squared = ((points[:, None] - points[None]) ** 2).sum(2)
    kernel = np.exp(-squared / max(float(np.median(squared[squared > 0])) if (squared > 0).any() else 1.0, 1e-12))
    everything = np.concatenate([one.features for one in looks]) / scale
    _, _, axes = np.linalg.svd(everything - everything.mean(0), full_matrices=False)
    small = [one.features / scale @ axes[:DIMENSIONS].T for one in looks]
    first, second = np.stack([f.mean(0) for f in small]), np.stack([f.T @ f / len(f) for f in small])

    def mmd(target: NDArray[np.bool_]) -> float:
        a, b = target, ~target
        return float(kernel[np.ix_(a, a)].mean() + kernel[np.ix_(b, b)].mean() - 2 * kernel[np.ix_(a, b)].mean())

    def frechet(target: NDArray[np.bool_]) -> float:
        m, n = first[target].mean(0), first[~target].mean(0)
        c, d = second[target].mean(0) - np.outer(m, m), second[~target].mean(0) - np.outer(n, n)
        w, v = np.linalg.eigh(c)
        root = v * np.sqrt(np.maximum(w, 0)) @ v.T
        cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ d @ root), 0)).sum()
        return float(((m - n) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * cross)

    return {"features, MMD": mmd, "features, Fréchet": frechet}


def difference(
    source: Sequence[float],
    target: Sequence[float],
    *,
    patients: tuple[Sequence[str], Sequence[str]] | None = None,
    seed: int = 0,
) -> Distance:
    """Difference of two means, target minus source, and what chance gives.

    Parameters
    ----------
    source, target : sequence of float
        One value per scan.
    patients : (sequence of str, sequence of str), optional
        Whose scans they are, in the same order: whole patients are dealt to the two sides. One scan each when None.
    seed : int
        Of the permutations.

    Examples
    --------
    >>> found = difference([1.0, 1.1, 0.9, 1.0], [2.0, 2.1, 1.9, 2.0])
    >>> round(found.value, 6), found.low > -1.1, found.p < 0.05
    (1.0, True, True)
    >>> found = difference([1.0, 1.1, 0.9, 1.0], [2.0, 2.1, 1.9, 2.0], patients=("aaaa", "bbbb"))
    >>> round(found.value, 6), found.p < 0.05
    (1.0, False)
    """
    whose = patients or (list(map(str, range(len(source)))), list(map(str, range(len(target)))))
    draws = _draws(
        [(side, one) for side, part in zip(("source", "target"), whose, strict=True) for one in part], seed=seed
    )
    values = np.array([*source, *target], np.float64)
    gaps = draws @ values / draws.sum(1) - ~draws @ values / (~draws).sum(1)
    low, high = np.quantile(gaps[1:], [0.025, 0.975])
    p = float(np.mean(np.abs(gaps) >= abs(gaps[0]) - 1e-12))
    return Distance(value=float(gaps[0]), low=float(low), high=float(high), p=p)


def advice(
    found: Systematic,
    *,
    normalised: bool,
    deformed: bool = False,
    pushed: Mapping[str, float] | None = None,
    review: Sequence[str] = (),
    told: bool = True,
    lost: float = math.nan,
) -> str:
    """One plain sentence: what to do about a shift.

    The number of cases is a rule of thumb by the size of the difference, not a measurement.

    Parameters
    ----------
    found : Systematic
        From `systematic`.
    normalised : bool
        Whether the model divides each scan by its own intensity scale.
    deformed : bool
        Whether tissue around lesions seems to be deformed more than chance explains, which is a hint.
    pushed : mapping of str to float, optional
        How far lesions may push each structure, mm; those from `lesions.PUSHED_MM` on are told.
    review : sequence of str
        Cases that need a human.
    told : bool
        Whether there are patients enough to show a difference (`tellable`).
    lost : float
        Dice of the model on the source less that on the target; NaN where it is not known.

    Examples
    --------
    >>> nothing = Distance(value=0.1, low=-1.0, high=1.0, p=0.9)
    >>> advice(Systematic(kinds={"contrast": nothing}, distances={}, named=()), normalised=True)
    'No systematic difference shows that chance would not explain: use the model as it is, and check its first answers.'
    """
    named = [name for name in found.named if not (normalised and name == "intensity scale")]
    tunes = True  # whether fine-tuning is advised
    if named:
        said = _repaired(found, named)
    elif lost > LOST:
        why = "nothing measured here explains it" if told else "there are too few patients to say why"
        said = (
            f"The model's Dice is {lost:.2f} lower on the target, and {why}: look at those answers beside their "
            "labels, and fine-tune with about 5 labelled cases"
        )
    else:
        said, tunes = _nothing_named(found, told=told)
    said += _around_lesions(pushed_said(pushed or {}), deformed=deformed, tunes=tunes)
    if review:
        said += f"; {_listed(list(review))} {'needs' if len(review) == 1 else 'need'} a human"
    return said + "."


def _repaired(found: Systematic, named: Sequence[str]) -> str:
    size = max(abs(found.kinds[name].value) for name in named)
    count = next(k for most, k in ((2.0, 2), (5.0, 5), (np.inf, 10)) if size <= most)
    verb = "differs" if len(named) == 1 else "differ"
    said = (
        f"{_listed(named)} {verb}: fine-tuning with about {count} labelled cases may repair part of this; "
        "how much only a test shows"
    )
    return said[0].upper() + said[1:]


def _around_lesions(moved: str, *, deformed: bool, tunes: bool) -> str:
    """What fine-tuning, where it is advised, at best repairs in part.

    What registration found is no more than a hint: on the cohort whose truth is known it did not follow the truth.
    """
    where = "it repairs the deformation around lesions in part at best:" if tunes else "around lesions"
    if moved:
        return f"; {where} {moved}"
    if deformed:
        return "; tissue around lesions may be deformed" + (", which it repairs in part at best" if tunes else "")
    return ""


def _nothing_named(found: Systematic, *, told: bool) -> tuple[str, bool]:
    """What to say where no kind is named, and whether that is to fine-tune."""
    if not told:
        few = f"Too few patients to tell whether the populations differ: compare at least {FEWEST} and {FEWEST + 1}"
        return few, False
    if found.named:
        only = (
            "Only the intensity scale differs, which the model's normalisation takes away: there is nothing to repair"
        )
        return only, False
    if any(distance.p <= RARE for distance in found.distances.values()):
        other = (
            "The scans differ in a way that is none of the kinds measured here: fine-tuning with about 5 labelled "
            "cases may repair part of it; how much only a test shows"
        )
        return other, True
    nothing = "No systematic difference shows that chance would not explain"
    return f"{nothing}: use the model as it is, and check its first answers", False


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
