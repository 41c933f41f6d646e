"""Expected Dice of a prediction without a reference, learnt from scans that a model had not seen.

Signs of doubt, such as how steady an answer is under small disturbances, go along with Dice; how much, a
cross-validation tells. The logit of Dice is regressed on the logits of the signs, with an offset for each label that is
drawn to the common one, and with slopes that are drawn to those of `USUAL` (ridge): a handful of scans tells no
slope. The range of a label is a quantile, over patients, of how far its Dice was from what all other patients let
expect: leave-one-out residuals, as in the jackknife (Barber et al. 2021, arXiv 1905.02928). With n patients no level
above n / (n + 1) can be had, and the level that is had is said. It holds on average over draws of the patients; what
the range of one draw holds at least is said too, see `held_at_least`. Both are what the patients at hand show, not a
guarantee.

A label that was not found counts as full doubt where the regression learns, and Dice 0 is expected of it: that is the
Dice of an empty mask wherever the label is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from fewscan.data.listing import read_json
from fewscan.errors import DataError

FILE = "calibration.json"
WANTED = 0.9  # level of a range where there are patients enough
RARE = 0.05  # one draw of patients in twenty: in it a range holds less than it is said to hold at least
LEAST = 3  # patients below which nothing is learnt
USUAL = {"steady": 1.0}  # slope of a sign where scans do not tell it; 0 of any other
SHRINK, OFFSET = 1.0, 2.0  # ridge of slopes and of the labels' offsets
EDGE = 0.005  # how near to 0 and 1 Dice and signs are taken to be at most

Signs = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One label of a scan that the model had not seen.

    Parameters
    ----------
    case, patient, label : str
        Which.
    signs : mapping of str to float, optional
        Signs of doubt, 0 to 1, high where there is none; None where the label was not found.
    dice : float
        With the reference.
    """

    case: str
    patient: str
    label: str
    signs: Signs | None
    dice: float


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a prediction is expected to be worth.

    Parameters
    ----------
    dice, low, high : float
        Expected Dice and its range.
    level : float
        Share of patients whose Dice such ranges are to hold on average, if they are like those these were learnt from.
    at_least : float
        Share that a single one is to hold, but for one draw of twenty of the patients that it was learnt from.
    """

    dice: float
    low: float
    high: float
    level: float
    at_least: float


class Width(NamedTuple):
    """How wide a range is.

    Parameters
    ----------
    half : float
        Half the width, Dice.
    level, at_least : float
        Of the range, as `Expected` has them.
    """

    half: float
    level: float
    at_least: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """From signs to Dice.

    Parameters
    ----------
    signs : tuple of str
        In the order of the slopes.
    middle, slopes : tuple of float
        Mean logit of each sign, and what one unit more of it does to the logit of Dice.
    level_of : mapping of str to float
        Logit of Dice of each label where all signs are at their means.
    common : float
        The same of a label that was not seen.
    widths : mapping of str to Width
        Of the range of each label that enough patients have.
    widest : Width
        Of every other label: from the label that each patient is worst expected in.
    error : float
        Mean absolute error over patients left out, Dice.
    patients : int
        How many it was learnt from.
    labels : tuple of str
        Of the task.
    held_out : tuple of (str, float, float)
        Label, expected and measured Dice of each scan, its patient left out.
    """

    signs: tuple[str, ...]
    middle: tuple[float, ...]
    slopes: tuple[float, ...]
    level_of: Mapping[str, float]
    common: float
    widths: Mapping[str, Width]
    widest: Width
    error: float
    patients: int
    labels: tuple[str, ...]
    held_out: tuple[tuple[str, float, float], ...]

    def expect(self, label: str, signs: Signs | None) -> Expected:
        """Expected Dice of a label.

        Parameters
        ----------
        label : str
            Name of the label.
        signs : mapping of str to float, optional
            Of its prediction; None where it was not found.

        Raises
        ------
        DataError
            If a sign is missing.
        """
        dice, (half, level, at_least) = self._dice(label, signs), self.widths.get(label, self.widest)
        low, high = max(0.0, dice - half), min(1.0, dice + half)
        return Expected(dice=dice, low=low, high=high, level=level, at_least=at_least)

    def _dice(self, label: str, signs: Signs | None) -> float:
        if signs is None:
            return 0.0
        lacking = [name for name in self.signs if name not in signs]
        if lacking:
            raise DataError(f"the calibration needs the signs {', '.join(lacking)}; cross-validate again")
        logit = self.level_of.get(label, self.common)
        for name, middle, slope in zip(self.signs, self.middle, self.slopes, strict=True):
            logit += slope * (_logit(signs[name]) - middle)
        return _dice(logit)

    def check_labels(self, names: Iterable[str], *, where: Path) -> None:
        """Refuse a model of another task.

        Parameters
        ----------
        names : iterable of str
            Labels of the model.
        where : Path
            Of this calibration, for the message.

        Raises
        ------
        DataError
            If the labels are not those that were calibrated.
        """
        own, other = set(self.labels), set(names)
        if own != other:
            raise DataError(
                f"{where}: calibrated on the labels {', '.join(sorted(own))}, the model gives "
                f"{', '.join(sorted(other))}; cross-validate the data set that the model was trained on"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries."""
        return asdict(self)


def calibration_from(content: Mapping[str, Any]) -> Calibration:
    """Undo `Calibration.to_json`.

    Parameters
    ----------
    content : mapping
        As read from a file.

    Raises
    ------
    DataError
        If it is not one.
    """
    try:
        known = dict(content)
        for name in ("signs", "middle", "slopes", "labels"):
            known[name] = tuple(known[name])
        known["widths"] = {str(label): _stored(*width) for label, width in known["widths"].items()}
        known["widest"] = _stored(*known["widest"])
        known["held_out"] = tuple((str(label), float(a), float(b)) for label, a, b in known["held_out"])
        return Calibration(**known)
    except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(f"not a calibration of fewscan ({error}); cross-validate again") from None


def _stored(half: float, level: float, at_least: float | None = None) -> Width:
    """As it is in a file; older ones lack the last figure, and get that of the fewest patients that give the level."""
    if at_least is None:
        patients = round(level / (1 - level))
        at_least = held_at_least(patients, patients=patients) if patients else 0.0
    return Width(half, level, at_least)


def held_at_least(rank: int, *, patients: int) -> float:
    """Share of future patients that a range holds, but for one draw of twenty of those that it was learnt from.

    What the k-th smallest of n residuals holds of further ones differs from draw to draw as Beta(k, n + 1 - k) does,
    whatever their distribution, so long as they are exchangeable (Angelopoulos and Bates 2021, arXiv 2107.07511); this
    is its 5 % quantile, its mean is k / (n + 1). Leave-one-out residuals come near that: each is of a fit of its own.

    Parameters
    ----------
    rank : int
        Of the residual that is half the range's width, among those of all patients; 1 is the smallest.
    patients : int
        How many there are.

    Examples
    --------
    >>> [round(held_at_least(n, patients=n), 2) for n in (3, 5, 9)]
    [0.37, 0.55, 0.72]
    """
    return float(betaincinv(rank, patients + 1 - rank, RARE))


def promise(level: float, at_least: float) -> str:
    """How many patients a range is to hold, for people.

    Parameters
    ----------
    level, at_least : float
        As `Expected` has them; without the second, which older records lack, nothing is said of it.

    Examples
    --------
    >>> promise(5 / 6, held_at_least(5, patients=5))
    '83% on average, and at least 55% in 19 of 20 cross-validations'
    """
    surely = "" if math.isnan(at_least) else f", and at least {at_least:.0%} in 19 of 20 cross-validations"
    return f"{level:.0%} on average{surely}"


def read_calibration(path: Path) -> Calibration:
    """What a cross-validation learnt.

    Parameters
    ----------
    path : Path
        Its folder, or the file in it.

    Raises
    ------
    DataError
        If there is none, or it is damaged.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path}: holds no {FILE}; give the folder of a `fewscan crossval` over three patients or more")
    return calibration_from(read_json(file))


def calibrate(rows: Sequence[Judged], *, labels: Iterable[str] = ()) -> Calibration:
    """Learn what signs say of Dice.

    Parameters
    ----------
    rows : sequence of Judged
        Every label of every scan that was left out, by models that had not seen it.
    labels : iterable of str
        Of the task, where it has more than those that were judged.

    Raises
    ------
    DataError
        If fewer than three patients were left out, or their signs differ, or nothing was found in any scan.
    """
    patients = sorted({row.patient for row in rows})
    if len(patients) < LEAST:
        raise DataError(f"{len(patients)} patient(s) left out, at least {LEAST} are needed to expect a Dice")
    kinds = {tuple(sorted(row.signs)) for row in rows if row.signs is not None}
    if len(kinds) != 1:
        raise DataError(
            "scans were judged by different signs; cross-validate them again" if kinds
            else "no label was found in any scan that was left out; train longer, or label more scans"
        )  # fmt: skip
    names, left_out = kinds.pop(), dict[str, list[tuple[Judged, float]]]()
    for patient in patients:
        model = _fit([row for row in rows if row.patient != patient], names)
        mine = [row for row in rows if row.patient == patient]
        left_out[patient] = [(row, model.expect(row.label, row.signs).dice) for row in mine]
    gaps = [(row.label, patient, abs(dice - row.dice)) for patient, found in left_out.items() for row, dice in found]
    seen = sorted({row.label for row in rows})
    widths = {label: _width([gap for gap in gaps if gap[0] == label]) for label in seen}
    own = {patient: float(np.mean([gap for _, whose, gap in gaps if whose == patient])) for patient in patients}
    return replace(
        _fit(rows, names), widths={label: width for label, width in widths.items() if width is not None},
        widest=_width(gaps) or Width(1.0, 0.0, 0.0), error=float(np.mean(list(own.values()))), patients=len(patients),
        labels=tuple(sorted({*seen, *labels})),
        held_out=tuple((row.label, dice, row.dice) for found in left_out.values() for row, dice in found),
    )  # fmt: skip


def _width(gaps: Sequence[tuple[str, str, float]]) -> Width | None:
    """Quantile over patients of each one's largest gap; None of too few patients.

    Where a patient has several scans, or several labels are asked for, a range has to hold all of them.
    """
    largest: dict[str, float] = {}
    for _, patient, gap in gaps:
        largest[patient] = max(gap, largest.get(patient, 0.0))
    n, ordered = len(largest), sorted(largest.values())
    if n < LEAST:
        return None
    wanted = math.ceil((n + 1) * WANTED)
    rank = min(wanted, n)
    return Width(float(ordered[rank - 1]), WANTED if wanted <= n else n / (n + 1), held_at_least(rank, patients=n))


def _fit(rows: Sequence[Judged], names: tuple[str, ...]) -> Calibration:
    """Ridge regression of the logit of Dice; a label that was not seen takes the common offset."""
    labels = sorted({row.label for row in rows})
    full = dict.fromkeys(names, 0.0)
    x = np.array([[_logit((row.signs or full)[name]) for name in names] for row in rows])
    y = np.array([_logit(row.dice) for row in rows])
    middle, common = x.mean(0), float(y.mean())
    own = np.array([[float(row.label == label) for label in labels] for row in rows])
    table: NDArray[np.float64] = np.concatenate([x - middle, own], 1)
    ridge = np.diag([SHRINK] * len(names) + [OFFSET] * len(labels))
    usual = np.array([USUAL.get(name, 0.0) for name in names])
    found = np.linalg.solve(table.T @ table + ridge, table.T @ (y - common - (x - middle) @ usual))
    slopes = np.maximum(usual + found[: len(names)], 0.0)  # less doubt never means a worse answer
    offsets = {label: common + float(found[len(names) + i]) for i, label in enumerate(labels)}
    return Calibration(
        signs=names, middle=tuple(middle.tolist()), slopes=tuple(slopes.tolist()), level_of=offsets, common=common,
        widths={}, widest=Width(1.0, 0.0, 0.0), error=math.nan, patients=0, labels=(), held_out=(),
    )  # fmt: skip


def _logit(value: float) -> float:
    inside = min(max(value, EDGE), 1 - EDGE)
    return math.log(inside / (1 - inside))


def _dice(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
