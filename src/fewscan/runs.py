"""Whole journeys: cross-validation, and the demonstration on the embedded scans."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fewscan import api
from fewscan.data import dataset as datasets
from fewscan.data.sample import sample_path
from fewscan.errors import ConfigError
from fewscan.judge import evaluate as judging
from fewscan.judge.results import Evaluation, read_evaluation
from fewscan.learn import checkpoint
from fewscan.learn.session import Observer
from fewscan.prediction import predict


def crossval(
    data: api.Data,
    out: Path | str,
    *,
    folds: Literal["loo"] | int = "loo",
    budget: float | str | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
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
        Folder for models, predictions and ``evaluation.json``; finished folds are not repeated.
    folds : "loo" or int
        Leave one patient out, or so many folds.
    budget, steps : float or int, optional
        Of each fold.
    seed : int
        Of the split and of training.
    device : {"auto", "cpu", "cuda", "cuda:N", "mps"}
        Where to run.
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
    files = {case.id: case for case in found.labelled}
    parts = []
    split = datasets.folds(found, folds, seed=seed)
    for i, (train_ids, test_ids) in enumerate(split):
        folder = out / f"fold_{i}"
        record = folder / "evaluation.json"
        if record.is_file():
            parts.append(read_evaluation(record))
            continue
        if observe is not None:
            observe(
                f"fold {i + 1} of {len(split)}: {len(train_ids)} cases to learn from, {', '.join(test_ids)} left out"
            )
        chosen = datasets.select(found, labelled=train_ids, unlabelled=[c.id for c in found.unlabelled])
        unfinished = (folder / "model" / "state.safetensors").is_file()
        model = api.train(
            chosen, folder / "model", budget=budget, steps=steps, seed=seed, device=device, settings=settings,
            method=method, resume=unfinished and not (folder / "model" / "model.json").is_file(), observe=observe,
        ) if not (folder / "model" / "model.json").is_file() else api.load(folder / "model")  # fmt: skip
        scores = []
        for case in (files[c] for c in test_ids):
            assert case.label is not None
            (done,) = predict(model, case.images, folder / "predictions")
            scores.append(
                judging.evaluate(done.path, case.label, images=case.images[0], names=found.names, ignore=found.ignore)
            )
        part = judging.merge([_renamed(s, c) for s, c in zip(scores, test_ids, strict=True)])
        part.save(record)
        parts.append(part)
    whole = judging.merge(parts)
    whole.save(out / "evaluation.json")
    return whole


def _renamed(evaluation: Evaluation, case: str) -> Evaluation:
    """The evaluation of a single case under the case's own id."""
    return replace(evaluation, cases=tuple(replace(c, id=case) for c in evaluation.cases))


def demo(
    out: Path | str,
    *,
    budget: float | str = 180.0,
    seed: int = 0,
    device: str = "auto",
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
    checkpoint.write_json(api.check(found).to_json(), out / "check.json")
    model = api.train(found, out / "model", budget=budget, seed=seed, device=device, observe=observe)
    predict(model, sample / "test" / "images", out / "predictions", device=device, observe=observe)
    evaluation = judging.evaluate(
        out / "predictions", sample / "test" / "labels", images=sample / "test" / "images", names=model.names
    )
    evaluation.save(out / "evaluation.json")
    api.report(out, out / "report.html")
    return evaluation


def _clear_demo(out: Path) -> None:
    """Make room for a new demo, and only for that."""
    if out.exists() and any(out.iterdir()):
        if not (out / "demo.json").is_file():
            raise ConfigError(f"{out} holds something that is not a demo's; choose another folder with -o")
        for name in ("model", "predictions"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("check.json", "evaluation.json", "report.html"):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json({"what": "written by fewscan demo"}, out / "demo.json")
