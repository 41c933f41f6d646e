"""What the rows of ``tracts.py`` share: cohorts on disk, views of them by kind of input, and how bundles are judged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewscan.data.bundles import bundle_files, read_bundle
from fewscan.data.layouts import TRACT_IMAGES
from fewscan.judge.metrics import dice
from fewscan.tracts.anatomy import Anatomy
from fewscan.tracts.bundles import TARGETS
from fewscan.tracts.cohort import CASE, make_cohort
from fewscan.tracts.population import CohortConfig

KINDS = {"peaks": "peaks", "tensor": "tensor", "scalars": "scalar"}  # input of a row, channel_kind of the data set
TWINS = ("A_healthy", "A_tumour", "B_healthy", "B_tumour")

Scores = dict[str, dict[str, list[float]]]  # subject to twin to the Dice of each of TARGETS


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a benchmark reads and writes, and what it is made from.

    Parameters
    ----------
    real : Anatomy
        Whom all people are made from.
    data : Path
        Folder of the real subject.
    work : Path
        Scratch folder.
    config : CohortConfig
        The cohort.
    jobs : int
        Scans made at a time.
    """

    real: Anatomy
    data: Path
    work: Path
    config: CohortConfig
    jobs: int

    def cohort(self, name: str = "cohort", *, config: CohortConfig | None = None) -> Path:
        """A cohort on disk; what is there is not made again.

        Parameters
        ----------
        name : str
            Folder.
        config : CohortConfig, optional
            Of this cohort; the main one when left out.
        """
        folder = self.work / name
        make_cohort(self.real, folder, config=config or self.config, jobs=self.jobs, tell=print)
        return folder


def cases_of(cohort: Path, split: str) -> list[Path]:
    """Folders of the cases of a split, sorted."""
    return sorted(path.parent for path in (cohort / split).glob(f"*/{CASE}"))


def subject_of(case: Path) -> tuple[str, str]:
    """Person and twin that a case's folder names: ``p038_B_tumour`` to ``p038`` and ``B_tumour``."""
    person, _, twin = case.name.partition("_")
    return person, twin


def view(cases: Iterable[Path], out: Path, *, kind: str, names: Mapping[str, str] | None = None) -> Path:
    """A data set of these cases that takes one kind of input: links, and a ``dataset.json`` that says which.

    Parameters
    ----------
    cases : iterable of Path
        Folders of the cohort.
    out : Path
        Folder, made anew.
    kind : {"peaks", "tensor", "scalars"}
        Input.
    names : mapping of str to str, optional
        Bundle to the bundle whose mask it gets, exchanged once more for each case (`turned`); its own when left out.
    """
    shutil.rmtree(out, ignore_errors=True)
    image = TRACT_IMAGES[KINDS[kind]]
    for number, case in enumerate(cases):
        own = out / case.name
        (own / "bundle_segmentations").mkdir(parents=True)
        for name in (image, "inputs.json"):
            (own / name).symlink_to((case / name).resolve())
        files = bundle_files(case)
        other = files if names is None else {n: files[m] for n, m in turned(names, number).items()}
        for name, file in other.items():
            (own / "bundle_segmentations" / f"{name}.nii.gz").symlink_to(file.resolve())
    (out / "dataset.json").write_text(json.dumps({"channel_kind": KINDS[kind]}))
    return out


def turned(names: Mapping[str, str], times: int) -> dict[str, str]:
    """The exchange of names applied once, and again for each of ``times``, so that cases do not agree."""
    found = dict(names)
    for _ in range(times % max(1, len(names) - 1)):
        found = {name: names[other] for name, other in found.items()}
    return found


def judge(predicted: Path, cases: Iterable[Path]) -> Scores:
    """Dice of each bundle of each case; NaN where a bundle is empty on both sides.

    Parameters
    ----------
    predicted : Path
        Holds ``CASE/bundle_segmentations/NAME.nii.gz``.
    cases : iterable of Path
        Folders of the cohort, with the truth.
    """
    found: Scores = {}
    for case in cases:
        person, twin = subject_of(case)
        found.setdefault(person, {})[twin] = dice_of(predicted / case.name, case)
    return found


def dice_of(predicted: Path, truth: Path) -> list[float]:
    """Dice of each of `TARGETS`; a bundle without a predicted file is an error, an empty one is not."""
    ours, theirs = bundle_files(predicted), bundle_files(truth)
    if lacking := [name for name in TARGETS if name not in ours]:
        raise SystemExit(f"{predicted}: no mask of {', '.join(lacking)}")
    return [dice(read_bundle(ours[name])[0], read_bundle(theirs[name])[0]) for name in TARGETS]


def stored(scores: Scores) -> dict[str, dict[str, str]]:
    """Scores as short text, the bundles in the order of `TARGETS`, ``-`` for NaN."""
    return {
        person: {twin: " ".join("-" if d != d else f"{d:.4f}" for d in values) for twin, values in twins.items()}
        for person, twins in sorted(scores.items())
    }


def twin_means(scores: Scores) -> dict[str, float]:
    """Mean Dice of each twin over subjects, of the mean over their bundles."""
    found = {}
    for twin in TWINS:
        means = [mean(twins[twin]) for twins in scores.values() if twin in twins]
        if means:
            found[twin] = round(mean(means), 4)
    return found


def mean(values: Iterable[float]) -> float:
    """Mean without NaN."""
    finite = [value for value in values if value == value]
    return sum(finite) / len(finite) if finite else float("nan")


def truth_of(cohort: Path) -> dict[str, dict[str, Any]]:
    """What is known of the test subjects' tumours, as scanned by the second protocol.

    Displacement and distance from the core are those of each of `TARGETS` in its order; ``-`` where nothing is left.
    """
    found = {}
    for case in cases_of(cohort, "test"):
        person, twin = subject_of(case)
        if twin != TWINS[3]:
            continue
        told = json.loads((case / CASE).read_text())
        rows = [told["bundles"][name] for name in TARGETS]
        found[person] = {
            "radius_mm": round(told["tumour"]["radius_mm"], 1),
            "target": told["target"]["bundle"],
            "kind": told["target"]["kind"],
            "displacement_mm": " ".join(str(row.get("displacement_mm", "-")) for row in rows),
            "from_core_mm": " ".join(str(row.get("from_core_mm", "-")) for row in rows),
        }
    return found


def exchanged() -> dict[str, str]:
    """Each bundle with the next one's name; none keeps its own when that is done up to nine times."""
    return dict(zip(TARGETS, [*TARGETS[1:], TARGETS[0]], strict=True))
