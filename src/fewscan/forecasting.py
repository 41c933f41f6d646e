"""Where the points of a learning curve come from: cross-validations that are there, or trainings on growing subsets."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewscan.data.contents import contents_by_case
from fewscan.data.dataset import Dataset, patient_of
from fewscan.data.listing import read_json
from fewscan.data.painting import plain_name
from fewscan.errors import ConfigError, DataError
from fewscan.judge.learning_curve import Observation
from fewscan.judge.results import Evaluation, read_evaluation
from fewscan.runs import RECIPE, Training, run_fold

BUDGET_S = 120.0  # of each training
TESTED = 3  # every so many patients one is left out to judge on
INTERVAL, MOST_TESTED = 3, 20  # patients to judge on: for an interval, where three sizes are left, and at most


def from_folds(folders: Sequence[Path], *, names: Iterable[str]) -> list[Observation]:
    """Every scan that cross-validations judged, with the number of labels its model had.

    Parameters
    ----------
    folders : sequence of Path
        Folders that `crossval` wrote.
    names : iterable of str
        Labels of the task.

    Raises
    ------
    DataError
        If one holds no finished fold, or is of other labels.
    ConfigError
        If their models were not trained alike, so that labels are not all that differs.
    """
    found, first, wanted = list[Observation](), dict[str, Any](), {plain_name(name) for name in names}
    for folder in folders:
        records = sorted(folder.glob(f"fold_*/{RECIPE}"))
        finished = [record for record in records if (record.parent / "evaluation.json").is_file()]
        if not finished:
            raise DataError(f"{folder}: holds no finished fold; give a folder that `fewscan crossval` wrote")
        judged = set[str]()
        for record in finished:
            recipe = read_json(record)
            how = {key: recipe.get(key) for key in ("budget", "steps", "settings", "method")}
            first = first or how
            for key in how:
                if how[key] != first[key]:
                    raise ConfigError(
                        f"{record}: trained with {key} {how[key]!r}, other folds with {first[key]!r}; give folds that "
                        "differ in their number of labels only"
                    )
            evaluation = read_evaluation(record.parent / "evaluation.json")
            judged |= {plain_name(name) for name in evaluation.names}
            found += _observations(evaluation, labels=len(recipe.get("train", ())))
        if judged - wanted or (judged < wanted and len(finished) == len(records)):
            raise DataError(
                f"{folder}: judged on {_few(judged)}, the data set holds {_few(wanted)}; give folds of this data set"
            )
    return found


def _few(names: set[str]) -> str:
    return ", ".join([*sorted(names)[:4], *(["..."] if len(names) > 4 else [])]) or "no label"


def by_training(data: Dataset, out: Path, *, how: Training) -> list[Observation]:
    """Train on 1, 2, 4, ... labelled patients, each set within the next, and judge on patients in none of them.

    Parameters
    ----------
    data : Dataset
        Its labelled cases are split; a third of the patients is judged on.
    out : Path
        Each size gets a folder of its own in it, from which it is read when it is finished.
    how : Training
        The models'; two minutes where neither budget nor steps are given.

    Raises
    ------
    DataError
        If there are fewer than two labelled patients.
    ConfigError
        If a folder is of another training.
    """
    plan, test = subsets(data, seed=how.seed)
    if how.budget is None and how.steps is None:
        how = replace(how, budget=BUDGET_S)
    if how.method != "joint":  # the others need no scan without a label, of which one may be damaged
        data = replace(data, cases=data.labelled)
    found, contents = list[Observation](), contents_by_case(data)
    for i, train in enumerate(plan):
        folder = out / f"size_{len(train)}"
        if how.observe is not None and not (folder / "evaluation.json").is_file():
            how.observe(f"size {i + 1} of {len(plan)}: {len(train)} labelled cases, judged on {len(test)} others")
        evaluation = run_fold(data, folder, train=train, test=test, how=how, contents=contents)
        found += _observations(evaluation, labels=len(train))
    return found


def subsets(data: Dataset, *, seed: int) -> tuple[list[list[str]], list[str]]:
    """Ids to train on at each size, and ids to judge on; patients are never split.

    Parameters
    ----------
    data : Dataset
        Its labelled cases are split.
    seed : int
        Of the draw.

    Raises
    ------
    DataError
        If there are fewer than two labelled patients.
    """
    patients = sorted({case.patient for case in data.labelled})
    if len(patients) < 2:
        raise DataError(
            f"{data.root}: {len(patients)} labelled patient(s); a learning curve needs one to learn from and another "
            "to judge on, and four for three sizes"
        )
    random.Random(seed).shuffle(patients)
    held = min(max(1, round(len(patients) / TESTED)), MOST_TESTED)
    if len(patients) >= 2 * INTERVAL:
        held = max(held, INTERVAL)
    pool, tested = patients[held:], set(patients[:held])
    counts = [n for n in (2**i for i in range(len(pool).bit_length())) if n < len(pool)] + [len(pool)]
    plan = [sorted(case.id for case in data.labelled if case.patient in pool[:count]) for count in counts]
    return plan, sorted(case.id for case in data.labelled if case.patient in tested)


def _observations(evaluation: Evaluation, *, labels: int) -> list[Observation]:
    return [
        Observation(labels=labels, case=case.id, patient=patient_of(case.id), dice=case.mean("dice"))
        for case in evaluation.cases
    ]
