"""Transfer to another population against no adaptation and training from scratch: four minutes a row, two cores.

    python benchmarks/transfer.py --data ../shared/data [--task acdc --k 5 --seed 0 --system transfer]

A source model is trained once for each task and code (ten minutes) and kept in ``--work``; one of half a run is trained
anew. Each row takes k labelled scans of
the target's pool, of as many patients as there are, and tests on patients of the target that no run sees:

* ``none``: the source model as it is (k = 0).
* ``transfer``: `fewscan transfer`; with all scans of the pool as k, the upper bound.
* ``unguarded``: the same with the adapted model in every case, whatever the evidence says: what the guard is worth.
* ``scratch``: `fewscan train` on the same scans for the same time.

``harm`` is the share of test scans that are worse than with the source model by more than one point of Dice. ``source``
is the Dice on scans of the source population that its model was not trained on. ``--development`` draws from one half
of the pool and judges on the other: there, and only there, rates and layers were chosen; its runs are bounded by steps.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from few_label import figures, rounded, stop_if_interrupted
from harness import RESULTS, TRAINING, code_hash, load, rows, show

from fewscan import api
from fewscan.data import dataset as datasets
from fewscan.data.dataset import CaseFiles, Dataset
from fewscan.data.io import read_image, read_labels, write_labelmap
from fewscan.learn.checkpoint import Model
from fewscan.transferring import transfer

TASKS = {  # source and its patients to train on, target and its patients in the pool
    "hippocampus": (("hippocampus_msd", 160), ("hippocampus_oasis", 10)),
    "acdc": (("acdc_source", 38), ("acdc_target", 12)),
}
RUNS = ((1, 0), (5, 0), (10, 0), (5, 1), (1, 1))  # labelled scans, seed
SYSTEMS = ("none", "transfer", "unguarded", "scratch")
RESULT, DEVELOPMENT = "transfer.json", "transfer_development.json"
HARM = 0.01
SAMPLE = 8  # of the source population
PARTS = ("methods/transfer.py", "methods/scores.py", "prediction.py", "judge/metrics.py")


def patients_of(data: Dataset) -> dict[str, list[CaseFiles]]:
    """Labelled cases by patient."""
    found: dict[str, list[CaseFiles]] = {}
    for case in data.labelled:
        found.setdefault(case.patient, []).append(case)
    return found


def only(data: Dataset, patients: list[str]) -> Dataset:
    """The labelled cases of these patients."""
    return datasets.select(data, labelled=[c.id for c in data.labelled if c.patient in set(patients)])


def source_of(root: Path, work: Path, *, task: str) -> tuple[Dataset, Dataset]:
    """Scans to train the source model on, and others of its population; MSD's two halves as one hippocampus."""
    (name, count), _ = TASKS[task]
    data = api.open(root / name)
    if name == "hippocampus_msd":
        data = one_hippocampus(data, work, name=next(iter(api.open(root / "hippocampus_oasis").names.values())))
    patients = sorted(patients_of(data))
    return only(data, patients[:count]), only(data, patients[count:])


def one_hippocampus(data: Dataset, work: Path, *, name: str) -> Dataset:
    """MSD's two halves as one structure of this name."""
    cases = []
    for case in data.labelled:
        path = work / "merged" / f"{case.id}.nii.gz"
        if not path.is_file():
            assert case.label is not None
            label = read_labels(case.label)
            write_labelmap((label.data > 0).astype(np.uint8), path, native=read_image(case.images[0]).native)
        cases.append(replace(case, label=path))
    return replace(data, cases=tuple(cases), names={1: name})


def source_model(train: Dataset, work: Path, *, task: str, minutes: float) -> Model:
    """Trained once for each task, time and code; one of half a run is not read again."""
    folder = work / f"{task}_source_{minutes:g}_{code_hash(parts=TRAINING)[:8]}"
    if (folder / "model.json").is_file():
        model = api.load(folder)
        if not model.provenance["interrupted"]:
            return model
    shutil.rmtree(folder, ignore_errors=True)
    model = api.train(train, folder, budget=minutes * 60, device="cpu", observe=show)
    stop_if_interrupted(model)
    return model


def draw(data: Dataset, *, task: str, k: int, seed: int, development: bool) -> tuple[Dataset, list[CaseFiles]]:
    """k labelled scans of the pool, patients in turns, and the cases to judge on."""
    by_patient = patients_of(data)
    patients = sorted(by_patient)
    pool, tests = patients[: TASKS[task][1][1]], patients[TASKS[task][1][1] :]
    if development:
        pool, tests = pool[::2], pool[1::2]
    rng = np.random.RandomState(seed)
    order = [str(p) for p in rng.permutation(pool)]
    shuffled = {p: [by_patient[p][i].id for i in rng.permutation(len(by_patient[p]))] for p in order}
    turns = [shuffled[p][i] for i in range(max(map(len, shuffled.values()))) for p in order if i < len(shuffled[p])]
    return datasets.select(data, labelled=turns[:k]), [c for p in tests for c in by_patient[p]]


def run(root: Path, work: Path, key: dict[str, str | int | float], *, source_minutes: float) -> dict[str, object]:
    """Make the model of a row, and judge it."""
    task, system, k, seed = str(key["task"]), str(key["system"]), int(key["k"]), int(key["seed"])
    train, rest = source_of(root, work, task=task)
    base = source_model(train, work, task=task, minutes=source_minutes)
    data = api.open(root / TASKS[task][1][0])
    chosen, tests = draw(data, task=task, k=max(k, 1), seed=seed, development="development" in key)
    folder = work / "_".join(str(value) for value in key.values())
    shutil.rmtree(folder, ignore_errors=True)
    limit = {"steps": int(key["steps"])} if "steps" in key else {"budget": 60 * float(key.get("minutes", 1))}
    how = {**limit, "seed": seed, "device": "cpu", "observe": show}
    if system == "none":
        model: Model = base
    elif system == "scratch":
        model = api.train(chosen, folder / "model", **how)  # type: ignore[arg-type]
    else:
        settings = {"transfer.lr": str(key["lr"])} if "lr" in key else {}
        settings |= {"transfer.guard": "no"} if system == "unguarded" else {}
        model = transfer(
            base, chosen, folder / "model", layers=key.get("layers", "auto"), settings=settings, **how,  # type: ignore[arg-type]
        )  # fmt: skip
    if system != "none":
        stop_if_interrupted(model)
    api.predict(model, [c.images[0] for c in tests], folder / "predictions", device="cpu")
    row = figures(api.evaluate(folder / "predictions", data.root / "labels"))
    row |= {"steps": model.provenance["steps"], **verdict_of(model)}
    sample = rest.labelled[:SAMPLE]
    api.predict(model, [c.images[0] for c in sample], folder / "source", device="cpu")
    labels = sample[0].label.parent if sample[0].label else rest.root
    evaluation = api.judging.evaluate(folder / "source", labels, names=dict(rest.names))
    return row | {"source": rounded(evaluation.spread("dice")["mean"])}


def verdict_of(model: Model) -> dict[str, object]:
    """What the guard of a transfer kept, and on which evidence."""
    record = model.provenance.get("transfer")
    if not record:
        return {}
    means = {name: rounded(record.get(name)) for name in ("base", "adapted")}
    return {"kept": record["kept"], "by": record["by"], "evidence": means}


def harm(row: dict[str, object], result: str, key: dict[str, str | int | float], *, code: str) -> dict[str, object]:
    """Share of test scans that became worse than with the source model by the same code, and the mean change."""
    mine = row["cases"]
    assert isinstance(mine, dict)
    for other in load(RESULTS / result):
        alike = all(other["key"].get(name) == key.get(name) for name in ("task", "source_minutes", "development"))
        if other["key"]["system"] == "none" and alike and other["code"] == code:
            change = [mine[case] - dice for case, dice in other["cases"].items() if case in mine]
            return {"harm": rounded(float(np.mean(np.array(change) < -HARM))), "gain": rounded(float(np.mean(change)))}
    return {}


def wanted(args: argparse.Namespace) -> list[dict[str, str | int | float]]:
    """Keys of the rows, in the order in which they are measured."""
    found: list[dict[str, str | int | float]] = []
    for task in TASKS:
        whole = len(only(api.open(args.data / TASKS[task][1][0]), pool_of(args.data, task)).labelled)
        runs = [(k, seed, s) for k, seed in (*RUNS, (whole, 0)) for s in SYSTEMS[1:]]
        for k, seed, system in [(0, 0, "none"), *runs]:
            key: dict[str, str | int | float] = {"task": task, "k": k, "seed": seed, "system": system}
            if all(getattr(args, name) in (None, value) for name, value in key.items()):
                key |= {"source_minutes": args.source_minutes}
                if args.development:
                    key |= {"development": 1}
                    key |= {} if system == "none" else {"steps": args.steps}
                    key |= {"layers": args.layers, "lr": args.lr} if system in ("transfer", "unguarded") else {}
                else:
                    key |= {"minutes": args.minutes}
                found.append(key)
    return found


def pool_of(root: Path, task: str) -> list[str]:
    """Patients of the target that labelled scans are drawn from."""
    _, (name, count) = TASKS[task]
    return sorted(patients_of(api.open(root / name)))[:count]


def main() -> None:
    """Every row that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--work", type=Path, default=Path("work/transfer"), help="scratch folder")
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--source-minutes", type=float, default=10)
    parser.add_argument("--development", action="store_true", help="judge on the pool; see above")
    parser.add_argument("--steps", type=int, default=400, help="with --development: it does not hang on the machine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", default="all", help="with --development")
    parser.add_argument("--lr", type=float, default=1e-3, help="with --development")
    parser.add_argument("--task", choices=tuple(TASKS))
    parser.add_argument("--k", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--system", choices=SYSTEMS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = DEVELOPMENT if args.development else RESULT
    code = code_hash(parts=PARTS)
    for key in wanted(args):
        with rows(result, key, code=code) as row:
            if row is not None:
                row.update(run(args.data, args.work, key, source_minutes=args.source_minutes))
                row.update(harm(row, result, key, code=code) if key["system"] != "none" else {})
                print(key, row["dice"], row.get("kept"), row.get("harm"), flush=True)


if __name__ == "__main__":
    main()
