"""Expected Dice of a prediction without a reference, learnt from scans that a model had not seen.

Signs of doubt, such as how steady an answer is under small disturbances, go along with Dice; how much, a
cross-validation tells. The logit of Dice is regressed on the logits of the signs, with an offset for each label that is
drawn to the common one (ridge). Ranges are conformal (Vovk et al. 2005; leave-one-out residuals as in the jackknife,
Barber et al. 2021, arXiv 1905.02928), whole patients left out; with n patients no level above n / (n + 1) can be had,
and the level that is had is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data.listing import read_json
from fewscan.errors import DataError

FILE = "calibration.json"
WANTED = 0.9  # level of a range where there are patients enough
LEAST = 3  # patients below which nothing is learnt
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
    signs : mapping of str to float
        Signs of doubt, 0 to 1, high where there is none.
    dice : float
        With the reference.
    """

    case: str
    patient: str
    label: str
    signs: Signs
    dice: float


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a prediction is expected to be worth.

    Parameters
    ----------
    dice, low, high : float
        Expected Dice and its range.
    level : float
        Share of patients whose Dice such a range holds, if they are like those it was learnt from.
    """

    dice: float
    low: float
    high: float
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
    half : float
        Half the width of a range, Dice.
    level : float
        Of the range.
    error : float
        Mean absolute error over patients left out, Dice.
    patients : int
        How many it was learnt from.
    """

    signs: tuple[str, ...]
    middle: tuple[float, ...]
    slopes: tuple[float, ...]
    level_of: Mapping[str, float]
    common: float
    half: float
    level: float
    error: float
    patients: int

    def expect(self, label: str, signs: Signs) -> Expected:
        """Expected Dice of a label.

        Parameters
        ----------
        label : str
            Name of the label.
        signs : mapping of str to float
            Of its prediction.

        Raises
        ------
        DataError
            If a sign is missing.
        """
        lacking = [name for name in self.signs if name not in signs]
        if lacking:
            raise DataError(f"the calibration needs the signs {', '.join(lacking)}; cross-validate again")
        logit = self.level_of.get(label, self.common)
        for name, middle, slope in zip(self.signs, self.middle, self.slopes, strict=True):
            logit += slope * (_logit(signs[name]) - middle)
        dice = _dice(logit)
        low, high = max(0.0, dice - self.half), min(1.0, dice + self.half)
        return Expected(dice=dice, low=low, high=high, level=self.level)

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
        for name in ("signs", "middle", "slopes"):
            known[name] = tuple(known[name])
        return Calibration(**known)
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"not a calibration of fewscan ({error}); cross-validate again") from None


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


def calibrate(rows: Sequence[Judged]) -> Calibration:
    """Learn what signs say of Dice.

    Parameters
    ----------
    rows : sequence of Judged
        Every label of every scan that was left out, by models that had not seen it.

    Raises
    ------
    DataError
        If fewer than three patients were left out, or their signs differ.
    """
    patients = sorted({row.patient for row in rows})
    if len(patients) < LEAST:
        raise DataError(f"{len(patients)} patient(s) left out, at least {LEAST} are needed to expect a Dice")
    names = tuple(sorted(rows[0].signs))
    if any(tuple(sorted(row.signs)) != names for row in rows):
        raise DataError("scans were judged by different signs; cross-validate them again")
    residuals: dict[str, list[float]] = {}
    for patient in patients:
        model = _fit([row for row in rows if row.patient != patient], names)
        for row in rows:
            if row.patient == patient:
                gap = abs(model.expect(row.label, row.signs).dice - row.dice)
                residuals.setdefault(patient, []).append(gap)
    worst = sorted(float(np.mean(gaps)) for gaps in residuals.values())
    n = len(worst)
    rank = math.ceil((n + 1) * WANTED)
    level = WANTED if rank <= n else n / (n + 1)
    known = {**_fit(rows, names).to_json(), "half": worst[min(rank, n) - 1], "level": level}
    return calibration_from(known | {"error": float(np.mean(worst)), "patients": n})


def _fit(rows: Sequence[Judged], names: tuple[str, ...]) -> Calibration:
    """Ridge regression of the logit of Dice; a label that was not seen takes the common offset."""
    labels = sorted({row.label for row in rows})
    x = np.array([[_logit(row.signs[name]) for name in names] for row in rows])
    y = np.array([_logit(row.dice) for row in rows])
    middle, common = x.mean(0), float(y.mean())
    own = np.array([[float(row.label == label) for label in labels] for row in rows])
    table: NDArray[np.float64] = np.concatenate([x - middle, own], 1)
    ridge = np.diag([SHRINK] * len(names) + [OFFSET] * len(labels))
    found = np.linalg.solve(table.T @ table + ridge, table.T @ (y - common))
    slopes = np.maximum(found[: len(names)], 0.0)  # less doubt never means a worse answer
    offsets = {label: common + float(found[len(names) + i]) for i, label in enumerate(labels)}
    return Calibration(
        signs=names, middle=tuple(middle.tolist()), slopes=tuple(slopes.tolist()), level_of=offsets, common=common,
        half=1.0, level=0.0, error=math.nan, patients=0,
    )  # fmt: skip


def _logit(value: float) -> float:
    inside = min(max(value, EDGE), 1 - EDGE)
    return math.log(inside / (1 - inside))


def _dice(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
