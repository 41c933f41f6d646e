"""Whole journeys: cross-validation, and the demonstration on the embedded scans."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fewscan import api
from fewscan.data import dataset as datasets
from fewscan.data.contents import contents_by_case, same
from fewscan.data.listing import read_json
from fewscan.data.sample import sample_path
from fewscan.deliver.records import part
from fewscan.errors import ConfigError, DataError
from fewscan.judge import evaluate as judging
from fewscan.judge.confidence import FILE as CALIBRATION
from fewscan.judge.confidence import Judged, calibrate
from fewscan.judge.doubt import doubt
from fewscan.judge.recipe import recipe_of
from fewscan.judge.results import Evaluation, read_evaluation
from fewscan.learn import checkpoint
from fewscan.learn.config import Settings, override
from fewscan.learn.hardware import pick
from fewscan.learn.infer import torch_predictor
from fewscan.learn.inputs import Scan
from fewscan.learn.networks import Absent
from fewscan.learn.request import Observer
from fewscan.prediction import Prediction, predict
from fewscan.tracts import bundles
from fewscan.training import usable, without_folders

SIGNS = "signs.json"  # of doubt, in each fold
RECIPE = "fold.json"  # what a fold was trained on, judged on, and how
RECORD = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How each fold's model is trained.

    Parameters
    ----------
    method, budget, steps, seed, device, settings, max_memory, observe : as `train`
        Its options of these names.
    """

    method: str
    budget: float | str | None
    steps: int | None
    seed: int
    device: str
    settings: Mapping[str, str] | None
    max_memory: int | None = None
    observe: Observer | None = None


def crossval(
    data: api.Data,
    out: Path | str,
    *,
    folds: Literal["loo"] | int = "loo",
    budget: float | str | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    max_memory: int | None = None,
    settings: Mapping[str, str] | None = None,
    method: str = "auto",
    observe: Observer | None = None,
) -> Evaluation:
    """Train and judge once per fold, whole patients left out at a time.

    Parameters
    ----------
    data : Dataset or path
        Its labelled cases are split; unlabelled ones are used in every fold.
    out : path
        Folder for models, predictions and ``evaluation.json``; finished folds are not repeated. From three patients on
        also ``calibration.json``, from which `predict` tells what Dice to expect.
    folds : "loo" or int
        Leave one patient out, or so many folds.
    budget, steps : float or int, optional
        Of each fold.
    seed : int
        Of the split and of training.
    device : {"auto", "cpu", "cuda", "cuda:N", "mps"}
        Where to run.
    max_memory : int, optional
        Bytes that each training may take.
    settings : mapping of str to str, optional
        As for `train`.
    method : str
        As for `train`.
    observe : callable, optional
        As for `train`.

    Raises
    ------
    FewscanError
        As `train` and `predict` do.
    """
    found, out = api.dataset_of(data), Path(out)
    how = Training(
        method=method, budget=budget, steps=steps, seed=seed, device=device, settings=settings, max_memory=max_memory,
        observe=observe,
    )  # fmt: skip
    say = observe or (lambda _: None)
    _refuse(how, out)
    parts = []
    split = datasets.folds(found, folds, seed=seed)
    if not all((out / f"fold_{i}" / RECORD).is_file() for i in range(len(split))):
        usable(found, observe=observe)  # also what a fold leaves out, which would be found faulty after its training
    contents = contents_by_case(found)
    for i, (train_ids, test_ids) in enumerate(split):
        folder = out / f"fold_{i}"
        known, fold = (folder / RECORD).is_file(), f"fold {i + 1} of {len(split)}"
        if not known:
            say(f"{fold}: {len(train_ids)} cases to learn from, {', '.join(test_ids)} left out")
        parts.append(run_fold(found, folder, train=train_ids, test=test_ids, how=how, contents=contents))
        if known:
            say(f"{fold}: read back from {folder}, with {', '.join(test_ids)} left out")
    whole = judging.merge(parts)
    whole.save(out / RECORD)
    _calibrate(whole, found, out, say=say)
    return whole


def _refuse(how: Training, out: Path) -> None:
    """What would only fail once a fold is trained, and a folder whose evaluation is none of ours."""
    if how.method not in ("auto", *api.METHODS):
        raise ConfigError(f"method must be auto or one of {', '.join(api.METHODS)}, got {how.method!r}")
    if how.method == "register":
        raise ConfigError("--method register trains no segmenter, whose Dice a crossval tells; give segment or joint")
    if how.budget is not None and how.steps is not None:
        raise ConfigError(f"give either --budget {how.budget} or --steps {how.steps} for each fold, not both")
    api.seconds(how.budget)
    override(Settings(), how.settings or {})
    if (out / RECORD).is_file() and not any(out.glob(f"fold_*/{RECIPE}")):
        raise ConfigError(
            f"{out / RECORD} is of another evaluation and would be replaced; choose another -o, or move it away"
        )


def run_fold(
    data: datasets.Dataset,
    folder: Path,
    *,
    train: Sequence[str],
    test: Sequence[str],
    how: Training,
    contents: Mapping[str, str],
) -> Evaluation:
    """Train on some labelled cases, judge on others, and keep both in a folder; a finished one is read back.

    Parameters
    ----------
    data : Dataset
        Of both.
    folder : Path
        For ``model/``, ``predictions/``, ``evaluation.json`` and what they came of.
    train, test : sequence of str
        Ids of labelled cases, of different patients.
    how : Training
        The model's.
    contents : mapping of str to str
        By case, what its files were known by before the first fold (`data.contents`).

    Raises
    ------
    FewscanError
        If the folder is of another training, or as `train` and `predict` do.
    """
    recipe = {"train": list(train), "test": list(test), "seed": how.seed, "budget": how.budget, "steps": how.steps,
              "settings": dict(how.settings or {}), "method": how.method}  # fmt: skip
    recipe |= {} if how.max_memory is None else {"max_memory": how.max_memory}  # it bounds the patches
    files = {case.id: case for case in data.labelled}
    _claim_fold(folder, recipe, {name: contents[name] for name in (*train, *test)})
    record = folder / RECORD
    if record.is_file():
        return read_evaluation(record)
    tested = {files[c].patient for c in test}  # their other scans stay out, with or without labels
    others = [c.id for c in data.unlabelled if c.patient not in tested]
    model = _fold_model(
        datasets.select(data, labelled=train, unlabelled=others), folder / "model", budget=how.budget, steps=how.steps,
        seed=how.seed, device=how.device, settings=how.settings, method=how.method, max_memory=how.max_memory,
        observe=how.observe,
    )  # fmt: skip
    cases = [files[c] for c in test]
    done = predict(model, [Scan(c.id, c.images) for c in cases], folder / "predictions", device=how.device)
    found = judging.merge(_judge(data, case, answer) for case, answer in zip(cases, done, strict=True))
    _note_doubt(model, cases, data, folder=folder, device=how.device)
    found.save(record)
    return found


def _note_doubt(
    model: api.Model, cases: Sequence[datasets.CaseFiles], data: datasets.Dataset, *, folder: Path, device: str
) -> None:
    """Signs of doubt of each left-out case, from the model that has not seen it."""
    if isinstance(model.segmenter, Absent):
        return
    predictor, noted = torch_predictor(model, pick(device)), {}
    for case in cases:
        if (found := doubt(datasets.load(case, data).image, model.plan, predictor=predictor)) is not None:
            noted[case.id] = found.signs
    checkpoint.write_json(noted, folder / SIGNS)


def _calibrate(whole: Evaluation, data: datasets.Dataset, out: Path, *, say: Callable[[str], None]) -> None:
    """Learn from all folds what signs of doubt say of Dice, for predictions of new scans."""
    noted: dict[str, Any] = {}
    patients = {case.id: case.patient for case in data.labelled}
    for path in out.glob(f"fold_*/{SIGNS}"):
        noted |= read_json(path)
    rows = [
        Judged(case=case.id, patient=patients[case.id], label=name, signs=noted[case.id].get(name), dice=score.dice)
        for case in whole.cases  # a label that was missed has no signs: that failure has to be known too
        for name, score in case.labels.items()
        if case.id in noted and not math.isnan(score.dice)
    ]
    try:
        known = calibrate(rows, labels=data.names.values())
    except DataError as error:
        say(f"no expected Dice for new scans: {error}")
        return
    models = [path.parent for path in sorted(out.glob("fold_*/model/model.json"))]  # some delete them when all is done
    recipe = recipe_of([checkpoint.read_description(model) for model in models]) if models else None
    if recipe is not None:  # what was learnt from is known of folds without a model too
        notes = [read_json(note) for note in out.glob(f"fold_*/{RECIPE}")]
        recipe |= {"labelled": sorted({str(i) for note in notes for i in note.get("train", ())}), "folds": len(notes)}
    checkpoint.write_json(replace(known, recipe=recipe).to_json(), out / CALIBRATION)


def _claim_fold(folder: Path, recipe: dict[str, Any], files: Mapping[str, str]) -> None:
    """Refuse to mix what was trained differently, or on other files."""
    note = folder / RECIPE
    if not folder.exists():
        folder.mkdir(parents=True)
        checkpoint.write_json({**recipe, "files": dict(files)}, note)
        return
    stored = read_json(note) if note.is_file() else {}
    if {name: value for name, value in stored.items() if name != "files"} != recipe:
        raise ConfigError(f"{folder} belongs to another cross-validation or learning curve; choose another -o")
    if not (before := part(stored, "files")):
        raise ConfigError(f"{note} does not say of which files it is; choose another -o")
    if changed := [name for name in files if not same(str(before.get(name, "?")), files[name])]:
        raise ConfigError(
            f"{folder} was made before the label or the scan of {', '.join(changed[:3])} changed; choose another -o, "
            "or delete all folders that were"
        )


def _fold_model(data: datasets.Dataset, out: Path, **options: Any) -> api.Model:
    """Train a fold's model, or go on with it, or read it; an interruption ends the whole cross-validation."""
    if (out / "model.json").is_file() and not checkpoint.read_description(out).get("interrupted"):
        return api.load(out)
    model = api.train(data, out, resume=(out / "state.safetensors").is_file(), **options)
    if model.provenance.get("interrupted"):
        raise KeyboardInterrupt
    return model


def _judge(data: datasets.Dataset, case: datasets.CaseFiles, answer: Prediction) -> Evaluation:
    """Score one left-out case on the labels that were looked for in it."""
    assert case.label is not None
    names = {v: n for v, n in data.names.items() if case.drawn is None or v in case.drawn}
    if data.overlapping:
        return bundles.judge_case(case.id, answer.path, reference=case.label, names=list(names.values()))
    found = judging.evaluate(answer.path, case.label, images=case.images[0], names=names, ignore=data.ignore)
    return replace(found, cases=tuple(replace(c, id=case.id) for c in found.cases))


def demo(
    out: Path | str,
    *,
    budget: float | str = 180.0,
    seed: int = 0,
    device: str = "auto",
    max_memory: int | None = None,
    observe: Observer | None = None,
) -> Evaluation:
    """The whole way on the embedded scans: check, train, predict, evaluate, report.

    Parameters
    ----------
    out : path
        Folder to write; an earlier demo there is replaced.
    budget : float
        Seconds for everything up to the trained model.
    seed : int
        Of everything random.
    device : {"auto", "cpu", "cuda", "cuda:N", "mps"}
        Where to run.
    max_memory : int, optional
        Bytes that training may take.
    observe : callable, optional
        Gets messages and a `learn.engine.Status` from time to time.

    Raises
    ------
    FewscanError
        If the folder holds something that is not a demo's.
    """
    out, sample = Path(out), sample_path()
    _clear_demo(out)
    found = api.open(sample)
    checkpoint.write_json(without_folders(api.check(found, observe=observe)), out / "check.json")
    model = api.train(
        found, out / "model", budget=budget, seed=seed, device=device, max_memory=max_memory, observe=observe
    )
    predict(model, sample / "test" / "images", out / "predictions", device=device, observe=observe)
    evaluation = judging.evaluate(
        out / "predictions", sample / "test" / "labels", images=sample / "test" / "images", names=model.names
    )
    evaluation.save(out / "evaluation.json")
    api.report(out, out / "report.html")
    return evaluation


def _clear_demo(out: Path) -> None:
    """Make room for a new demo, and only for that."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / "demo.json").is_file():
            raise ConfigError(f"{out} holds something that is not a demo's; choose another folder with -o")
        for name in ("model", "predictions"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("check.json", "evaluation.json", "report.html"):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json({"what": "written by fewscan demo"}, out / "demo.json")
