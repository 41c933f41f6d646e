"""The Python interface, as small as the command line: `open`, `check`, `train`, `load`, `predict`, `evaluate`, ..."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fewscan.data import dataset as datasets
from fewscan.data import doctor, repair
from fewscan.data.dataset import Dataset
from fewscan.data.sample import sample_path
from fewscan.deliver.pictures import curve_png
from fewscan.deliver.report import write_report
from fewscan.errors import ConfigError, DataError
from fewscan.judge import evaluate as judging
from fewscan.judge.evaluate import Comparison
from fewscan.judge.results import Evaluation, read_evaluation
from fewscan.learn import checkpoint, session
from fewscan.learn.checkpoint import Model
from fewscan.learn.config import Settings, override
from fewscan.learn.hardware import pick
from fewscan.learn.session import Observer, Request
from fewscan.methods import segment
from fewscan.prediction import Prediction, predict

__all__ = [
    "Prediction",
    "check",
    "compare",
    "crossval",
    "demo",
    "evaluate",
    "load",
    "open",
    "predict",
    "report",
    "train",
]

METHODS: dict[str, Callable[[Request], Model]] = {"segment": segment.run}
AUTO = "segment"
DEFAULT_BUDGET = 600.0
Data = Dataset | Path | str


def open(path: Path | str) -> Dataset:  # noqa: A001 (as in PIL.Image.open)
    """Find the cases in a folder, whatever its layout.

    Parameters
    ----------
    path : path
        Folder.

    Raises
    ------
    DataError
        If nothing usable is there.
    """
    return datasets.find(Path(path))


def _dataset(data: Data) -> Dataset:
    return data if isinstance(data, Dataset) else open(data)


def check(data: Data, *, fix: Path | None = None) -> doctor.Checkup:
    """Examine a data set; originals are never touched.

    Parameters
    ----------
    data : Dataset or path
        What to examine.
    fix : Path, optional
        New folder for a repaired copy.

    Raises
    ------
    DataError
        If nothing usable is there, or the folder for the copy is not empty.
    """
    found = _dataset(data)
    checkup = doctor.examine(found)
    if fix is not None:
        repair.fix(found, checkup, out=Path(fix))
    return checkup


def train(
    data: Data,
    out: Path | str,
    *,
    budget: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    extend: float | None = None,
    device: str = "auto",
    max_memory: int | None = None,
    settings: Mapping[str, str] | None = None,
    method: str = "auto",
    dry_run: bool = False,
    observe: Observer | None = None,
) -> Model:
    """Train a model and leave it as a folder.

    Parameters
    ----------
    data : Dataset or path
        Labelled and unlabelled cases.
    out : path
        Model folder; must be new unless the run goes on.
    budget : float, optional
        Seconds, everything included; ten minutes when neither this nor steps is given.
    steps : int, optional
        Steps instead of seconds; repeatable bit for bit on a CPU.
    seed : int
        Of everything random.
    resume : bool
        Go on from the last saved state.
    extend : float, optional
        Seconds to add to a finished run.
    device : {"auto", "cpu", "cuda", "cuda:N", "mps"}
        Where to run.
    max_memory : int, optional
        Bytes that training may take.
    settings : mapping of str to str, optional
        Dotted names and values that replace those of the preset.
    method : {"auto", "segment"}
        Published method.
    dry_run : bool
        Stop after the plan: nothing is trained or written.
    observe : callable, optional
        Gets messages and a `learn.engine.Status` from time to time.

    Raises
    ------
    FewscanError
        If data, settings, folder or memory do not allow it; the message names the remedy.
    """
    if method not in METHODS and method != "auto":
        raise ConfigError(f"method must be auto or one of {', '.join(METHODS)}, got {method!r}")
    method = AUTO if method == "auto" else method
    if budget is None and steps is None and not resume and extend is None:
        budget = DEFAULT_BUDGET
    request = Request(
        dataset=_dataset(data), out=Path(out), method=method, settings=override(Settings(), settings or {}),
        hardware=pick(device), budget=budget, steps=steps, extend=extend, seed=seed, resume=resume,
        max_memory=max_memory, observe=observe, started=time.monotonic(),
    )  # fmt: skip
    checkup = doctor.examine(request.dataset)
    if not checkup.usable:
        worst = next(f for f in checkup.findings if f.severity == "error")
        raise DataError(f"{worst.message}; {worst.remedy}" if worst.remedy else worst.message)
    if dry_run:
        plan = session.make_plan(request)
        request.say(
            f"plan: {len(request.dataset.labelled)} labelled and {len(request.dataset.unlabelled)} unlabelled case(s); "
            f"patch {'x'.join(map(str, plan.patch))} at {'x'.join(f'{s:.3g}' for s in plan.spacing)} mm, "
            f"about {session.estimate_bytes(plan) / 2**30:.1f} GiB of memory; nothing was trained"
        )
        network = checkpoint.build_segmenter(plan, request.settings, seed=seed)
        return Model(segmenter=network, plan=plan, settings=request.settings, provenance={"method": method, "steps": 0})
    model = METHODS[method](request)
    checkpoint.write_json(checkup.to_json(), Path(out) / "check.json")
    curve_png(Path(out) / "history.jsonl", Path(out) / "curve.png")
    return model


def load(path: Path | str) -> Model:
    """Read a model folder.

    Parameters
    ----------
    path : path
        As `train` left it.

    Raises
    ------
    ModelError
        If it is not one, is damaged, or was changed since.
    """
    return checkpoint.load_model(Path(path))


def evaluate(predictions: Path | str, labels: Path | str, *, images: Path | str | None = None) -> Evaluation:
    """Judge a folder of predictions by a folder of references.

    Parameters
    ----------
    predictions, labels, images : path
        Folders, or one file each; files belong together by name.

    Raises
    ------
    FewscanError
        If nothing matches, or grids differ.
    """
    return judging.evaluate(Path(predictions), Path(labels), images=None if images is None else Path(images))


def compare(a: Evaluation | Path | str, b: Evaluation | Path | str) -> Comparison:
    """Paired tests between two runs over the cases that both judged.

    Parameters
    ----------
    a, b : Evaluation or path
        Evaluations, or the ``evaluation.json`` of each.
    """
    first, second = (e if isinstance(e, Evaluation) else read_evaluation(Path(e)) for e in (a, b))
    return judging.compare(first, second)


def crossval(
    data: Data,
    out: Path | str,
    *,
    folds: Literal["loo"] | int = "loo",
    budget: float | None = None,
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
    found, out = _dataset(data), Path(out)
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
        model = train(
            chosen, folder / "model", budget=budget, steps=steps, seed=seed, device=device, settings=settings,
            method=method, resume=unfinished and not (folder / "model" / "model.json").is_file(), observe=observe,
        ) if not (folder / "model" / "model.json").is_file() else load(folder / "model")  # fmt: skip
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


def report(directory: Path | str, out: Path | str) -> Path:
    """Write one offline HTML file about a folder of results.

    Parameters
    ----------
    directory : path
        With a model, predictions or an evaluation in it.
    out : path
        HTML file to write.

    Raises
    ------
    FewscanError
        If there is nothing to report on.
    """
    return write_report(Path(directory), Path(out))


def demo(
    out: Path | str, *, budget: float = 180.0, seed: int = 0, device: str = "auto", observe: Observer | None = None
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
    found = open(sample)
    checkpoint.write_json(check(found).to_json(), out / "check.json")
    model = train(found, out / "model", budget=budget, seed=seed, device=device, observe=observe)
    predict(model, sample / "test" / "images", out / "predictions", device=device, observe=observe)
    evaluation = judging.evaluate(
        out / "predictions", sample / "test" / "labels", images=sample / "test" / "images", names=model.names
    )
    evaluation.save(out / "evaluation.json")
    report(out, out / "report.html")
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
