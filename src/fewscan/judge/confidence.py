"""Expected Dice of a prediction without a reference, learnt from scans that a model had not seen.

Signs of doubt, such as how steady an answer is under small disturbances, go along with Dice; how much, a
cross-validation tells. The logit of Dice is regressed on the logits of the signs, with an offset for each label that is
drawn to the common one, and with slopes that are drawn to those of `USUAL` (ridge): a handful of scans tells no
slope. The range of a label is a quantile, over patients, of how far its Dice was from what all other patients let
expect: leave-one-out residuals, as in the jackknife (Barber et al. 2021, arXiv 1905.02928). With n patients no level
above n / (n + 1) can be had, and the level that is had is said. It is what the patients at hand show, not a guarantee:
the residuals share their data, and that the ranges hold those patients is how they were made, see `promise`.

A label that was not found counts as full doubt where the regression learns, and Dice 0 is expected of it: that is the
Dice of an empty mask wherever the label is there. It is met exactly, and such a label gets no range; so it has no part
in the widths, the error and the number of patients, which are of labels that were found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewscan.data.listing import read_json
from fewscan.errors import DataError

FILE = "calibration.json"
WANTED = 0.9  # level of a range where there are patients enough
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
    """

    dice: float
    low: float
    high: float
    level: float


class Width(NamedTuple):
    """How wide a range is.

    Parameters
    ----------
    half : float
        Half the width, Dice.
    level : float
        Of the range, as `Expected` has it.
    """

    half: float
    level: float


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
        Mean absolute error over patients left out, Dice, of labels that were found.
    patients : int
        How many there are in whom something was found.
    labels : tuple of str
        Of the task.
    held_out : tuple of (str, float, float)
        Label, expected and measured Dice of what was found in each scan, its patient left out.
    missed : int
        Labels that were not found, over all scans.
    recipe : mapping, optional
        How the models of the folds were trained, see `fewscan.judge.recipe`; older calibrations do not tell.
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
    missed: int = 0
    recipe: Mapping[str, Any] | None = None

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
        dice, (half, level) = self._dice(label, signs), self.widths.get(label, self.widest)
        return Expected(dice=dice, low=max(0.0, dice - half), high=min(1.0, dice + half), level=level)

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


def _stored(half: float, level: float, *_: float) -> Width:
    """As it is in a file; older ones have a third figure, a law that does not hold of leave-one-out residuals."""
    return Width(float(half), float(level))


def promise(level: float) -> str:
    """How many patients a range is to hold, and what that is worth, for people.

    Parameters
    ----------
    level : float
        As `Expected` has it.

    Examples
    --------
    >>> promise(5 / 6)[:14]
    '83% on average'
    """
    return (
        f"{level:.0%} on average. It is as wide as to hold that share of those left out, which is how it was made and "
        "no test of it: where we tested it, from few patients, such ranges held fewer"
    )


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
        If something was found in fewer than three patients that were left out, or their signs differ.
    """
    left, found = ({row.patient for row in rows}, [row for row in rows if row.signs is not None])
    if len(left) < LEAST:
        raise DataError(f"{len(left)} patient(s) left out, at least {LEAST} are needed to expect a Dice")
    kinds = {tuple(sorted(row.signs)) for row in found if row.signs is not None}
    if len(kinds) != 1:
        raise DataError(
            "scans were judged by different signs; cross-validate them again" if kinds
            else "no label was found in any scan that was left out; train longer, or label more scans"
        )  # fmt: skip
    names, patients = kinds.pop(), sorted({row.patient for row in found})
    if len(patients) < LEAST:
        raise DataError(
            f"labels were found in {len(patients)} of the {len(left)} patients left out, at least {LEAST} are needed "
            "to expect a Dice; train longer, or label more scans"
        )
    held_out: list[tuple[Judged, float]] = []
    for patient in patients:
        model = _fit([row for row in rows if row.patient != patient], names)
        held_out += [(row, model.expect(row.label, row.signs).dice) for row in found if row.patient == patient]
    gaps = [(row.label, row.patient, abs(dice - row.dice)) for row, dice in held_out]
    widths = {name: _width([gap for gap in gaps if gap[0] == name]) for name in sorted({row.label for row in found})}
    own = [float(np.mean([gap for _, whose, gap in gaps if whose == patient])) for patient in patients]
    return replace(
        _fit(rows, names), widths={label: width for label, width in widths.items() if width is not None},
        widest=_width(gaps) or Width(1.0, 0.0), error=float(np.mean(own)), patients=len(patients),
        labels=tuple(sorted({*(row.label for row in rows), *labels})), missed=len(rows) - len(found),
        held_out=tuple((row.label, dice, row.dice) for row, dice in held_out),
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
    return Width(float(ordered[rank - 1]), WANTED if wanted <= n else n / (n + 1))


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
        widths={}, widest=Width(1.0, 0.0), error=math.nan, patients=0, labels=(), held_out=(),
    )  # fmt: skip


def _logit(value: float) -> float:
    inside = min(max(value, EDGE), 1 - EDGE)
    return math.log(inside / (1 - inside))


def _dice(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
