"""A folder of predictions against a folder of references."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fewscan.data import io
from fewscan.data.annotation import mark_blank
from fewscan.data.bundles import bundle_files
from fewscan.data.dataset import patient_of
from fewscan.data.dicom import is_series
from fewscan.data.dicom_labels import is_label
from fewscan.data.headers import SUFFIXES
from fewscan.data.layouts import LABEL_TAIL, detect, entries, stem_of
from fewscan.data.listing import read_listing
from fewscan.errors import DataError
from fewscan.judge import metrics
from fewscan.judge.metrics import METRICS
from fewscan.judge.results import CaseScore, Evaluation, plain
from fewscan.judge.statistics import Paired, paired_test
from fewscan.space.geometry import check_same
from fewscan.space.volume import IGNORE


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two evaluations over the cases they share; differences are first minus second.

    Parameters
    ----------
    metrics : mapping of str to Paired
        Of the patients' means, by metric.
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
    known: Mapping[int, str] | None = None,
    ignore: int | None = None,
    tolerance_mm: float | None = None,
) -> Evaluation:
    """Judge each prediction that has a reference of the same case.

    A DICOM SEG or RTSTRUCT is a reference too: beside or below the series that it belongs to, or with ``images``. Its
    structures are found by name, so names must come from somewhere.

    Parameters
    ----------
    predictions, labels, images : Path
        Folders, or one file each; files belong together by name, whatever their format.
    names : mapping of int to str, optional
        Labels to judge, and no others; None takes those listed in a ``labels.json`` or ``dataset.json`` in the folder
        of references or up to two above it, else every value that occurs in one.
    known : mapping of int to str, optional
        What the predictions' labels are called, where nothing else says it.
    ignore : int, optional
        Value in the references that means "not looked at"; None takes the listed one.
    tolerance_mm : float, optional
        Of the surface Dice; None takes each case's mean voxel edge.

    Raises
    ------
    DataError
        If no prediction has a reference, or two claim one.
    GeometryError
        If a prediction is on another grid than its reference.
    """
    if predictions.is_dir() and any(bundle_files(folder) for folder in (predictions, *predictions.iterdir())):
        raise DataError(f"{predictions}: holds bundles, a mask each; judge them with `fewscan tracts evaluate`")
    found, sources = _references(labels)
    pairs, unmatched = _pair(predictions, labels, found)
    names, ignore = _listed(labels, names, ignore)
    scans = {} if images is None else files_by_name(images)
    references = [reference for _, reference in pairs.values()]
    spoken = any(is_label(reference) for reference in references)
    if spoken and not (names or known):
        raise DataError(
            f"{references[0]}: names its structures, and nothing says which number each has in {predictions}; "
            "put a labels.json beside the references"
        )
    names = names or (known if spoken else _values_in(references, ignore, known or {})) or {}
    cases = []
    for case, (prediction, reference) in pairs.items():
        scan = scans.get(stem_of(prediction)) or scans.get(case) or sources.get(reference)
        if scan is None and predictions.is_file() and len(set(scans.values())) == 1:
            scan = next(iter(scans.values()))  # one of each belong together whatever their names
        if scan is None and is_label(reference):
            raise DataError(f"{reference}: lies on the slices of a DICOM series; give the folder of series by --images")
        files = (prediction, reference, scan)
        cases.append(_judge(case, files, names=names, ignore=ignore, tolerance_mm=tolerance_mm))
    return Evaluation(cases=tuple(cases), unmatched=unmatched)


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Test two runs against each other on the cases they share, one value per patient.

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
        raise DataError(
            f"the two runs share no case: the first judged {_some(first)}, the second {_some(second)}; judge both on "
            "the same references"
        )
    ours, theirs = (Evaluation(cases=tuple(run[id_] for id_ in shared)) for run in (first, second))
    both = [name for name in ours.names if name in theirs.names]
    return Comparison(
        metrics={m: _paired(shared, ours.values(m), theirs.values(m)) for m in METRICS},
        labels={n: _paired(shared, ours.values("dice", label=n), theirs.values("dice", label=n)) for n in both},
        only_a=tuple(sorted(first.keys() - second.keys())),
        only_b=tuple(sorted(second.keys() - first.keys())),
    )


def _paired(ids: Sequence[str], a: Sequence[float], b: Sequence[float]) -> Paired:
    """Paired test of the means over each patient's cases that have a value in both runs."""
    both: dict[str, list[tuple[float, float]]] = {}
    for case, x, y in zip(ids, a, b, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            both.setdefault(patient_of(case), []).append((x, y))
    means = [[math.fsum(values) / len(values) for values in zip(*pairs, strict=True)] for pairs in both.values()]
    return paired_test([x for x, _ in means], [y for _, y in means])


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
    return LABEL_TAIL.sub("", stem_of(path)).removesuffix("_0000")


def _references(path: Path) -> tuple[dict[str, Path], dict[Path, Path]]:
    """Reference files by name, and the DICOM series of those that belong to one."""
    if path.is_dir() and any(is_series(p) for p in (path, *path.rglob("*")) if p.is_dir()):
        labelled = [(case, pair.label, pair.images[0]) for case, pair in detect(path).pairs.items() if pair.label]
        return {case: label for case, label, _ in labelled}, {label: image for _, label, image in labelled}
    return {stem_of(file): file for file in _marked(path)}, {}


def _some(cases: Iterable[str]) -> str:
    """A few of them, for a message."""
    names = sorted(cases)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _pair(
    predictions: Path, labels: Path, references: Mapping[str, Path]
) -> tuple[dict[str, tuple[Path, Path]], dict[str, tuple[str, ...]]]:
    """Case id to prediction and reference, by equal names or else equal `case_id`; then what is left over."""
    found = _files(predictions)
    if predictions.is_file() and labels.is_file():
        return {case_id(predictions): (predictions, labels)}, {}
    by_name = _with_ids(references)
    pairs: dict[str, tuple[Path, Path]] = {}
    taken: dict[Path, Path] = {}
    for file in found:
        reference = by_name.get(stem_of(file)) or by_name.get(case_id(file))
        if reference is None:
            continue
        if reference in taken:
            raise DataError(f"{file}: {taken[reference].name} already belongs to {reference}; keep one of the two")
        taken[reference] = file
        pairs[stem_of(file) if stem_of(file) == stem_of(reference) else case_id(file)] = (file, reference)
    if not pairs:
        raise DataError(
            f"{predictions}: none of its {len(found)} predictions is named like one of the {len(references)} "
            f"references in {labels}; give matching files one name"
        )
    left = [file for file in found if file not in taken.values()]
    alone = [name for name, file in references.items() if file not in taken]
    unmatched = {
        "predictions": tuple(stem_of(file) for file in left),
        "references": tuple(alone),
    }
    return dict(sorted(pairs.items())), unmatched


def _files(path: Path, *, series: bool = False) -> list[Path]:
    if is_series(path):
        return [path] if series else []
    if not path.exists():
        raise DataError(f"{path}: does not exist; give a folder of {', '.join(SUFFIXES)} files or one such file")
    if path.is_file():
        return [path]
    files = [file for file in entries(path) if file.is_file() or series]
    return [file for file in files if not stem_of(file).endswith("_probabilities")]


def _marked(path: Path) -> list[Path]:
    """Label maps in a folder; of scans and label maps side by side only what is named as a label map."""
    files = _files(path)
    marked = [file for file in files if LABEL_TAIL.search(stem_of(file))]
    of = {case_id(file) for file in marked}
    others = [case_id(file) for file in files if file not in marked]
    return marked if any(other == case or other.startswith(f"{case}_") for case in of for other in others) else files


def files_by_name(path: Path) -> dict[str, Path]:
    """Image files and DICOM series in a folder, or the one file, by name, and by `case_id` where that is nobody's name.

    Parameters
    ----------
    path : Path
        Folder or file.

    Raises
    ------
    DataError
        If it does not exist.
    """
    return _with_ids({stem_of(file): file for file in _files(path, series=True)})


def _with_ids(named: Mapping[str, Path]) -> dict[str, Path]:
    """Files by name, and by `case_id` where that is nobody's name."""
    found = dict(named)
    for file in named.values():
        found.setdefault(case_id(file), file)
    return found


def _listed(labels: Path, names: Mapping[int, str] | None, ignore: int | None) -> tuple[Mapping[int, str], int | None]:
    """Names and ignore value as given, else as listed in the folder of label maps or up to two above it."""
    folder = (labels if labels.is_dir() else labels.parent).absolute()
    listings = (read_listing(where) for where in (folder, *folder.parents[:2]))
    found = (one for one in listings if one["names"] or one["ignore"] is not None)
    listed: Mapping[str, Any] = next(found, {"names": {}, "ignore": None})
    return listed["names"] if names is None else names, listed["ignore"] if ignore is None else ignore


def _values_in(references: Sequence[Path], ignore: int | None, known: Mapping[int, str]) -> dict[int, str]:
    values: set[int] = set()
    for path in references:
        values |= set(io.label_values(io.read_labels(path, ignore=ignore).data))
    return {v: known.get(v, f"label {v}") for v in sorted(values - {0, IGNORE})}


def _judge(
    case: str,
    files: tuple[Path, Path, Path | None],
    *,
    names: Mapping[int, str],
    ignore: int | None,
    tolerance_mm: float | None,
) -> CaseScore:
    spoken = names if is_label(files[1]) else None
    prediction = io.read_labels(files[0])
    reference = io.read_labels(files[1], names=spoken, ignore=ignore, source=files[2])
    check_same(prediction.geometry, reference.geometry, what=f"{files[0]} and {files[1]}")
    spacing = reference.geometry.spacing
    tolerance_mm = metrics.default_tolerance_mm(spacing) if tolerance_mm is None else tolerance_mm
    drawn = mark_blank(reference.data)
    labels = metrics.score(prediction.data, drawn, spacing=spacing, names=names, tolerance_mm=tolerance_mm)
    return CaseScore(
        id=case,
        labels=labels,
        prediction=files[0],
        reference=files[1],
        image=files[2],
        tolerance_mm=tolerance_mm,
        ignore=ignore,
    )
