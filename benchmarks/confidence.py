"""Expected Dice without a reference, against the Dice that it turns out to be.

    python benchmarks/confidence.py --data ../shared/data [--task hippocampus_msd --seed 0]

A model is trained on few labelled scans (five minutes, that of personalize.py), and cross-validated leaving one scan
out at a time (``--fold-minutes`` each). From what the folds say, the Dice of each test scan is expected, and compared:

* ``error``: mean absolute difference, mean over labels of a scan.
* ``constant``: the same when the mean of the cross-validation is expected of every scan.
* ``held``: share of the labels found in test scans whose Dice lies in the label's range, beside the ``level`` promised.
* ``flagged``: of the worst tenth of the scans, the share that is in the fifth of which least is expected.
* ``rank``: Spearman's correlation of expected and true Dice.

Tasks: hippocampus_msd, and ``scanner``, the same tests through a simulated scanner change.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from few_label import rounded
from harness import code_hash, rows, show
from personalize import TRAINED, draw, model_of, other_scanner
from scipy.stats import spearmanr

from fewscan import api
from fewscan.judge.confidence import read_calibration
from fewscan.judge.results import read_evaluation
from fewscan.runs import crossval

RESULT = "confidence.json"
TASKS = ("hippocampus_msd", "scanner")
TESTS = 40
PARTS = ("runs.py", "prediction.py")


def run(root: Path, work: Path, *, task: str, seed: int, minutes: float, fold_minutes: float) -> dict[str, object]:
    """Expect and compare."""
    train, goal, tests = draw(root, work, task=task, seed=seed, most=TESTS)
    model = model_of(train, work, name="hippocampus_msd", seed=seed, minutes=minutes)
    folds = work / f"folds_s{seed}_{fold_minutes:g}_{code_hash(parts=TRAINED)[:8]}"
    crossval(train, folds, budget=fold_minutes * 60, seed=seed, device="cpu", observe=show)
    if task == "scanner":
        tests = other_scanner(tests, work / "scanner")
    out = work / f"{task}_s{seed}_expected"
    shutil.rmtree(out, ignore_errors=True)
    done = api.predict(model, [c.images[0] for c in tests], out, calibration=folds, device="cpu")
    scored = api.evaluate(out, goal.root / "labels").to_json()["cases"]
    true = {case["id"]: case["dice"] for case in scored if case["dice"] is not None}
    labels = {p.id: p.expected["labels"] for p in done if p.expected is not None and p.id in true}
    ids = sorted(labels)
    held = [
        row["low"] <= case["labels"][name]["dice"] <= row["high"]
        for case in scored
        for name, row in labels.get(case["id"], {}).items()
        if row["found"] and case["labels"][name]["dice"] is not None
    ]
    expected = np.array([np.mean([row["dice"] for row in labels[i].values()] or [0.0]) for i in ids])
    actual = np.array([true[i] for i in ids])
    known = read_calibration(folds)
    mean = float(np.mean([case.mean("dice") for case in read_evaluation(folds / "evaluation.json").cases]))
    worst = set(np.argsort(actual, kind="stable")[: max(1, round(len(ids) / 10))].tolist())
    flagged = set(np.argsort(expected, kind="stable")[: max(1, round(len(ids) / 5))].tolist())
    return {
        "n": len(ids), "true": rounded(float(actual.mean())), "expected": rounded(float(expected.mean())),
        "error": rounded(float(np.abs(expected - actual).mean())),
        "constant": rounded(float(np.abs(mean - actual).mean())),
        "held": rounded(float(np.mean(held))), "level": rounded(min(width.level for width in known.widths.values())),
        "flagged": rounded(len(worst & flagged) / len(worst)), "rank": rounded(float(spearmanr(expected, actual)[0])),
        "cases": {i: {"expected": rounded(float(e)), "true": rounded(float(a))}
                  for i, e, a in zip(ids, expected, actual, strict=True)},
    }  # fmt: skip


def main() -> None:
    """Every row that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--work", type=Path, default=Path("work/personalize"), help="scratch folder")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--fold-minutes", type=float, default=2)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    for task in TASKS:
        if args.task in (None, task):
            key = {"task": task, "seed": args.seed, "minutes": args.minutes, "fold_minutes": args.fold_minutes}
            with rows(RESULT, key, code=code_hash(parts=PARTS)) as row:
                if row is not None:
                    found = run(
                        args.data, args.work, task=task, seed=args.seed, minutes=args.minutes,
                        fold_minutes=args.fold_minutes,
                    )  # fmt: skip
                    row.update(found)
                    print(key, {k: v for k, v in found.items() if k != "cases"}, flush=True)


if __name__ == "__main__":
    main()
