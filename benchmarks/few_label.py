"""Few labels, five minutes, two cores: Dice and HD95 against the number of labelled scans, beside nnU-Net.

    python benchmarks/few_label.py --data ../shared/data/hippocampus_msd [--peer PYTHON]

Trains on k of the first 160 cases (sorted ids), drawn by seed, and tests on the last 40. No test case is looked at
before the end; the last state of the run is judged, nothing is selected. ``--peer`` names the interpreter of an
environment made by ``pip install -r benchmarks/peers/nnunet.txt``; its runs get the same labels, cores and wall clock.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from harness import TRAINING, code_hash, rows, show

from fewscan import api
from fewscan.data import dataset as datasets
from fewscan.judge.results import Evaluation

RUNS = ((1, 0), (5, 0), (20, 0), (5, 1), (5, 2))
POOL = 160
RESULT = "few_label.json"


def draw(ids: list[str], k: int, seed: int) -> tuple[list[str], list[str]]:
    """Ids to train on and to test on."""
    order = np.random.RandomState(seed).permutation(ids[:POOL])
    return [str(i) for i in order[:k]], ids[POOL:]


def figures(evaluation: Evaluation) -> dict[str, object]:
    """What goes into a row; intervals are None where there are too few cases for one."""
    content = evaluation.to_json()
    summary = content["summary"]
    dice = {case["id"]: case["dice"] for case in content["cases"] if case["dice"] is not None}
    return {
        "dice": rounded(summary["dice"]["mean"]),
        "dice_low": rounded(summary["dice"]["low"]),
        "dice_high": rounded(summary["dice"]["high"]),
        "hd95_mm": rounded(summary["hd95_mm"]["mean"], 3),
        "surface_dice": rounded(summary["surface_dice"]["mean"]),
        "worst": rounded(min(dice.values(), default=None)),
        "cases": {case: rounded(value) for case, value in dice.items()},
    }


def stop_if_interrupted(model: api.Model) -> None:
    """A run that was told to stop is no measurement."""
    if model.provenance["interrupted"]:
        raise KeyboardInterrupt


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Rounded, None staying None."""
    return None if value is None else round(value, digits)


def ours(data: datasets.Dataset, work: Path, *, k: int, seed: int, minutes: float) -> dict[str, object]:
    """Train, predict and judge one run of fewscan."""
    train, test = draw([c.id for c in data.labelled], k, seed)
    folder = work / f"fewscan_k{k}_s{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    chosen = datasets.select(data, labelled=train)
    model = api.train(chosen, folder / "model", budget=minutes * 60, seed=seed, device="cpu", observe=show)
    stop_if_interrupted(model)
    images = [c.images[0] for c in data.labelled if c.id in test]
    api.predict(model, images, folder / "predictions", device="cpu")
    evaluation = api.evaluate(folder / "predictions", data.root / "labels")
    return {**figures(evaluation), "steps": model.provenance["steps"], "seconds": model.provenance["seconds"]}


def peer(data: datasets.Dataset, work: Path, *, k: int, seed: int, minutes: float, python: Path) -> dict[str, object]:
    """Train, predict and judge one run of nnU-Net; a run that is in ``work`` already is only judged."""
    train, test = draw([c.id for c in data.labelled], k, seed)
    folder = work / f"k{k}_s{seed}"
    done = folder / "peer.json"
    if not done.is_file() or json.loads(done.read_text())["minutes"] != minutes:
        for part, ids in (("train", train), ("test", test)):
            for kind in ("images", "labels"):
                (folder / part / kind).mkdir(parents=True, exist_ok=True)
                for i in ids:
                    shutil.copy(data.root / kind / f"{i}.nii.gz", folder / part / kind)
        shutil.copy(data.root / "labels.json", folder)
        script = Path(__file__).parent / "peers" / "nnunet.py"
        command = [str(python), str(script), str(folder), "--minutes", str(minutes), "--seed", str(seed)]
        if not (folder / "peer_rate.json").is_file():
            subprocess.run([*command, "--calibrate"], check=True)
        subprocess.run(command, check=True)
    record = json.loads(done.read_text())
    evaluation = api.evaluate(folder / "pred", data.root / "labels")
    seconds = round(record["steps"] * record["seconds_per_iteration_idle"], 1)
    return {**figures(evaluation), "steps": record["steps"], "seconds": seconds}


def main() -> None:
    """Every row that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("work/few_label"), help="scratch folder")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--peer", type=Path, help="python of the environment that holds nnU-Net")
    parser.add_argument("--only", choices=("fewscan", "nnunet"), help="one of the two systems")
    parser.add_argument("--k", type=int, action="append", help="only this number of labels; may be repeated")
    args = parser.parse_args()
    torch.set_num_threads(2)
    data = api.open(args.data)
    for k, seed in (run for run in RUNS if args.k is None or run[0] in args.k):
        key = {"k": k, "seed": seed, "system": "fewscan", "minutes": args.minutes}
        if args.only != "nnunet":
            with rows(RESULT, key, code=code_hash(parts=TRAINING)) as row:
                if row is not None:
                    row.update(ours(data, args.work, k=k, seed=seed, minutes=args.minutes))
                    print(key, row["dice"], flush=True)
        if args.peer is not None and args.only != "fewscan":
            with rows(RESULT, key | {"system": "nnunetv2"}, code="nnunetv2-2.5.1") as row:
                if row is not None:
                    row.update(peer(data, args.work, k=k, seed=seed, minutes=args.minutes, python=args.peer))
                    print(key | {"system": "nnunetv2"}, row["dice"], flush=True)


if __name__ == "__main__":
    main()
