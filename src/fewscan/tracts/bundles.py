"""Bundles: their names, and the figures of one set against another; files are in TractSeg's layout (`data.bundles`)."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewscan.data.bundles import ENDINGS, SEGMENTATIONS, Mask, bundle_files, grid_of, read_bundle
from fewscan.data.dataset import patient_of
from fewscan.data.io import atomic
from fewscan.data.layouts import TRACT_IMAGES
from fewscan.errors import ConfigError, DataError
from fewscan.judge import metrics
from fewscan.judge.metrics import RULES, Score
from fewscan.judge.results import CaseScore, Evaluation, plain
from fewscan.judge.statistics import bootstrap_interval, patient_means
from fewscan.learn.checkpoint import USE, write_json
from fewscan.space.geometry import Geometry, check_same

ENDS = ("b", "e")
TARGETS = tuple(f"{name}_{side}" for name in ("AF", "CST", "IFO", "ILF", "UF") for side in ("left", "right"))
"""Arcuate, corticospinal, inferior fronto-occipital, inferior longitudinal, uncinate: names as TractSeg writes them."""
RECORD, TABLE, EVALUATION = "bundles.json", "bundles.csv", "evaluation.json"
STATED: Mapping[str, str] = {
    "scored": "in both",
    "missed": "in the reference, predicted empty",
    "not predicted": "in the reference, no file predicted",
    "extra": "predicted, the reference is empty",
    "absent": "empty in both: nothing to score",
}
UNMATCHED: Mapping[str, str] = {
    "predictions": "predicted, not in the reference",
    "references": "in the reference, no prediction: in no mean",
    "bundles": "in the reference, predicted in no case: in no mean",
    "cases": "no bundle that was predicted in any case is in their reference: in no mean",
    "ends": "no ends predicted, though the reference has them: no figures of ends",
}
"""What `evaluate_bundles` could not judge."""
BUNDLE_RULES: Mapping[str, str] = {
    "overlap": "share of the reference that is predicted (Cote et al. 2013, doi 10.1016/j.media.2013.03.009)",
    "overreach": "predicted voxels outside the reference, as a share of the reference (same source); may exceed 1",
    "ends_dice": "mean Dice of the two ends, the better of the two ways to pair them, an end predicted empty with 0; "
    "only where both ends are drawn and both files predicted",
    "ends_mm": "mean distance between the centres of paired ends, where neither is predicted empty",
    "summary": "means over patients of the mean of each patient's cases; evaluation.json has means over cases",
}
FIGURES = ("overlap", "overreach", "ends_dice", "ends_mm")


@dataclass(frozen=True, kw_only=True)
class BundleScore:
    """One bundle of one case; NaN where there is nothing to measure.

    Parameters
    ----------
    stated : str
        A key of `STATED`.
    score : Score
        Dice, surface distances and volumes.
    overlap, overreach : float
        Shares of the reference.
    ends_dice, ends_mm : float
        Of the two ends, where both sides have files of them.
    """

    stated: str
    score: Score
    overlap: float = math.nan
    overreach: float = math.nan
    ends_dice: float = math.nan
    ends_mm: float = math.nan


def mirrored(name: str) -> str:
    """Name of the bundle on the other side; its own where it has no side.

    Parameters
    ----------
    name : str
        As TractSeg writes it.

    Examples
    --------
    >>> mirrored("CST_left"), mirrored("CC_4")
    ('CST_right', 'CC_4')
    """
    for side, other in (("_left", "_right"), ("_right", "_left")):
        if name.endswith(side):
            return name.removesuffix(side) + other
    return name


def case_folders(root: Path) -> dict[str, Path]:
    """Cases below a folder by name, or the folder itself where it is one.

    Parameters
    ----------
    root : Path
        Folder of cases, of one case, or of masks.

    Raises
    ------
    DataError
        If there is no bundle.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a folder with {SEGMENTATIONS}/ or folders of such cases")
    if bundle_files(root):
        return {root.parent.name if root.name == SEGMENTATIONS else root.name: root}
    found = {p.name: p for p in sorted(root.iterdir()) if p.is_dir() and bundle_files(p)}
    if not found:
        raise DataError(f"{root}: no bundle found; {SEGMENTATIONS}/NAME.nii.gz is looked for, here or one folder below")
    return found


def score_bundle(predicted: Mask | None, reference: Mask, *, geometry: Geometry) -> BundleScore:
    """Figures of one bundle.

    Parameters
    ----------
    predicted : (X, Y, Z) bool, optional
        None where no file was predicted.
    reference : (X, Y, Z) bool
        On the same grid.
    geometry : Geometry
        Their grid.

    Examples
    --------
    >>> reference = np.zeros((4, 4, 4), bool); reference[:2] = True
    >>> predicted = np.zeros((4, 4, 4), bool); predicted[1:3] = True
    >>> found = score_bundle(predicted, reference, geometry=Geometry((4, 4, 4), np.eye(4)))
    >>> found.score.dice, found.overlap, found.overreach
    (0.5, 0.5, 0.5)
    """
    given = np.zeros_like(reference) if predicted is None else predicted
    score = metrics.score(
        given.astype(np.uint8), reference.astype(np.uint8), spacing=geometry.spacing, names={1: "bundle"}
    )["bundle"]
    stated = "not predicted" if predicted is None and score.status == "missed" else score.status
    total = int(reference.sum())
    if not total:
        return BundleScore(stated=stated, score=score)
    met, over = int((given & reference).sum()), int((given & ~reference).sum())
    return BundleScore(stated=stated, score=score, overlap=met / total, overreach=over / total)


def score_ends(predicted: Sequence[Mask], reference: Sequence[Mask], *, geometry: Geometry) -> tuple[float, float]:
    """Mean Dice of two ends and mean distance of their centres in mm, paired whichever way fits better.

    Parameters
    ----------
    predicted, reference : two (X, Y, Z) bool
        The ends; where one is predicted empty its Dice is 0, and there is no distance.
    geometry : Geometry
        Their grid.
    """
    if not all(mask.any() for mask in reference):
        return math.nan, math.nan
    ways = ((0, 1), (1, 0))
    dice = [np.mean([metrics.dice(predicted[i], reference[j]) for j, i in enumerate(way)]) for way in ways]
    if not all(mask.any() for mask in predicted):
        return float(max(dice)), math.nan
    ours, theirs = ([_centre(mask, geometry) for mask in masks] for masks in (predicted, reference))
    apart = [np.mean([np.linalg.norm(ours[i] - theirs[j]) for j, i in enumerate(way)]) for way in ways]
    best = int(np.argmin(apart))
    return float(dice[best]), float(apart[best])


def evaluate_bundles(predicted: Path, reference: Path, *, out: Path) -> dict[str, dict[str, BundleScore]]:
    """Judge each bundle of each case that the reference has; write `RECORD`, `TABLE` and `EVALUATION`.

    A bundle that is predicted in some case is wrong where it is missing, and scores 0 there. One that is predicted in
    none was never asked for: it is listed as not predicted, and enters no mean. A case left without any is listed, too.

    Parameters
    ----------
    predicted, reference : Path
        Folders of cases in TractSeg's layout, where cases belong together by name; or one case each, whatever it is
        called.
    out : Path
        Folder to write.

    Raises
    ------
    DataError
        If no case or no bundle belongs together.
    GeometryError
        If grids differ.
    """
    cases, truths = case_folders(predicted), case_folders(reference)
    if bundle_files(predicted) and bundle_files(reference):  # the cases themselves, not folders that hold one each
        cases = {next(iter(truths)): next(iter(cases.values()))}
    shared = [name for name in truths if name in cases]
    if not shared:
        raise DataError(f"{predicted}: cases {sorted(cases)[:3]} are not among {sorted(truths)[:3]} of {reference}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder")
    if not any(bundle_files(cases[case]).keys() & bundle_files(truths[case]).keys() for case in shared):
        raise _nothing_shared(cases[shared[0]], truths[shared[0]])
    given = {name for folder in cases.values() for name in bundle_files(folder)}
    found = {case: _judge(cases[case], truths[case], given=given) for case in shared}
    judged = {case: {name: one for name, one in row.items() if name in given} for case, row in found.items()}
    missing = sorted({name for row in found.values() for name in row} - given)
    drawn, made = ([case for case in shared if bundle_files(of[case], folder=ENDINGS)] for of in (truths, cases))
    evaluation = Evaluation(
        cases=tuple(_case_score(case, row, cases[case], truths[case]) for case, row in judged.items() if row),
        unmatched={
            "predictions": tuple(sorted(cases.keys() - truths)),
            "references": tuple(sorted(truths.keys() - cases)),
            "bundles": tuple(missing),
            "cases": tuple(case for case, row in judged.items() if not row),
            "ends": tuple(case for case in drawn if case not in made),
        },
    )
    evaluation.save(out / EVALUATION)
    write_json(_record(found, evaluation), out / RECORD)
    _write_table(found, out / TABLE)
    return found


def summary(found: Mapping[str, Mapping[str, BundleScore]]) -> dict[str, dict[str, float]]:
    """Means by bundle over patients, the interval of Dice, how many patients have one, and how many cases are scored.

    A patient's figure is the mean of the patient's cases: one with many has no more say than others.

    Parameters
    ----------
    found : mapping of case to bundle to BundleScore
        From `evaluate_bundles`.
    """
    names = sorted({name for bundles in found.values() for name in bundles})
    table = {}
    for name in names:
        held = {case: bundles[name] for case, bundles in found.items() if name in bundles}
        rows, whose = list(held.values()), [patient_of(case) for case in held]
        columns = {key: [getattr(row, key) for row in rows] for key in FIGURES}
        columns |= {key: [getattr(row.score, key) for row in rows] for key in ("dice", "volume_ml", "reference_ml")}
        means = {key: patient_means(zip(whose, values, strict=True)) for key, values in columns.items()}
        low, high = bootstrap_interval(means["dice"])
        table[name] = {key: math.fsum(values) / len(values) if values else math.nan for key, values in means.items()}
        table[name] |= {"low": low, "high": high, "patients": float(len(means["dice"]))}
        table[name] |= {state: float(sum(row.stated == state for row in rows)) for state in STATED}
    return table


def judge_case(case: str, predicted: Path, *, reference: Path, names: Collection[str]) -> Evaluation:
    """The evaluation of some bundles of one case.

    Parameters
    ----------
    case : str
        Its name.
    predicted, reference : Path
        Folders of masks.
    names : collection of str
        Bundles to judge.

    Raises
    ------
    DataError
        If no bundle belongs together.
    GeometryError
        If grids differ.
    """
    if not bundle_files(predicted).keys() & bundle_files(reference).keys():
        raise _nothing_shared(predicted, reference)
    found = {name: score for name, score in _judge(predicted, reference, given=names).items() if name in names}
    return Evaluation(cases=(_case_score(case, found, predicted, reference),))


def _nothing_shared(case: Path, truth: Path) -> DataError:
    ours, theirs = (sorted(bundle_files(folder))[:4] for folder in (case, truth))
    return DataError(f"{case}: none of its bundles {ours} is among {theirs} of {truth}; name them alike")


def _judge(case: Path, truth: Path, *, given: Collection[str]) -> dict[str, BundleScore]:
    """Every bundle of the reference; those that no case is given of have no figures."""
    files, references = bundle_files(case), bundle_files(truth)
    ends, true_ends = (bundle_files(folder, folder=ENDINGS) for folder in (case, truth))
    found = {}
    for name, file in references.items():
        reference, geometry = read_bundle(file)
        score = score_bundle(_read_on(files[name], geometry) if name in files else None, reference, geometry=geometry)
        if name not in given:
            nothing = Score(status=score.score.status, volume_ml=math.nan, reference_ml=score.score.reference_ml)
            score = BundleScore(stated=score.stated, score=nothing)
        pair = [f"{name}_{end}" for end in ENDS]
        if all(end in ends and end in true_ends for end in pair):
            ours, theirs = ([_read_on(of[end], geometry) for end in pair] for of in (ends, true_ends))
            dice, apart = score_ends(ours, theirs, geometry=geometry)
            score = replace(score, ends_dice=dice, ends_mm=apart)
        found[name] = score
    return found


def _read_on(file: Path, geometry: Geometry) -> Mask:
    mask, own = read_bundle(file)
    check_same(own, geometry, what=f"{file} and the reference")
    return mask


def _case_score(case: str, bundles: Mapping[str, BundleScore], predicted: Path, reference: Path) -> CaseScore:
    beside = reference.parent if reference.name == SEGMENTATIONS else reference
    images = (beside / name for name in TRACT_IMAGES.values())  # for pictures
    return CaseScore(
        id=case, labels={name: found.score for name, found in bundles.items()}, prediction=predicted,
        reference=reference, image=next((file for file in images if file.is_file()), None),
        tolerance_mm=metrics.default_tolerance_mm(grid_of(reference).spacing),
    )  # fmt: skip


def _record(found: Mapping[str, Mapping[str, BundleScore]], evaluation: Evaluation) -> dict[str, object]:
    cases = {
        case: {name: plain({**asdict(one), "said": STATED[one.stated]}) for name, one in bundles.items()}
        for case, bundles in found.items()
    }
    return {
        "format": "fewscan bundles 1",
        "summary": plain(summary(found)),
        "cases": cases,
        "unmatched": {key: list(ids) for key, ids in evaluation.unmatched.items()},
        "rules": dict(RULES) | dict(BUNDLE_RULES),
        "use": USE,
    }


def _write_table(found: Mapping[str, Mapping[str, BundleScore]], path: Path) -> None:
    heads = ("case", "bundle", "stated", "dice", "overlap", "overreach", "volume_ml", "reference_ml", "hd95_mm",
             "ends_dice", "ends_mm")  # fmt: skip
    with atomic(path) as part, part.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(heads)
        for case, bundles in found.items():
            for name, one in bundles.items():
                values = (one.score.dice, one.overlap, one.overreach, one.score.volume_ml, one.score.reference_ml,
                          one.score.hd95_mm, one.ends_dice, one.ends_mm)  # fmt: skip
                table.writerow([case, name, STATED[one.stated], *("" if math.isnan(v) else f"{v:.4f}" for v in values)])


def _centre(mask: Mask, geometry: Geometry) -> NDArray[np.float64]:
    place: NDArray[np.float64] = geometry.affine[:3, :3] @ np.argwhere(mask).mean(0) + geometry.affine[:3, 3]
    return place
