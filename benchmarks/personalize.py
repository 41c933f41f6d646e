"""Personalised prediction against the model as it is, on scans of its own population and of others.

    python benchmarks/personalize.py --data ../shared/data [--task acdc --seed 0 --system preset]

A model is trained once for each task and seed (five minutes) and kept in ``--work``. Every test scan is personalised
with ``always``; what ``auto`` would have kept follows from the guard's verdict, so that one pass tells both. Systems:

* ``preset``: as users get it, but for the limit on the time of a scan: none here.
* ``intensity``: atlases deformed by the image alone.
* ``no_average``: the mask of the last round alone, without what was before.
* ``no_refinement``: atlases and mask only.
* ``decoder``, ``norms``: refinement changes this part of the network only.
* ``entropy``: no atlas; the normalisations are tuned to make the answer to the scan sharp (TENT: Wang et al. 2021,
  ICLR, arXiv 2006.10726; here `TENT_STEPS` patches of the scan, by Adam); the answer is the mean over the same
  disturbed views as the preset's first mask. It has no guard: always.
* ``all_atlases``: every labelled scan instead of the nearest five, on acdc, which has more.

``harm`` is the share of scans that lose more than half a point of Dice with ``auto``. Settings were chosen on other
people: training pools of hippocampus_msd, also through the same simulated scanner, and of oasis_2mm, and the second
half of acdc_target. hippocampus_oasis is therefore tested on crops of people who are not in the pool of oasis_2mm. Of
several scans of a patient the mean counts once in the test and the interval. Seconds are of the scans after the
first, with which goes what is found out once. ``peak_gib`` is the largest resident memory of a process that does
nothing but personalise, its imports included. Each case holds the evidence that the guard looked at, so that other
rules can be tried on the rows alone.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import torch
from few_label import rounded, stop_if_interrupted
from harness import code_hash, rows, show
from torch import nn
from transfer import one_hippocampus

from fewscan import api
from fewscan.data import dataset as datasets
from fewscan.data.dataset import CaseFiles, Dataset, patient_of
from fewscan.data.io import read_image, write_image
from fewscan.judge.statistics import over_patients, paired_test
from fewscan.learn import infer
from fewscan.learn.batches import crop, on_plan
from fewscan.learn.checkpoint import Model
from fewscan.learn.hardware import pick
from fewscan.learn.networks import layers
from fewscan.learn.views import views
from fewscan.methods.personalize import FITTING, PersonalizeConfig
from fewscan.prediction import Answer, Prediction, Tick, predict_by
from fewscan.space.volume import Volume, resample

TRAINED = ("methods/segment.py",)  # what a model is trained by
RESULT = "personalize.json"
TASKS = {  # source, labelled scans, target, tests
    "chaos_t2": ("chaos_t2", 5, "chaos_t2", 9),
    "hippocampus_msd": ("hippocampus_msd", 5, "hippocampus_msd", 16),
    "la2018_half": ("la2018_half", 8, "la2018_half", 12),
    "hippocampus_oasis": ("hippocampus_msd", 5, "hippocampus_oasis", 16),
    "acdc": ("acdc_source", 10, "acdc_target", 16),
    "scanner": ("hippocampus_msd", 5, "hippocampus_msd", 16),
}
POOLS = {"hippocampus_msd": 160, "la2018_half": 64}  # from which labelled scans are drawn; tests come after
SYSTEMS: dict[str, PersonalizeConfig | None] = {
    "preset": PersonalizeConfig(),
    "intensity": PersonalizeConfig(anatomy=0.0),
    "no_average": PersonalizeConfig(memory=0.0),
    "no_refinement": PersonalizeConfig(steps=0),
    "all_atlases": PersonalizeConfig(atlases=20),
    "decoder": PersonalizeConfig(layers="decoder"),
    "norms": PersonalizeConfig(layers="norms"),
    "entropy": None,
}
ABLATED = (("chaos_t2", 0), ("scanner", 0))
SEEN_PEOPLE = 12  # of oasis_2mm, the first ones, on whose scans settings were chosen
HARM = 0.005
TENT_STEPS, TENT_RATE = 40, 1e-3
PARTS = ("personalization.py", "judge/metrics.py")


def draw(
    root: Path, work: Path, *, task: str, seed: int, most: int | None = None
) -> tuple[Dataset, Dataset, list[CaseFiles]]:
    """Labelled scans to learn from, the data set of the tests, and those."""
    source, k, target, tests = TASKS[task]
    data = api.open(root / source)
    goal = data if target == source else api.open(root / target)
    if target == "hippocampus_oasis":
        data = one_hippocampus(data, work, name=next(iter(goal.names.values())))
    ids = [c.id for c in data.labelled]
    pool = ids[: POOLS.get(source, len(ids))]
    chosen = pool[:k] if task == "la2018_half" else [str(i) for i in np.random.RandomState(seed).permutation(pool)[:k]]
    rest = [c for c in goal.labelled if c.id not in chosen]
    if target == "hippocampus_oasis":
        seen = {c.id for c in api.open(root / "oasis_2mm").labelled[:SEEN_PEOPLE]}
        rest = [c for c in rest if patient_of(c.id).removeprefix("oasis_") not in seen]
    if source in POOLS and target == source:
        rest = [c for c in goal.labelled if c.id not in pool]
    return datasets.select(data, labelled=chosen), goal, rest[: most or tests]


def other_scanner(tests: list[CaseFiles], folder: Path) -> list[CaseFiles]:
    """The same scans with a bias field, blur, other contrast and slices of 2 mm."""
    made = []
    for number, case in enumerate(tests):
        path = folder / f"{case.id}.nii.gz"
        if not path.is_file():
            volume = read_image(case.images[0])
            x, y, z = volume.geometry.shape
            image = torch.from_numpy(np.array(volume.data))
            low, high = float(image.min()), float(image.max())
            image = ((image - low) / max(high - low, 1e-6)) ** 0.6
            thick = max(1, round(z * volume.geometry.spacing[2] / 2))
            image = resample(resample(image, (max(1, x * 3 // 4), max(1, y * 3 // 4), thick)), (x, y, z))
            rng = torch.Generator().manual_seed(number)
            bias = resample(0.8 * (torch.rand((1, 3, 3, 3), generator=rng) - 0.5), (x, y, z)).exp()
            write_image((image * bias * 1000).numpy(), path, native=volume.native)
        made.append(replace(case, images=(path,)))
    return made


def model_of(train: Dataset, work: Path, *, name: str, seed: int, minutes: float) -> Model:
    """Trained once by the same code, then read, unless of half a run; its labelled scans lie beside it."""
    folder = work / f"{name}_s{seed}_{minutes:g}_{code_hash(parts=TRAINED)[:8]}"
    if not (folder / "model.json").is_file() or api.load(folder).provenance["interrupted"]:
        shutil.rmtree(folder, ignore_errors=True)
        model = api.train(train, folder, budget=minutes * 60, device="cpu", seed=seed, observe=show, keep_atlases=True)
        stop_if_interrupted(model)
    return api.load(folder)


def sharpened(model: Model, scans: list[Path], out: Path) -> list[Prediction]:
    """TENT: a copy of the model for each scan, its normalisations tuned to the scan by the entropy of the answer."""
    hardware, plan = pick("cpu"), model.plan

    def work(volume: Volume, tick: Tick, *, name: str) -> Answer:
        image = on_plan(volume, plan).numpy()
        network = copy.deepcopy(model.segmenter).train()
        first = infer.probabilities(torch.from_numpy(image), plan, predictor=infer.network_predictor(network, hardware))
        inside = (first[1:].sum(0) > 0.5).nonzero()
        if len(inside):
            tune(network, image, inside, size=plan.patch)
        tuned = infer.network_predictor(network.eval().requires_grad_(False), hardware)
        found = views(torch.from_numpy(image), plan, predictor=tuned, count=PersonalizeConfig().views)
        return Answer(infer.labels_from(torch.stack(found).mean(0), plan, shape=volume.geometry.shape), {})

    return predict_by(work, model, scans=scans, folder=out, observe=show)


def tune(network: nn.Module, image: np.ndarray, inside: torch.Tensor, *, size: tuple[int, int, int]) -> None:
    """The steps of TENT, on patches around what the model takes for structures."""
    chosen = layers(network, "norms")
    for name, weight in network.named_parameters():
        weight.requires_grad_(name in chosen)
    optimizer = torch.optim.Adam([w for w in network.parameters() if w.requires_grad], lr=TENT_RATE)
    rng = torch.Generator().manual_seed(0)
    for _ in range(TENT_STEPS):
        centre = inside[int(torch.randint(len(inside), (1,), generator=rng))]
        low = [
            min(max(int(v) - s // 2, 0), max(n - s, 0)) for v, s, n in zip(centre, size, image.shape[1:], strict=True)
        ]
        patch = torch.from_numpy(crop(image, [a + s // 2 for a, s in zip(low, size, strict=True)], size=size))
        log_p = network(patch[None].float()).log_softmax(1)
        loss = -(log_p.exp() * log_p).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run(root: Path, work: Path, *, task: str, seed: int, system: str, minutes: float) -> dict[str, object]:
    """Personalise and judge every test scan of a task."""
    train, goal, tests = draw(root, work, task=task, seed=seed)
    name = "hippocampus_msd" if task == "scanner" else task
    model = model_of(train, work, name=name, seed=seed, minutes=minutes)
    if task == "scanner":
        tests = other_scanner(tests, work / "scanner")
    out = work / f"{task}_s{seed}_{system}"
    shutil.rmtree(out, ignore_errors=True)
    scans = [c.images[0] for c in tests]
    api.predict(model, scans, out / "before", device="cpu")
    assert model.path is not None
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        done, peak = pool.submit(answers, system, model.path, scans, out / "after").result()
    told = {p.id: p.personalized for p in done if p.personalized is not None}
    fits = {p.id: p.id not in told or told[p.id]["reason"] == FITTING for p in done}
    scores = {}
    for when in ("before", "after"):
        found = api.evaluate(out / when, goal.root / "labels").to_json()["cases"]
        scores[when] = {case["id"]: case["labels"] for case in found}
    figures = compared(scores, fits)
    for name, case in figures["cases"].items():
        case |= {"evidence": told[name]["evidence"]} if name in told else {}
    return figures | {
        "seconds": rounded(float(np.mean([p.seconds for p in done[1:]])), 1),
        "most_seconds": rounded(max(p.seconds for p in done[1:]), 1), "peak_gib": rounded(peak, 2),
    }  # fmt: skip


def answers(system: str, folder: Path, scans: list[Path], out: Path) -> tuple[list[Prediction], float]:
    """What a system answers by the model in a folder, and the largest resident memory of this process so far, GiB."""
    torch.set_num_threads(2)
    model, config = api.load(folder), SYSTEMS[system]
    if config is None:
        done = sharpened(model, scans, out)
    else:
        done = api.personalize(
            model, scans, out, mode="always", device="cpu", config=config, budget_per_case=None, observe=show
        )
    return done, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compared(scores: dict[str, dict[str, dict[str, dict[str, float]]]], fits: dict[str, bool]) -> dict[str, Any]:
    """Figures of a row: before, always and auto, the gain with its test, the harm."""
    ids = sorted(scores["before"])
    labels = sorted({label for case in scores["before"].values() for label in case})

    def dice(when: str, case: str, label: str) -> float:
        value = scores[when][case].get(label, {}).get("dice")
        return float("nan") if value is None else float(value)

    table = {when: np.array([[dice(when, c, v) for v in labels] for c in ids]) for when in scores}
    kept = np.array([fits[c] for c in ids])
    table["auto"] = np.where(kept[:, None], table["after"], table["before"])
    mean = {when: np.nanmean(values, 1) for when, values in table.items()}
    change = mean["auto"] - mean["before"]
    whose = [patient_of(c) for c in ids]
    patients = over_patients(zip(whose, mean["auto"].tolist(), mean["before"].tolist(), strict=True))
    gain = paired_test([auto for auto, _ in patients], [before for _, before in patients])
    hardest = int(np.nanargmin(np.nanmean(table["before"], 0)))
    return {
        "before": rounded(float(mean["before"].mean())), "always": rounded(float(mean["after"].mean())),
        "auto": rounded(float(mean["auto"].mean())), "gain": rounded(gain.difference), "gain_low": rounded(gain.low),
        "gain_high": rounded(gain.high), "p": gain.p, "n": len(ids), "patients": gain.n,
        "personalised": int(kept.sum()), "hardest": labels[hardest],
        "hardest_gain": rounded(float(np.nanmean(table["auto"] - table["before"], 0)[hardest])),
        "harm": rounded(float((change < -HARM).mean())), "worst": rounded(float(change.min())),
        "cases": {c: {when: rounded(float(mean[when][i])) for when in mean} for i, c in enumerate(ids)},
    }  # fmt: skip


def main() -> None:
    """Every row that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--work", type=Path, default=Path("work/personalize"), help="scratch folder")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--task", choices=tuple(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--system", choices=tuple(SYSTEMS))
    args = parser.parse_args()
    torch.set_num_threads(2)
    forkserver.ensure_running()  # while this process is small: what it starts would count the memory of its origin
    for task in TASKS:
        for system in SYSTEMS:
            if args.task not in (None, task) or args.system not in (None, system):
                continue
            where = (("acdc", 0),) if system == "all_atlases" else ABLATED
            if system != "preset" and (task, args.seed) not in where:
                continue
            key = {"task": task, "seed": args.seed, "system": system, "minutes": args.minutes}
            with rows(RESULT, key, code=code_hash(parts=PARTS)) as row:
                if row is not None:
                    found = run(args.data, args.work, task=task, seed=args.seed, system=system, minutes=args.minutes)
                    row.update(found)
                    print(key, {k: v for k, v in found.items() if k != "cases"}, flush=True)


if __name__ == "__main__":
    main()
