"""One preset, seven tasks: five labelled scans (two for the lungs), five minutes, two cores, nothing tuned per task.

    python benchmarks/generality.py --data ../shared/data

Patients are put in order by the seed. The first k give one labelled scan each, the next ones are tested on, up to
twelve scans. hippocampus_msd is the only one of these sets on which settings of the preset were tried.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from few_label import figures, stop_if_interrupted
from harness import TRAINING, code_hash, rows, show

from fewscan import api
from fewscan.data import dataset as datasets

TASKS = {
    "hippocampus_msd": 5,
    "hippocampus_oasis": 5,
    "la2018_half": 5,
    "oasis_2mm": 5,
    "acdc_source": 5,
    "chaos_t2": 5,
    "lung_ct": 2,
}
MOST_TESTS = 12
RESULT = "generality.json"


def split(data: datasets.Dataset, k: int, seed: int) -> tuple[list[str], list[str]]:
    """Ids to train on and to test on, no patient in both."""
    patients = sorted({c.patient for c in data.labelled})
    order = [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]
    by_patient = {p: [c.id for c in data.labelled if c.patient == p] for p in patients}
    train = [by_patient[p][0] for p in order[:k]]
    test = [i for p in order[k:] for i in by_patient[p]]
    return train, test[:MOST_TESTS]


def run(folder: Path, work: Path, *, k: int, seed: int, minutes: float) -> dict[str, object]:
    """Train, predict and judge one task."""
    data = api.open(folder)
    train, test = split(data, k, seed)
    shutil.rmtree(work, ignore_errors=True)
    chosen = datasets.select(data, labelled=train)
    model = api.train(chosen, work / "model", budget=minutes * 60, seed=seed, device="cpu", observe=show)
    stop_if_interrupted(model)
    api.predict(model, [c.images[0] for c in data.labelled if c.id in test], work / "predictions", device="cpu")
    evaluation = api.evaluate(work / "predictions", folder / "labels")
    plan = model.plan
    return {
        **figures(evaluation),
        "tests": len(test),
        "labels": len(plan.names),
        "patch": "x".join(map(str, plan.patch)),
        "mirror": plan.mirror,
        "steps": model.provenance["steps"],
    }


def main() -> None:
    """Every row that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the seven sets")
    parser.add_argument("--work", type=Path, default=Path("work/generality"), help="scratch folder")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--task", choices=tuple(TASKS), action="append", help="only this one; may be repeated")
    args = parser.parse_args()
    torch.set_num_threads(2)
    for task in args.task or TASKS:
        key = {"task": task, "k": TASKS[task], "seed": 0, "minutes": args.minutes}
        with rows(RESULT, key, code=code_hash(parts=TRAINING)) as row:
            if row is not None:
                folder = args.data / task
                row.update(run(folder, args.work / task, k=TASKS[task], seed=0, minutes=args.minutes))
                print(key, row["dice"], flush=True)


if __name__ == "__main__":
    main()
