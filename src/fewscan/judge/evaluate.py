"""A folder of predictions against a folder of references."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fewscan.data import io
from fewscan.errors import DataError
from fewscan.judge import metrics
from fewscan.judge.metrics import METRICS
from fewscan.judge.results import CaseScore, Evaluation, plain
from fewscan.judge.statistics import Paired, paired_test
from fewscan.space.geometry import check_same
from fewscan.space.volume import IGNORE

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
ENDINGS = ("_0000", "_segmentation", "_labels", "_label", "_mask", "_seg")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two evaluations over the cases they share; differences are first minus second.

    Parameters
    ----------
    metrics : mapping of str to Paired
        Of the case means, by metric.
    labels : mapping of str to Paired
        Dice, by label that both have.
    only_a, only_b : tuple of str
        Cases that only one of them has.
    """

    metrics: Mapping[str, Paired]
    labels: Mapping[str, Paired]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; NaN becomes None."""
        content: dict[str, Any] = plain(asdict(self))
        return content


def evaluate(
    predictions: Path,
    labels: Path,
    *,
    images: Path | None = None,
    names: Mapping[int, str] | None = None,
    ignore: int | None = None,
    tolerance_mm: float | None = None,
) -> Evaluation:
    """Judge each prediction that has a reference of the same case.

    Parameters
    ----------
    predictions, labels, images : Path
        Folders, or one file each; files belong together by name, whatever their format.
    names : mapping of int to str, optional
        Labels to judge; None takes those of `label_names`, else every value that occurs in a reference.
    ignore : int, optional
        Value in the references that means "not looked at".
    tolerance_mm : float, optional
        Of the surface Dice; None takes each case's mean voxel edge.

    Raises
    ------
    DataError
        If no prediction has a reference.
    GeometryError
        If a prediction is on another grid than its reference.
    """
    found, references = _by_case(predictions), _by_case(labels)
    if predictions.is_file() and labels.is_file():
        references = dict(zip(found, references.values(), strict=True))
    shared = sorted(found.keys() & references.keys())
    if not shared:
        raise DataError(
            f"{predictions}: none of its {len(found)} predictions is named like one of the {len(references)} "
            f"references in {labels}; give matching files one name"
        )
    names = label_names(labels) if names is None else names
    names = names or _values_in([references[case] for case in shared], ignore)
    scans = {} if images is None else _by_case(images)
    cases = []
    for case in shared:
        files = (found[case], references[case], scans.get(case))
        cases.append(_judge(case, files, names=names, ignore=ignore, tolerance_mm=tolerance_mm))
    unmatched = {
        "predictions": tuple(sorted(found.keys() - references.keys())),
        "references": tuple(sorted(references.keys() - found.keys())),
    }
    return Evaluation(cases=tuple(cases), unmatched=unmatched)


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Test two runs against each other on the cases they share.

    Parameters
    ----------
    a, b : Evaluation
        Judged on the same references.

    Raises
    ------
    DataError
        If they share no case.
    """
    first, second = ({case.id: case for case in run.cases} for run in (a, b))
    shared = [id_ for id_ in first if id_ in second]
    if not shared:
        raise DataError(f"the two runs share no case: {sorted(first)[:3]}... against {sorted(second)[:3]}...")
    ours, theirs = (Evaluation(cases=tuple(run[id_] for id_ in shared)) for run in (first, second))
    both = [name for name in ours.names if name in theirs.names]
    return Comparison(
        metrics={m: paired_test(ours.values(m), theirs.values(m)) for m in METRICS},
        labels={n: paired_test(ours.values("dice", label=n), theirs.values("dice", label=n)) for n in both},
        only_a=tuple(sorted(first.keys() - second.keys())),
        only_b=tuple(sorted(second.keys() - first.keys())),
    )


def merge(parts: Iterable[Evaluation]) -> Evaluation:
    """One evaluation out of several, such as the folds of a cross-validation.

    Parameters
    ----------
    parts : iterable of Evaluation
        Without a case in common.

    Raises
    ------
    DataError
        If two of them judge the same case.
    """
    parts = list(parts)
    cases = sorted((case for part in parts for case in part.cases), key=lambda case: case.id)
    for one, other in pairwise(cases):
        if one.id == other.id:
            raise DataError(f"case {one.id} was judged twice; judge each case in one part only")
    keys = dict.fromkeys(key for part in parts for key in part.unmatched)
    unmatched = {key: tuple(sorted({i for part in parts for i in part.unmatched.get(key, ())})) for key in keys}
    return Evaluation(cases=tuple(cases), unmatched=unmatched)


def label_names(labels: Path) -> dict[int, str]:
    """Names that ``labels.json`` or ``dataset.json`` in or beside a folder of label maps gives; else nothing.

    Parameters
    ----------
    labels : Path
        The folder, or one file in it.
    """
    folder = labels if labels.is_dir() else labels.parent
    for path in (where / name for where in (folder, folder.parent) for name in ("labels.json", "dataset.json")):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content = content["labels"] if path.name == "dataset.json" else content
            pairs = [(k, v) if k.lstrip("-").isdigit() else (v, k) for k, v in content.items()]
            found = {int(value): str(name) for value, name in pairs}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f'{path}: labels must be like {{"1": "liver"}}, got {error}') from error
        return {v: n for v, n in sorted(found.items()) if v > 0 and n.lower() not in ("ignore", "background")}
    return {}


def case_id(path: Path) -> str:
    """Name of a file without its format and without endings such as ``_seg`` or ``_0000``.

    Parameters
    ----------
    path : Path
        Of an image or label map.

    Examples
    --------
    >>> case_id(Path("labels/patient_07_seg.nii.gz"))
    'patient_07'
    """
    name = path.name
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), "")
    name = name[: len(name) - len(suffix)]
    ending = next((e for e in ENDINGS if name.endswith(e) and name != e), "")
    return name[: len(name) - len(ending)]


def _by_case(path: Path) -> dict[str, Path]:
    if not path.exists():
        raise DataError(f"{path}: does not exist; give a folder of {', '.join(SUFFIXES)} files or one such file")
    files = [path] if path.is_file() else sorted(path.iterdir())
    found: dict[str, Path] = {}
    for file in files:
        if not file.is_file() or file.name.startswith(".") or not file.name.lower().endswith(SUFFIXES):
            continue
        case = case_id(file)
        if case in found and not file.stem.endswith(tuple(f"_{i:04d}" for i in range(1, 10))):
            raise DataError(f"{file}: {found[case].name} already belongs to case {case}; keep one of the two")
        found.setdefault(case, file)
    return found


def _values_in(references: Sequence[Path], ignore: int | None) -> dict[int, str]:
    values: set[int] = set()
    for path in references:
        values |= {int(v) for v in np.unique(io.read_labels(path, ignore=ignore).data)}
    return {v: f"label {v}" for v in sorted(values - {0, IGNORE})}


def _judge(
    case: str,
    files: tuple[Path, Path, Path | None],
    *,
    names: Mapping[int, str],
    ignore: int | None,
    tolerance_mm: float | None,
) -> CaseScore:
    prediction, reference = io.read_labels(files[0]), io.read_labels(files[1], ignore=ignore)
    check_same(prediction.geometry, reference.geometry, what=f"{files[0]} and {files[1]}")
    spacing = reference.geometry.spacing
    tolerance_mm = metrics.default_tolerance_mm(spacing) if tolerance_mm is None else tolerance_mm
    labels = metrics.score(prediction.data, reference.data, spacing=spacing, names=names, tolerance_mm=tolerance_mm)
    return CaseScore(
        id=case, labels=labels, prediction=files[0], reference=files[1], image=files[2], tolerance_mm=tolerance_mm
    )
