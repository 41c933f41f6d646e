"""Joint training against each network trained alone: ten minutes, two cores, the same scans.

    python benchmarks/joint.py --data ../shared/data [--task hippocampus_msd --k 5 --seed 0 --system joint]

Each row trains one system on k labelled scans and all unlabelled ones of its task, and tests on scans that no run sees:

* ``segment``: the labelled scans only; segmentation.
* ``register``: all scans, labels of the labelled ones in its anatomy term; registration.
* ``joint``: both.
* ``help_segmenter``, ``help_registrar``: joint, but one network is helped (on the tasks in `ABLATED`, as all below).
* ``atlases_only``: pseudo-labels by the atlases alone.
* ``no_warped``: without labelled scans in the shape of unlabelled ones.
* ``inverse``: with GradICON's inverse consistency.
* ``draft``: no training; labels of the test scans by multi-atlas registration.

A joint run decides by itself whether unlabelled scans help; where it finds that they do not, it trains the segmenter
alone, and its row has no figure of registration. Registration is judged by warping the labels of up to five labelled
scans, one at a time, onto each test scan with the network's answer alone, after the affine part: the mean Dice. No test
scan chooses anything within a run, and its last state is judged; decisions/007 says which rows changed the rule.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from few_label import figures, rounded, stop_if_interrupted
from harness import code_hash, rows, show

from fewscan import api
from fewscan.data import dataset as datasets
from fewscan.data.dataset import Dataset
from fewscan.judge.metrics import dice
from fewscan.learn.checkpoint import Model
from fewscan.methods import pairwise, register
from fewscan.registration import register_config
from fewscan.space import field

TASKS: dict[str, tuple[int, int, tuple[tuple[int, int], ...]]] = {  # training pool, tests, (k, seed)
    "hippocampus_msd": (160, 40, ((5, 0), (1, 0), (5, 1), (5, 2))),
    "oasis_2mm": (12, 6, ((5, 0), (1, 0))),
    "la2018_half": (64, 16, ((8, 0),)),
}
ABLATIONS = {
    "help_segmenter": {"joint.teach": "segmenter"},
    "help_registrar": {"joint.teach": "registrar"},
    "atlases_only": {"joint.agree": "no"},
    "no_warped": {"joint.warped": "no"},
    "inverse": {"pair.inverse": "0.1"},
}
SYSTEMS = ("joint", "segment", "register", "draft", *ABLATIONS)
ABLATED = (("hippocampus_msd", 5, 0), ("hippocampus_msd", 1, 0))  # where unlabelled scans are found to help
MOST_ATLASES = 5
RESULT = "joint.json"
JUDGES = ("methods/pairwise.py", "prediction.py", "judge/metrics.py")
PARTS = {  # what a row rests on, with what that imports
    "segment": ("methods/segment.py", *JUDGES),
    "register": ("methods/register.py", *JUDGES),
    "draft": ("methods/draft.py", *JUDGES),
    "joint": ("methods/joint.py", *JUDGES),
}


def draw(data: Dataset, task: str, *, k: int, seed: int) -> tuple[Dataset, list[str]]:
    """The training set, its other labels hidden, and the ids to test on."""
    pool, tests, _ = TASKS[task]
    ids = [c.id for c in data.labelled]
    train, test = ids[:pool], ids[pool : pool + tests]
    if task == "la2018_half":  # the literature's labelled sets are the first ones of the list
        chosen = train[:k]
    else:
        chosen = [str(i) for i in np.random.RandomState(seed).permutation(train)[:k]]
    return datasets.select(data, labelled=chosen, unlabelled=[i for i in train if i not in chosen]), test


def run(data: Dataset, work: Path, *, task: str, k: int, seed: int, system: str, minutes: float) -> dict[str, object]:
    """Train, predict and judge."""
    chosen, test = draw(data, task, k=k, seed=seed)
    folder = work / f"{task}_k{k}_s{seed}_{system}"
    shutil.rmtree(folder, ignore_errors=True)
    tests = [c for c in data.labelled if c.id in set(test)]
    if system == "draft":
        return drafted(chosen, tests, data)
    method = system if system in ("segment", "register") else "joint"
    model = api.train(
        chosen, folder / "model", budget=minutes * 60, seed=seed, device="cpu", method=method,
        settings=ABLATIONS.get(system, {}),
        observe=show,
    )  # fmt: skip
    stop_if_interrupted(model)
    row: dict[str, object] = {"steps": model.provenance["steps"], "guard": model.provenance.get("guard")}
    if method != "register":
        api.predict(model, [c.images[0] for c in tests], folder / "predictions", device="cpu")
        row |= figures(api.evaluate(folder / "predictions", data.root / "labels"))
    if "registrar" in model.others:  # a joint run that finds no use in unlabelled scans trains none
        row |= registration(model, chosen, tests, data)
    return row


def registration(model: Model, chosen: Dataset, tests: list[datasets.CaseFiles], data: Dataset) -> dict[str, object]:
    """Label transfer, one atlas at a time: affinely, then by the network's answer alone, as `fewscan register` does."""
    config, start = register_config(optimise=0), register.starter(model)
    atlases = [datasets.load(c, data) for c in chosen.labelled[:MOST_ATLASES]]
    scores, before, folds = {}, {}, []
    for files in tests:
        case = datasets.load(files, data)
        got, affine = [], []
        for atlas in atlases:
            assert case.label is not None
            assert atlas.label is not None
            found = pairwise.register(case.image, atlas.image, config=config, start=start, scaling=model.plan.scaling)
            alone = field.from_matrix(found.matrix, case.image.geometry)
            folds.append(found.report["folding"])
            got.append(mean_dice(pairwise.apply_labels(found, atlas.label), case.label.data))
            warped = field.warp_labels(atlas.label.data, atlas.label.geometry, field=alone)
            affine.append(mean_dice(warped, case.label.data))
        scores[files.id], before[files.id] = float(np.mean(got)), float(np.mean(affine))
    return {
        "registration": rounded(float(np.mean(list(scores.values())))),
        "affine": rounded(float(np.mean(list(before.values())))),
        "folding": float(np.mean(folds)),
        "registration_cases": {k: rounded(v) for k, v in scores.items()},
    }


def mean_dice(found: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    """Mean over the labels that occur in the truth."""
    return float(np.mean([dice(found == v, truth == v) for v in np.unique(truth) if v > 0]))


def drafted(chosen: Dataset, tests: list[datasets.CaseFiles], data: Dataset) -> dict[str, object]:
    """Multi-atlas labels of the test scans."""
    from fewscan.methods import draft

    begin = time.monotonic()
    atlases = [datasets.load(c, data) for c in chosen.labelled[:MOST_ATLASES]]
    cases = {}
    for files in tests:
        case = datasets.load(files, data)
        found = draft.draft(case.image, atlases, config=api.register_config(), device=torch.device("cpu"))
        assert case.label is not None
        cases[files.id] = rounded(mean_dice(found.label, case.label.data))
    mean = float(np.mean(list(cases.values())))
    return {"dice": rounded(mean), "cases": cases, "seconds": round(time.monotonic() - begin, 1)}


def wanted(args: argparse.Namespace) -> list[tuple[str, int, int, str]]:
    """Rows in the order in which they are measured."""
    found = []
    for task, (_, _, runs) in TASKS.items():
        for k, seed in runs:
            for system in SYSTEMS:
                if system in ABLATIONS and (task, k, seed) not in ABLATED:
                    continue
                mine = (("task", task), ("k", k), ("seed", seed), ("system", system))
                if all(getattr(args, name) in (None, value) for name, value in mine):
                    found.append((task, k, seed, system))
    return found


def main() -> None:
    """Every row that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--work", type=Path, default=Path("work/joint"), help="scratch folder")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--task", choices=tuple(TASKS))
    parser.add_argument("--k", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--system", choices=SYSTEMS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    for task, k, seed, system in wanted(args):
        key = {"task": task, "k": k, "seed": seed, "system": system, "minutes": args.minutes}
        with rows(RESULT, key, code=code_hash(parts=PARTS.get(system, PARTS["joint"]))) as row:
            if row is not None:
                data = api.open(args.data / task)
                row.update(run(data, args.work, task=task, k=k, seed=seed, system=system, minutes=args.minutes))
                print(key, row.get("dice"), row.get("registration"), flush=True)


if __name__ == "__main__":
    main()
