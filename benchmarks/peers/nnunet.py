"""Train the peer nnU-Net on a few labelled cases within a wall-clock budget, and predict the test cases.

Runs in an environment of its own (``pip install -r benchmarks/peers/nnunet.txt``), never in fewscan's:

    python benchmarks/peers/nnunet.py WORK --minutes 5

``WORK/train/{images,labels}`` and ``WORK/test/images`` hold NIfTI files; ``WORK/pred`` and ``WORK/peer.json`` come
out. nnU-Net keeps its own preset: planner, network, patch, batch, augmentation, loss and polynomial schedule. What is
changed, so that its schedule ends annealed exactly when the budget does: the number of iterations is what the budget
holds at the rate measured on this machine while it is idle (``--calibrate`` writes it, 30 seconds), the learning rate
is its own polynomial of the fraction done, and there are no validation epochs in between (they would cost it training
time and select nothing in fold "all"). Counting iterations rather than seconds means that other work on the machine
cannot rob the peer of steps. Planning and pre-processing are outside the budget.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

SET = "Dataset001_peer"


def prepare(work: Path) -> Path:
    """Lay the cases out as nnU-Net wants them and return the root of its three folders."""
    root = work / "nnunet"
    if root.exists():
        shutil.rmtree(root)
    raw = root / "raw" / SET
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    names = json.loads((work / "labels.json").read_text())
    images = sorted((work / "train" / "images").glob("*.nii.gz"))
    for image in images:
        shutil.copy(image, raw / "imagesTr" / f"{image.name[:-7]}_0000.nii.gz")
        shutil.copy(work / "train" / "labels" / image.name, raw / "labelsTr" / image.name)
    labels = {"background": 0} | {name: int(value) for value, name in names.items()}
    dataset = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": len(images), "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(dataset))
    test = root / "test"
    test.mkdir()
    for image in sorted((work / "test" / "images").glob("*.nii.gz")):
        shutil.copy(image, test / f"{image.name[:-7]}_0000.nii.gz")
    for variable, folder in (("nnUNet_raw", "raw"), ("nnUNet_preprocessed", "pre"), ("nnUNet_results", "results")):
        os.environ[variable] = str(root / folder)
        (root / folder).mkdir(exist_ok=True)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--workers", default=None, help="augmentation processes; nnU-Net's own choice if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibrate", action="store_true", help="measure seconds per iteration on an idle machine")
    args = parser.parse_args()
    root = prepare(args.work)
    if args.workers is not None:
        os.environ["nnUNet_n_proc_DA"] = args.workers  # noqa: SIM112 (its name)
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"

    import numpy as np
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module  # noqa: N813

    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002 (what its augmentation draws from)

    class Schedule:
        """Stand-in for PolyLRScheduler, whose base call hands torch >= 2.7 an argument that it no longer takes."""

        def __init__(self, optimizer, initial_lr, max_steps):
            self.optimizer, self.initial_lr = optimizer, initial_lr

        def step(self, fraction):
            for group in self.optimizer.param_groups:
                group["lr"] = self.initial_lr * (1 - fraction) ** 0.9

    module.PolyLRScheduler = Schedule
    extract_fingerprints([1], num_processes=2)
    plan_experiments([1])
    preprocess([1], configurations=("3d_fullres",), num_processes=(2,))
    plans = json.loads((root / "pre" / SET / "nnUNetPlans.json").read_text())
    dataset = json.loads((root / "raw" / SET / "dataset.json").read_text())
    trainer = module.nnUNetTrainer(plans, "3d_fullres", "all", dataset, device=torch.device("cpu"))
    trainer.on_train_start()
    trainer.network.train()

    rate = args.work / "peer_rate.json"
    if args.calibrate:
        trainer.lr_scheduler.step(0)
        trainer.train_step(next(trainer.dataloader_train))
        start, steps = time.monotonic(), 0
        while time.monotonic() - start < 30:
            trainer.train_step(next(trainer.dataloader_train))
            steps += 1
        rate.write_text(json.dumps({"seconds_per_iteration": (time.monotonic() - start) / steps}))
        print(rate.read_text(), flush=True)
        os._exit(0)  # its augmentation workers would otherwise keep the process alive
    seconds_per_iteration = json.loads(rate.read_text())["seconds_per_iteration"]
    steps = round(args.minutes * 60 / seconds_per_iteration)

    start, losses = time.monotonic(), []
    for step in range(steps):
        trainer.lr_scheduler.step(step / steps)
        losses.append(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))
    seconds = time.monotonic() - start
    trainer.disable_checkpointing = False
    trainer.inference_allowed_mirroring_axes = None
    trainer.logger.my_fantastic_logging["ema_fg_dice"].append(0.0)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):
            loader._finish()

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, ("all",), "checkpoint_final.pth")
    out = args.work / "pred"
    out.mkdir(exist_ok=True)
    begin = time.monotonic()
    predictor.predict_from_files(
        str(root / "test"), str(out), overwrite=True, num_processes_preprocessing=1, num_processes_segmentation_export=1
    )
    record = {
        "steps": steps,
        "seconds_per_iteration_idle": seconds_per_iteration,
        "train_seconds": seconds,
        "minutes": args.minutes,
        "seed": args.seed,
        "predict_seconds": time.monotonic() - begin,
        "final_loss": float(np.mean(losses[-10:])),
        "patch": plans["configurations"]["3d_fullres"]["patch_size"],
        "batch": plans["configurations"]["3d_fullres"]["batch_size"],
        "torch": torch.__version__,
        "nnunetv2": "2.5.1",
    }
    (args.work / "peer.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
