"""What an evaluation found: per case, per label and in summary; kept as ``evaluation.json``.

An evaluation may be handed on, so it names files only below its own folder or by their bare names. Where they really
lie on this machine is kept beside it, see `fewscan.data.places`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewscan.data import io, places
from fewscan.data.dataset import patient_of
from fewscan.data.dicom import on_disk
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
    ignore : int, optional
        The reference file's value for "not looked at".
    """

    id: str
    labels: Mapping[str, Score]
    prediction: Path
    reference: Path
    image: Path | None = None
    tolerance_mm: float
    ignore: int | None = None

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
        ``"predictions"`` without a reference and ``"references"`` without a prediction; ``"bundles"`` of the reference
        that are predicted in no case, ``"cases"`` left without any, and ``"ends"``: cases with ends, none predicted.
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
        """Mean, interval over patients (``low``, ``high``), standard deviation and number of cases; NaN where too few.

        Parameters
        ----------
        metric : str
            One of `METRICS`.
        label : str, optional
            Of this label; None for the mean over labels.
        """
        values = self.values(metric, label=label)
        low, high = bootstrap_interval(values, groups=[patient_of(case.id) for case in self.cases])
        finite = [v for v in values if math.isfinite(v)]
        sd = float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan
        return {"mean": _mean(finite), "low": low, "high": high, "sd": sd, "n": len(finite)}

    def ranked(self) -> list[CaseScore]:
        """Cases that have a Dice, worst first."""
        return sorted((c for c in self.cases if not math.isnan(c.mean("dice"))), key=lambda c: c.mean("dice"))

    def to_json(self, *, root: Path | None = None) -> dict[str, Any]:
        """Plain dictionaries with every number, the rules and what was not matched; NaN becomes None.

        Parameters
        ----------
        root : Path, optional
            Files below this folder are named by their place in it; all others by their bare names.
        """
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
            "cases": [_case_to_json(case, root) for case in self.cases],
            "rules": dict(RULES),
            "unmatched": {key: list(ids) for key, ids in self.unmatched.items()},
        }

    def save(self, path: Path) -> None:
        """Write `to_json` to a file, whole or not at all, and beside it where the files lie on this machine.

        Parameters
        ----------
        path : Path
            File to write.
        """
        with io.atomic(path) as temporary:
            content = self.to_json(root=path.parent)
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        places.remember(path, {case.id: _files_of(case) for case in self.cases})


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
        kept = places.recall(path)
        cases = tuple(_case_from_json(case, path.parent, kept.get(case["id"], {})) for case in content["cases"])
        unmatched = {key: tuple(ids) for key, ids in content["unmatched"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not an evaluation ({error}); write one with `fewscan evaluate --json`") from error
    return Evaluation(cases=cases, unmatched=unmatched)


def _files_of(case: CaseScore) -> dict[str, Path]:
    files = {"prediction": case.prediction, "reference": case.reference}
    return files if case.image is None else {**files, "image": case.image}


def _named(file: Path, root: Path | None) -> str:
    """Place below a folder, always with a slash, else the bare name."""
    if root is None or not file.resolve().is_relative_to(root.resolve()):
        return file.name
    place = file.resolve().relative_to(root.resolve()).as_posix()
    return place if "/" in place else f"./{place}"


def _found(stored: str, folder: Path, real: Path | None) -> Path:
    """Where a file lies: below the folder if it says so, else where it lay on this machine, else its bare name."""
    possible = [folder / stored] if "/" in stored else []
    possible += [] if real is None else [real]
    return next((place for place in possible if on_disk(place).exists()), Path(stored))


def _case_to_json(case: CaseScore, root: Path | None) -> dict[str, Any]:
    content: dict[str, Any] = plain(
        {
            "id": case.id,
            **{metric: case.mean(metric) for metric in METRICS},
            "labels": {name: asdict(score) for name, score in case.labels.items()},
            "tolerance_mm": case.tolerance_mm,
            "ignore": case.ignore,
            "image": None,
            **{role: _named(file, root) for role, file in _files_of(case).items()},
        }
    )
    return content


def _case_from_json(case: Mapping[str, Any], folder: Path, kept: Mapping[str, Path]) -> CaseScore:
    roles = [role for role in ("prediction", "reference", "image") if case[role] is not None]
    files = {role: _found(case[role], folder, kept.get(role)) for role in roles}
    labels = {name: _score_from_json(score) for name, score in case["labels"].items()}
    return CaseScore(
        id=case["id"],
        labels=labels,
        prediction=files["prediction"],
        reference=files["reference"],
        image=files.get("image"),
        tolerance_mm=case["tolerance_mm"],
        ignore=case.get("ignore"),
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
