"""What an evaluation found: per case, per label and in summary; kept as ``evaluation.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewscan.data import io
from fewscan.errors import DataError
from fewscan.judge.metrics import METRICS, RULES, Score
from fewscan.judge.statistics import bootstrap_interval


@dataclass(frozen=True, kw_only=True)
class CaseScore:
    """One judged case.

    Parameters
    ----------
    id : str
        Name that prediction and reference share.
    labels : mapping of str to Score
        By label name.
    prediction, reference : Path
        Files compared.
    image : Path, optional
        The scan, for pictures.
    tolerance_mm : float
        Of the surface Dice.
    """

    id: str
    labels: Mapping[str, Score]
    prediction: Path
    reference: Path
    image: Path | None = None
    tolerance_mm: float

    def mean(self, metric: str) -> float:
        """Mean of a metric over the labels that have it; NaN when none has.

        Parameters
        ----------
        metric : str
            One of `METRICS`.
        """
        return _mean(getattr(score, metric) for score in self.labels.values())


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Judged cases, and what could not be judged.

    Parameters
    ----------
    cases : tuple of CaseScore
        In the order of their ids.
    unmatched : mapping of str to tuple of str
        ``"predictions"`` without a reference and ``"references"`` without a prediction.
    """

    cases: tuple[CaseScore, ...]
    unmatched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Label names, in order of first appearance."""
        return tuple(dict.fromkeys(name for case in self.cases for name in case.labels))

    def values(self, metric: str, *, label: str | None = None) -> list[float]:
        """One value per case, NaN where it has none.

        Parameters
        ----------
        metric : str
            One of `METRICS`.
        label : str, optional
            Of this label; None for the mean over labels.
        """
        if label is None:
            return [case.mean(metric) for case in self.cases]
        return [getattr(case.labels[label], metric) if label in case.labels else math.nan for case in self.cases]

    def spread(self, metric: str, *, label: str | None = None) -> dict[str, float]:
        """Mean, interval (``low``, ``high``), standard deviation and number of cases; NaN where there are too few.

        Parameters
        ----------
        metric : str
            One of `METRICS`.
        label : str, optional
            Of this label; None for the mean over labels.
        """
        finite = [v for v in self.values(metric, label=label) if math.isfinite(v)]
        low, high = bootstrap_interval(finite)
        sd = float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan
        return {"mean": _mean(finite), "low": low, "high": high, "sd": sd, "n": len(finite)}

    def ranked(self) -> list[CaseScore]:
        """Cases that have a Dice, worst first."""
        return sorted((c for c in self.cases if not math.isnan(c.mean("dice"))), key=lambda c: c.mean("dice"))

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries with every number, the rules and what was not matched; NaN becomes None."""
        summary: dict[str, Any] = {metric: plain(self.spread(metric)) for metric in METRICS}
        ranked = self.ranked()
        for key, place in (("worst", 0), ("median", len(ranked) // 2), ("best", len(ranked) - 1)):
            summary[key] = ranked[place].id if ranked else None
        for status in ("missed", "extra"):
            summary[status] = sum(s.status == status for case in self.cases for s in case.labels.values())
        labels = {name: {m: plain(self.spread(m, label=name)) for m in METRICS} for name in self.names}
        return {
            "format": "fewscan evaluation 1",
            "summary": summary,
            "labels": labels,
            "cases": [_case_to_json(case) for case in self.cases],
            "rules": dict(RULES),
            "unmatched": {key: list(ids) for key, ids in self.unmatched.items()},
        }

    def save(self, path: Path) -> None:
        """Write `to_json` to a file, whole or not at all.

        Parameters
        ----------
        path : Path
            File to write.
        """
        with io.atomic(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_evaluation(path: Path) -> Evaluation:
    """Read what `Evaluation.save` wrote.

    Parameters
    ----------
    path : Path
        Such as ``evaluation.json``.

    Raises
    ------
    DataError
        If the file is not an evaluation.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cases = tuple(_case_from_json(case) for case in content["cases"])
        unmatched = {key: tuple(ids) for key, ids in content["unmatched"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not an evaluation ({error}); write one with `fewscan evaluate --json`") from error
    return Evaluation(cases=cases, unmatched=unmatched)


def _case_to_json(case: CaseScore) -> dict[str, Any]:
    content: dict[str, Any] = plain(
        {
            "id": case.id,
            **{metric: case.mean(metric) for metric in METRICS},
            "labels": {name: asdict(score) for name, score in case.labels.items()},
            "tolerance_mm": case.tolerance_mm,
            "prediction": str(case.prediction),
            "reference": str(case.reference),
            "image": None if case.image is None else str(case.image),
        }
    )
    return content


def _case_from_json(case: Mapping[str, Any]) -> CaseScore:
    labels = {name: _score_from_json(score) for name, score in case["labels"].items()}
    return CaseScore(
        id=case["id"],
        labels=labels,
        prediction=Path(case["prediction"]),
        reference=Path(case["reference"]),
        image=None if case["image"] is None else Path(case["image"]),
        tolerance_mm=case["tolerance_mm"],
    )


def _score_from_json(score: Mapping[str, Any]) -> Score:
    content: dict[str, Any] = {key: math.nan if value is None else value for key, value in score.items()}
    return Score(**content)


def _mean(values: Iterable[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def plain(value: Any) -> Any:
    """The same with NaN as None and tuples as lists, as JSON wants it.

    Parameters
    ----------
    value : dict, list, tuple or scalar
        Nested as it likes.
    """
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
