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
from fewscan.data.dicom_labels import is_label
from fewscan.data.formats import segments_of
from fewscan.data.found import stem_of
from fewscan.data.label_maps import fits, left_out, names_itself
from fewscan.data.listing import read_listing
from fewscan.data.masks import is_masks, mask_files
from fewscan.data.painting import plain_name
from fewscan.errors import DataError
from fewscan.judge import metrics
from fewscan.judge.metrics import METRICS, Score
from fewscan.judge.pairing import files_by_name, pair, references_in
from fewscan.judge.results import CaseScore, Evaluation, plain
from fewscan.judge.statistics import Paired, mean_pair, over_patients, paired_test
from fewscan.learn.request import Observer, counted
from fewscan.space.geometry import check_same
from fewscan.space.volume import IGNORE

OVERLAPS = ("dice", "surface_dice")  # metrics that are 1 where a label is rightly left out


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two evaluations over the cases they share; differences are first minus second.

    Parameters
    ----------
    metrics : mapping of str to Paired
        Of the patients' means over labels that have the number in both, by metric.
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
    observe: Observer | None = None,
) -> Evaluation:
    """Judge each prediction that has a reference of the same case.

    A DICOM SEG or RTSTRUCT is a reference too: beside or below the series that it belongs to, or with ``images``. Its
    structures are found by name, so names must come from somewhere.

    Parameters
    ----------
    predictions, labels, images : Path
        Folders, or one file each; files belong together by name, whatever their format. Where no label map lies
        directly in the folder of references, it may be a data set in any layout, or hold folders of label maps.
    names : mapping of int to str, optional
        Labels to judge, and no others; None takes those listed in a ``labels.json`` or ``dataset.json`` in the folder
        of references or up to two above it, else every value that occurs in one.
    known : mapping of int to str, optional
        What the predictions' labels are called, where nothing else says it.
    ignore : int, optional
        Value in the references that means "not looked at"; None takes the listed one.
    tolerance_mm : float, optional
        Of the surface Dice; None takes each case's mean voxel edge.
    observe : callable, optional
        Gets a `learn.engine.Status` for each case.

    Raises
    ------
    DataError
        If no prediction has a reference, or two claim one, or two references have one name, or a label's number among
        the predictions is another label's among the references.
    GeometryError
        If a prediction is on another grid than its reference.
    """
    if predictions.is_dir() and any(bundle_files(folder) for folder in (predictions, *predictions.iterdir())):
        raise DataError(f"{predictions}: holds bundles, a mask each; judge them with `fewscan tracts evaluate`")
    found, sources, table = references_in(labels)
    pairs, unmatched = pair(predictions, labels, references=found)
    names, ignore = _listed(labels, names, ignore)
    names = names or table
    _refuse_renumbered(known or {}, names or {}, predictions=predictions, labels=labels)
    scans = {} if images is None else files_by_name(images)
    references = [reference for _, reference in pairs.values()]
    unnumbered = [reference for reference in references if is_label(reference) or is_masks(reference)]
    if unnumbered and not (names or known):
        raise DataError(
            f"{unnumbered[0]}: names its structures, and nothing says which number each has in {predictions}; "
            "put a labels.json beside the references"
        )
    spoken = bool(unnumbered) or any(fits(reference, known or {}) for reference in references)
    names = names or (_known(references, ignore, known) if spoken and known else None)
    names = names or _values_in(references, ignore, known or {})
    cases = []
    for case, (prediction, reference) in counted(list(pairs.items()), observe, doing="judging"):
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

    Both values of a patient are of the same labels of the same cases, see ``comparison`` in `metrics.RULES`.

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
    shared = [(one, second[id_]) for id_, one in first.items() if id_ in second]
    if not shared:
        raise DataError(
            f"the two runs share no case: the first judged {_some(first)}, the second {_some(second)}; judge both on "
            "the same references"
        )
    ours, theirs = ({name for pair in shared for name in pair[run].labels} for run in (0, 1))
    names = list(dict.fromkeys(name for one, _ in shared for name in one.labels if name in ours & theirs))
    return Comparison(
        metrics={metric: _paired(shared, metric, labels=names) for metric in METRICS},
        labels={name: _paired(shared, "dice", labels=[name]) for name in names},
        only_a=tuple(sorted(first.keys() - second.keys())),
        only_b=tuple(sorted(second.keys() - first.keys())),
    )


def _paired(cases: Iterable[tuple[CaseScore, CaseScore]], metric: str, *, labels: Sequence[str]) -> Paired:
    """Paired test over patients: labels that have the number in both runs, a case's mean of them, a patient's of cases.

    A mean of each run over what that run alone has would reward a miss: the label that it finds badly has no distance.
    """
    means: list[tuple[str, float, float]] = []
    for one, other in cases:
        rows = [_both(one.labels.get(name), other.labels.get(name), metric) for name in labels]
        if finite := [(x, y) for x, y in rows if math.isfinite(x) and math.isfinite(y)]:
            means.append((patient_of(one.id), *mean_pair(finite)))
    patients = over_patients(means)
    return paired_test([x for x, _ in patients], [y for _, y in patients])


def _both(one: Score | None, other: Score | None, metric: str) -> tuple[float, float]:
    """A label's number in both runs; to be rightly empty where the other has a false positive is an overlap of 1."""
    if one is None or other is None:
        return math.nan, math.nan
    x, y = getattr(one, metric), getattr(other, metric)
    if metric in OVERLAPS and {one.status, other.status} == {"absent", "extra"}:
        return (1.0, y) if one.status == "absent" else (x, 1.0)
    return x, y


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


def _some(cases: Iterable[str]) -> str:
    """A few of them, for a message."""
    names = sorted(cases)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _listed(labels: Path, names: Mapping[int, str] | None, ignore: int | None) -> tuple[Mapping[int, str], int | None]:
    """Names and ignore value as given, else as listed in the folder of label maps or up to two above it."""
    folder = (labels if labels.is_dir() else labels.parent).absolute()
    listings = (read_listing(where) for where in (folder, *folder.parents[:2]))
    found = (one for one in listings if one["names"] or one["ignore"] is not None)
    listed: Mapping[str, Any] = next(found, {"names": {}, "ignore": None})
    return listed["names"] if names is None else names, listed["ignore"] if ignore is None else ignore


def _refuse_renumbered(known: Mapping[int, str], names: Mapping[int, str], *, predictions: Path, labels: Path) -> None:
    """Labels are judged by number: where both sides name theirs and the names say otherwise, each would be another."""
    ours = {plain_name(name): value for value, name in known.items()}
    moved = [
        v for v, name in names.items() if plain_name(known.get(v, "")) != plain_name(name) and plain_name(name) in ours
    ]
    if moved:
        told = ", ".join(f"{names[v]} is {v}, not {ours[plain_name(names[v])]}" for v in moved[:4])
        raise DataError(
            f"{labels}: numbers its labels otherwise than {predictions}: {told}; they are judged by number, so give "
            "the references, and the labels.json beside them, the numbers of the predictions"
        )


def _known(references: Sequence[Path], ignore: int | None, known: Mapping[int, str]) -> dict[int, str]:
    """The names of the predictions' labels, and segments of the references that are none of these: they were missed."""
    names = dict(known)
    for path in references:
        segments = segments_of(path)
        told = set(map(plain_name, segments.values()))
        if told.isdisjoint(map(plain_name, known.values())):  # which is read by number
            names |= {value: f"label {value}" for value in segments if value not in names}
            continue
        for value, name in left_out(path, names, ignore=ignore).items():
            if plain_name(known.get(value, name)) in told:  # else it is refused where it is read
                names[value if value not in names else max(names) + 1] = name
    return names


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
    if is_masks(files[1]):  # a structure without a mask was not looked for
        held = {plain_name(name) for name in mask_files(files[1])}
        names = {value: name for value, name in names.items() if plain_name(name) in held}
    spoken = names if names_itself(files[1]) else None
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
