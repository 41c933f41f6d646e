"""The shift card: how far a target population is from the one a model knows, of what kind, and what to do about it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan import api
from fewscan.data import dataset as datasets
from fewscan.data.dataset import CaseFiles, Dataset
from fewscan.data.headers import suffix_of
from fewscan.data.io import read_labels
from fewscan.data.painting import plain_name
from fewscan.deliver import card
from fewscan.errors import ConfigError, DataError
from fewscan.judge import lesions, looks
from fewscan.judge import shift as judging
from fewscan.judge.lesions import TEMPLATES
from fewscan.judge.pairing import case_id
from fewscan.judge.results import plain
from fewscan.learn import checkpoint, grafting, infer
from fewscan.learn.channels import said
from fewscan.learn.checkpoint import USE
from fewscan.learn.engine import Status
from fewscan.learn.hardware import Hardware, pick
from fewscan.learn.plan import Plan
from fewscan.learn.request import Observer
from fewscan.methods.scores import ever_trained_on, score, score_answer, trained_on
from fewscan.space import field
from fewscan.space.volume import Case
from fewscan.surroundings import deformation_around, placed, structures

MOST_SCANS = 40  # of each population
MOST_JUDGED = 12  # labelled scans of each population that the model is judged on
MOST_LESIONS = 6  # cases with a lesion, and at most as many healthy people, that are registered; the others are not
WORSE = 0.1  # Dice by which the surroundings of a lesion may fall behind the rest before a case needs a human


@dataclass(frozen=True, eq=False)
class _Card:
    """What the parts of a card share."""

    model: checkpoint.Model
    source: Dataset
    target: Dataset
    lesions: dict[str, Path]
    hardware: Hardware
    seed: int
    observe: Observer | None
    started: float

    def tell(self, share: float, note: str) -> None:
        """Progress for people."""
        if self.observe is not None:
            spent = time.monotonic() - self.started
            self.observe(Status(1, None, share, spent, spent * (1 - share) / max(share, 0.02), math.nan, {}, 0.0, note))

    def sample(self, cases: Sequence[CaseFiles], most: int, *, first: frozenset[str] = frozenset()) -> list[CaseFiles]:
        """At most so many of these cases, drawn by the seed; those named first come first."""
        order = np.random.default_rng(self.seed).permutation(len(cases))
        drawn = sorted((cases[i] for i in order), key=lambda case: case.id not in first)[:most]
        return sorted(drawn, key=lambda case: case.id)

    def mask(self, case: Case) -> NDArray[np.bool_] | None:
        """The lesion on the grid of a case; None where there is none."""
        path = self.lesions.get(case.id)
        if path is None:
            return None
        label = read_labels(path)
        geometry = case.image.geometry
        mask = field.warp_nearest(label.data, label.geometry, field=field.from_matrix(np.eye(4), geometry)) > 0
        return mask if mask.any() else None


def shift(
    model: checkpoint.Model | Path | str,
    source: api.Data,
    target: api.Data,
    out: Path | str,
    *,
    lesions: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
    observe: Observer | None = None,
) -> dict[str, Any]:
    """Compare two populations, and write the card with a JSON file of the same name beside it.

    Parameters
    ----------
    model : Model or path
        Trained on the source population.
    source, target : Dataset or path
        Scans of both, labelled or not.
    out : path
        HTML file to write.
    lesions : path, optional
        Folder of masks, named like the target's cases.
    seed : int
        Of samples and permutations.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        Where the model runs.
    observe : callable, optional
        Gets a `learn.engine.Status` as it goes.

    Raises
    ------
    FewscanError
        If a file cannot be used, or channels and masks do not fit.
    """
    page = Path(out)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{page} must end in .html; its JSON file gets the same name")
    _refuse_strange(page.with_suffix(".json"))
    loaded = model if isinstance(model, checkpoint.Model) else api.load(model)
    old, new = api.dataset_of(source), api.dataset_of(target)
    for data in (old, new):
        _refuse_others(data, loaded.plan)
    masks = _masks(Path(lesions), new) if lesions is not None else {}
    work = _Card(loaded, old, new, masks, pick(device, deforms=True), seed, observe, time.monotonic())
    seen = [_looks(work, data, at) for data, at in ((old, 0.0), (new, 0.2))]
    found = judging.systematic(*seen, seed=seed)
    scores = dict[str, dict[str, float]]()
    lesion = _lesions(work, scores) if masks else {}
    normalised = all(scaling.kind == "scan" for scaling in loaded.plan.scaling)
    review = [case for case, row in lesion.get("cases", {}).items() if row["why"]]
    patients = [len({one.patient for one in part}) for part in seen]
    told = judging.tellable(*patients)
    dice = {"source": _dice(work, old, 0.8), "target": _dice(work, new, 0.9, known=scores)}
    lost = dice["source"]["mean"] - dice["target"]["mean"]
    if dice["source"]["trained"] and lost <= 2 * judging.LOST:  # scans it has learnt from flatter it
        lost = math.nan
    record: dict[str, Any] = {
        "source": {"name": old.root.name, "scans": len(seen[0]), "patients": patients[0]},
        "target": {"name": new.root.name, "scans": len(seen[1]), "patients": patients[1]},
        "tellable": told,
        "model": dict(loaded.provenance.get("sha256", {})),
        "advice": judging.advice(
            found, normalised=normalised, deformed=lesion.get("deformed", False), pushed=lesion.get("pushed_mm"),
            review=review, told=told, lost=lost,
        ),
        "systematic": asdict(found),
        "near_lesions": [one.id for one in seen[1] if one.near],
        "scans": {side: {o.id: {k: v.tolist() for k, v in o.numbers.items()} for o in part}
                  for side, part in zip(("source", "target"), seen, strict=True)},
        "dice": dice,
        "lesion": lesion,
        "seconds": round(time.monotonic() - work.started, 1),
        "versions": checkpoint.versions(),
        "use": USE,
    }  # fmt: skip
    page.parent.mkdir(parents=True, exist_ok=True)
    record = plain(record)
    checkpoint.write_json(record, page.with_suffix(".json"))
    card.write_card(record, page)
    return record


def _refuse_strange(path: Path) -> None:
    """A JSON file of the card's name that holds something else, such as the evaluation of a run."""
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not (isinstance(content, dict) and {"systematic", "advice", "tellable"} <= content.keys()):
        raise ConfigError(f"{path} exists and was not written by fewscan shift; give another -o, or move it away")


def _refuse_others(data: Dataset, plan: Plan) -> None:
    """Scans that a model cannot read: of another kind, or without one of its channels."""
    if data.kind != plan.kind:
        raise DataError(f"{data.root} holds {said(data.kind)}, the model takes {said(plan.kind)}; give the same")
    if grafting.columns_of(data.channels, plan, kind=data.kind) is None:
        raise DataError(
            f"{data.root} has the channels {', '.join(data.channels)}, the model takes {', '.join(plan.channels)}; "
            "name the channels alike"
        )


def _masks(folder: Path, target: Dataset) -> dict[str, Path]:
    """Case id to lesion mask, those of no case of the target too; two of one case, or none at all, are refused."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a folder of masks named like the cases of {target.root}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name[0] == "." or suffix_of(path) is None:
            continue
        if (first := found.setdefault(case_id(path), path)) != path:
            raise DataError(f"{path}: {first.name} is a mask of {case_id(path)} too; leave one of them")
    if not found.keys() & {case.id for case in target.cases}:
        raise DataError(f"{folder}: none of its {len(found)} files is named like a case of {target.root}; rename them")
    return found


def _load(work: _Card, files: CaseFiles, data: Dataset) -> Case:
    """A case with the channels that the model takes, in its order and by its names."""
    case = datasets.load(files, data)
    return replace(case, image=grafting.arranged(case.image, work.model.plan, case=case.id))


def _looks(work: _Card, data: Dataset, at: float) -> list[looks.Look]:
    """Measures of each scan."""
    found = []
    model = work.model
    model.segmenter.to(work.hardware.device).eval()
    sample = work.sample(data.cases, MOST_SCANS)
    for i, files in enumerate(sample):
        work.tell(at + 0.2 * i / len(sample), files.id)
        case = _load(work, files, data)
        lesion = work.mask(case) if data is work.target else None
        found.append(looks.look(case.image, model, case=case.id, patient=files.patient, lesion=lesion))
    return found


def _dice(
    work: _Card, data: Dataset, at: float, *, known: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, Any]:
    """The model's Dice on scans of a population; those named as it was trained on are left out while there are others.

    A model remembers names, not scans: another copy of the source population is known by them, and so is, wrongly,
    another population that numbers its cases alike. The target is taken for the one that a model was transferred to
    where it holds every case that this learnt from. Of cases predicted before, the Dice of each label may be known.
    """
    told = work.model.provenance
    if data.root.resolve() == work.source.root.resolve():
        trained = ever_trained_on(told)
    else:
        trained = trained_on(told) if "transfer" in told else set()
        trained = trained if trained <= {case.id for case in data.labelled} else set()
    unseen = frozenset(case.id for case in data.labelled if case.id not in trained)
    rows = {}
    left_out = len(data.labelled) - len(unseen) if unseen else 0
    sample = work.sample([c for c in data.labelled if c.id in unseen] or data.labelled, MOST_JUDGED)
    named = {plain_name(name) for name in work.model.names.values()}
    if not named & {plain_name(name) for name in data.names.values()}:
        return {"mean": math.nan, "cases": {}, "trained": False, "left_out": 0}
    for i, files in enumerate(sample):
        work.tell(at + 0.1 * i / len(sample), files.id)
        scores = (known or {}).get(files.id)
        if scores is None:
            scores = score(work.model, datasets.load(files, data), hardware=work.hardware)
        shared = [value for name, value in scores.items() if plain_name(name) in named]
        rows[files.id] = float(np.mean(shared)) if shared else math.nan
    values = [v for v in rows.values() if math.isfinite(v)]
    mean = float(np.mean(values)) if values else math.nan
    return {"mean": mean, "cases": rows, "trained": not unseen, "left_out": left_out}


def _lesions(work: _Card, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Of each case with a lesion, distances and Dice near and far; of some, deformation around it against the same
    places in healthy scans. What was predicted is scored, too, where it is labelled."""
    registered = _around(work)
    rows: dict[str, dict[str, Any]] = {}
    held = [case for case in work.target.cases if case.id in work.lesions]
    empty: list[str] = []
    for i, files in enumerate(held):
        work.tell(0.6 + 0.2 * i / len(held), f"{files.id}, structures around the lesion")
        case = _load(work, files, work.target)
        lesion = work.mask(case)
        if lesion is None:
            empty.append(files.id)
            continue
        answer = infer.segment(work.model, case.image, predictor=infer.torch_predictor(work.model, work.hardware))
        rows[case.id] = registered.rows.get(case.id, {}) | structures(case, lesion, answer=answer, model=work.model)
        if case.label is not None:
            scores[case.id] = score_answer(answer, case, model=work.model)
    if not rows:
        raise DataError("no lesion mask has a voxel on its scan; draw them on the target's scans")
    measures = {key: _measure(registered, key, seed=work.seed) for key in ("excess", "displacement_mm", "turned_deg")}
    people = [len({patient for _, patient in part}) for part in registered.measured("excess")]
    told = judging.tellable(*people)
    deformed = told and _more(measures["excess"])
    usual = max((value for value, _ in registered.measured("excess")[0]), default=math.nan)
    pushed: dict[str, float] = {}
    for row in rows.values():
        row["why"] = _why(row, deformed=deformed and row.get("excess", -math.inf) > usual)
        for name, mm in row["pushed_mm"].items():
            if math.isfinite(mm):
                pushed[name] = max(mm, pushed.get(name, 0.0))
    means = {}
    for key in ("dice_near", "dice_far"):
        values = [row[key] for row in rows.values() if math.isfinite(row[key])]
        means[key] = float(np.mean(values)) if values else math.nan
    return {
        "cases": rows, "control": registered.control, "registered": len(registered.rows), "measures": measures,
        "tellable": told, "patients": people, "healthy": registered.healthy, "deformed": deformed,
        "pushed_mm": pushed, **means, "near_mm": lesions.NEAR_MM, "empty": empty,
        "unused": sorted(work.lesions[case].name for case in work.lesions.keys() - {files.id for files in held}),
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Around:
    """Deformation around lesions, by case, and at the same places of healthy scans, with the patients of both."""

    rows: dict[str, dict[str, float]]
    control: list[dict[str, float]]
    patients: tuple[list[str], list[str]]  # of the control, of the rows
    healthy: int  # people there are, those of the templates among them

    def measured(self, key: str) -> list[list[tuple[float, str]]]:
        """A measure of the control and of the rows with whose it is, where there was tissue to measure it."""
        parts = (self.control, list(self.rows.values()))
        return [
            [(row[key], patient) for row, patient in zip(part, patients, strict=True) if math.isfinite(row[key])]
            for part, patients in zip(parts, self.patients, strict=True)
        ]


def _around(work: _Card) -> _Around:
    """Templates of healthy people registered onto a sample of the cases with a lesion, and onto scans of others.

    Nothing where there are no more healthy people than templates.
    """
    held = [case for case in work.target.cases if case.id in work.lesions]
    order = np.random.default_rng(work.seed).permutation(len(work.source.cases))
    healthy = [work.source.cases[i] for i in order]
    people = list(dict.fromkeys(files.patient for files in healthy))
    if len(people) <= TEMPLATES:
        return _Around({}, [], ([], []), len(people))
    firsts = [next(files for files in healthy if files.patient == patient) for patient in people[:TEMPLATES]]
    templates = [_load(work, files, work.source).image for files in firsts]
    of = {who: [files for files in healthy if files.patient == who] for who in people[TEMPLATES:]}
    turns = range(max(map(len, of.values())))  # one scan of everybody before a second one of anybody
    spare = [scans[i] for i in turns for scans in of.values() if i < len(scans)][:MOST_LESIONS]
    found, places = _Around({}, [], ([], []), len(people)), []
    sample = work.sample(held, MOST_LESIONS)
    for i, files in enumerate(sample):
        work.tell(0.4 + 0.1 * i / len(sample), f"{files.id}, around the lesion")
        case = _load(work, files, work.target)
        lesion = work.mask(case)
        if lesion is None:
            continue
        found.rows[case.id] = deformation_around(case.image, lesion, templates=templates)
        found.patients[1].append(files.patient)
        places.append(lesion)
    count = max(len(places), len(spare)) if places else 0  # every spare one: few controls can show nothing
    for i in range(count):
        files = spare[i % len(spare)]
        work.tell(0.5 + 0.1 * i / count, f"{files.id}, the same places")
        image = _load(work, files, work.source).image
        place = placed(places[i % len(places)], image.geometry.shape)
        found.control.append(deformation_around(image, place, templates=templates))
        found.patients[0].append(files.patient)
    return found


def _measure(found: _Around, key: str, *, seed: int) -> dict[str, float]:
    """A measure around lesions less that at the same places of healthy scans."""
    kept = found.measured(key)
    if not all(kept):
        return {"value": math.nan, "low": math.nan, "high": math.nan, "p": 1.0}
    (control, theirs), (around, ours) = (zip(*part, strict=True) for part in kept)
    return asdict(judging.difference(control, around, patients=(theirs, ours), seed=seed))


def _more(measure: dict[str, float]) -> bool:
    """Whether there is more than chance explains."""
    return measure["p"] <= judging.RARE and measure["value"] > 0


def _why(row: dict[str, Any], *, deformed: bool) -> list[str]:
    """Reasons for which a person should look at a case."""
    found = ["tissue around it may be deformed"] if deformed else []
    if row["dice_far"] - row["dice_near"] > WORSE:
        found.append("Dice falls near it")
    if moved := lesions.pushed_said(row["pushed_mm"]):
        found.append(moved)
    return found
