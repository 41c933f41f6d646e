"""Registration of pairs of scans without training, beside ANTs, Greedy and DIPY: overlap, distance, folding, seconds.

    python benchmarks/registration.py --data ../shared/data/oasis_2mm [--peer PYTHON] [--pairs 10]

Ordered pairs (fixed, moving) of labelled cases are drawn by seed. The moving label map is warped onto the fixed scan
and compared with the label map there: Dice and HD95 are means over the labels that the fixed one holds, a label that
the warped one lacks counting as Dice 0 and having no distance. ``--peer`` names the interpreter of an environment made
by ``pip install -r benchmarks/peers/classical.txt``; `peers/classical.py` says how each peer is called. All get the
files as they are on disk and two threads.

Seconds are wall clock from two images and a label map on disk to the warped label map on disk; imports do not count.
``register_seconds`` leaves the files and the warping of labels out. Before the first pair, fewscan registers a tiny
synthetic pair off the clock, because numba compiles its loops once per installation. Labels go the way each program
recommends: the label with the largest linear share (fewscan), "genericLabel" (ANTs), "LABEL 0.2vox" (Greedy), nearest
voxel (DIPY). Folding is the share of voxels whose Jacobian determinant is not positive, of the deformable part alone.
The interval of the mean Dice is over fixed patients, each with all of its pairs.

``learned`` rows say of how many pairs the network has seen a scan while it learnt, with its labels or without.

Finished pairs are kept in the work folder, so that an interrupted run goes on with the next one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from harness import RESULTS, code_hash, load, rows

from fewscan.data import dataset as datasets
from fewscan.data.dataset import CaseFiles
from fewscan.data.io import read_image, read_labels, write_labelmap
from fewscan.judge.metrics import score
from fewscan.judge.statistics import bootstrap_interval, paired_test
from fewscan.learn.checkpoint import Model, load_model
from fewscan.methods import pairwise
from fewscan.methods import register as learned
from fewscan.registration import register_config
from fewscan.space import field as fields
from fewscan.space.geometry import Geometry, check_same
from fewscan.space.volume import Labelmap, Volume

RESULT = "registration.json"
PAIRS, PAIRS_OF = 10, {"hippocampus_msd": 60}
OURS = ("unregistered", "affine", "fewscan")
LEARNED = ("learned", "learned_optimised")  # with --model: the network alone, and 30 steps from its answer
PEERS = {
    "ants_syn": "antspyx",
    "greedy": "picsl-greedy",
    "greedy_wncc": "picsl-greedy",
    "dipy_syn": "dipy",
    "ants_syncc": "antspyx",
}
ONLY_WHEN_ASKED = ("ants_syncc",)  # slow
PEER = Path(__file__).parent / "peers" / "classical.py"
THREADS = {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "2", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}

# What is claimed without training, against the best classical peer and against ants_syn.
MOST_BELOW, MOST_FOLDING, MOST_OF_TIME = 0.005, 0.001, 1 / 3

Found = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two cases, the second to be brought onto the first."""

    fixed: CaseFiles
    moving: CaseFiles

    @property
    def name(self) -> str:
        """Id of the fixed case, then of the moving one."""
        return f"{self.fixed.id}__{self.moving.id}"


def draw(ids: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """Ordered pairs of different cases, none twice; fewer are the beginning of more."""
    others = len(ids) - 1
    order = np.random.default_rng(seed).permutation(len(ids) * others)[:count]
    return [(ids[k // others], ids[k % others + (k % others >= k // others)]) for k in order.tolist()]


def ours(system: str, pair: Pair, out: Path, *, model: Model | None = None) -> Found:
    """One run of fewscan, with a model's network if there is one, or of the headers alone."""
    begin = time.perf_counter()
    fixed, moving = (read_image(case.images[0]) for case in (pair.fixed, pair.moving))
    drawn = read_labels(_label(pair.moving))
    start = time.perf_counter()
    if system == "unregistered":
        registered, folding = start, 0.0
        field = fields.from_matrix(np.eye(4), fixed.geometry)
        warped = fields.warp_labels(drawn.data, drawn.geometry, field=field)
    else:
        found = pairwise.register(
            fixed, moving, config=config_of(system), start=None if model is None else learned.starter(model),
            scaling=None if model is None else model.plan.scaling,
        )  # fmt: skip
        registered, folding = time.perf_counter(), found.report["folding"]
        warped = pairwise.apply_labels(found, drawn)
    write_labelmap(warped, out, native=fixed.native)
    return {"seconds": time.perf_counter() - begin, "register_seconds": registered - start, "folding": folding}


def config_of(system: str) -> pairwise.RegisterConfig:
    """How fewscan registers as this system."""
    if system in LEARNED:
        return register_config(optimise=30 if system == "learned_optimised" else 0)
    return pairwise.RegisterConfig(transform="affine" if system == "affine" else "deformable")


def peer(system: str, pair: Pair, out: Path, *, python: Path) -> Found:
    """One run of a peer in its own environment."""
    field = out.with_name("field.nii")
    files = [pair.fixed.images[0], pair.moving.images[0], _label(pair.moving), out, field]
    command = [str(python), str(PEER), system, *(str(path) for path in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | THREADS)
    if done.returncode:
        raise RuntimeError(f"{system} failed on {pair.name}: {done.stderr[-2000:] or done.stdout[-2000:]}")
    told = re.findall(r'\{"seconds".*?\}', done.stdout)  # some print without an end of line before it
    if not told:
        raise RuntimeError(f"{system} told no seconds of {pair.name}: {done.stderr[-2000:] or done.stdout[-2000:]}")
    record = json.loads(told[-1])
    kept = {name: record[name] for name in ("seconds", "register_seconds")}
    return kept | {"folding": folding_of(field) if field.exists() else None}


def folding_of(path: Path) -> float:
    """Folding of a displacement (X, Y, Z, 3) in RAS+ mm."""
    image = nib.load(path)
    to_voxels = np.linalg.inv(image.affine[:3, :3]).astype(np.float32)
    u = np.einsum("ij,xyzj->ixyz", to_voxels, np.asarray(image.dataobj, np.float32))
    return fields.folding(torch.from_numpy(u)[None])


def judge(warped: Path, fixed: CaseFiles) -> Found:
    """Mean Dice and HD95 over the labels of the fixed label map, and how many of them the warped one lacks."""
    got, want = read_labels(warped), read_labels(_label(fixed))
    check_same(got.geometry, want.geometry, what=f"warped labels and those of {fixed.id}")
    found = score(got.data, want.data, spacing=want.geometry.spacing, names=want.names).values()
    return {
        "dice": statistics.mean(s.dice for s in found),
        "hd95_mm": _mean([s.hd95_mm for s in found if math.isfinite(s.hd95_mm)]),
        "missed": sum(s.status == "missed" for s in found),
        "labels": len(found),
    }


def kept(path: Path, measure: Callable[[], Found]) -> Found:
    """What a file of an earlier run holds; measured and written where there is none."""
    if not path.is_file():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found) + "\n", encoding="utf-8")
        part.replace(path)
    answer: Found = json.loads(path.read_text(encoding="utf-8"))
    return answer


def figures(pairs: Sequence[Pair], found: Sequence[Found]) -> Found:
    """What goes into a row."""
    dice = [one["dice"] for one in found]
    low, high = bootstrap_interval(dice, groups=[pair.fixed.patient for pair in pairs])
    folding = [one["folding"] for one in found if one["folding"] is not None]
    return {
        "dice": _rounded(statistics.mean(dice)),
        "dice_low": _rounded(low),
        "dice_high": _rounded(high),
        "hd95_mm": _rounded(_mean([one["hd95_mm"] for one in found if one["hd95_mm"] is not None]), 3),
        "folding": _rounded(_mean(folding), 6),
        "folding_worst": _rounded(max(folding, default=None), 6),
        "seconds": round(statistics.median(one["seconds"] for one in found), 3),
        "seconds_mean": round(statistics.mean(one["seconds"] for one in found), 3),
        "register_seconds": round(statistics.median(one["register_seconds"] for one in found), 3),
        "missed": sum(one["missed"] for one in found),
        "cases": {pair.name: round(value, 4) for pair, value in zip(pairs, dice, strict=True)},
    }


def seen(model: Model | None, pairs: Sequence[Pair]) -> dict[str, int]:
    """Pairs of which a network has learnt from a scan, with its labels or without; nothing without a network."""
    if model is None:
        return {}
    known = {kind: set(model.provenance[kind]) for kind in ("labelled", "unlabelled")}
    return {
        f"pairs_seen_{kind}": sum(not {pair.fixed.id, pair.moving.id}.isdisjoint(ids) for pair in pairs)
        for kind, ids in known.items()
    }


def warm_up() -> None:
    """Let numba compile: register two small balls."""
    geometry = Geometry((24, 24, 24), np.eye(4))
    places = np.stack(np.meshgrid(*[np.arange(24.0)] * 3, indexing="ij"))
    images = [np.exp(-((places - c) ** 2).sum(0) / 40)[None].astype(np.float32) for c in (11.0, 12.5)]
    fixed, moving = (Volume(data, geometry, geometry) for data in images)
    found = pairwise.register(fixed, moving)
    pairwise.apply_labels(found, Labelmap((moving.data[0] > 0.5).astype(np.uint16), geometry, {1: "ball"}))


def version_of(package: str, python: Path) -> str:
    """Version of a package in another environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def table(found: Mapping[str, Found]) -> str:
    """Rows of one data set, with differences to fewscan and shares of ants_syn's time."""
    lines = [
        f"{'system':14}{'Dice':>8}{'fewscan - it, points':>28}{'HD95 mm':>9}{'folding %':>11}{'s':>9}{'/ ants_syn':>12}"
    ]
    for system, row in found.items():
        folding = "" if row["folding"] is None else f"{100 * row['folding']:.4f}"
        ratio = f"{row['seconds'] / found['ants_syn']['seconds']:.3f}" if "ants_syn" in found else ""
        hd95 = "" if row["hd95_mm"] is None else f"{row['hd95_mm']:.2f}"
        lines.append(
            f"{system:14}{row['dice']:8.4f}{_difference(found, system):>28}{hd95:>9}{folding:>11}"
            f"{row['seconds']:9.2f}{ratio:>12}"
        )
    return "\n".join(lines)


def _difference(found: Mapping[str, Found], system: str) -> str:
    if system == "fewscan" or "fewscan" not in found:
        return ""
    names = [name for name in found["fewscan"]["cases"] if name in found[system]["cases"]]
    two = paired_test(*([found[s]["cases"][name] for name in names] for s in ("fewscan", system)))
    interval = "" if math.isnan(two.low) else f" ({100 * two.low:+.2f} to {100 * two.high:+.2f})"
    return f"{100 * two.difference:+.2f}{interval}"


def misses(found: Mapping[str, Found]) -> list[str]:
    """Claims that the rows of one data set do not bear out; none while a row is missing."""
    peers = [name for name in PEERS if name in found]
    if "fewscan" not in found or {*PEERS} - {*peers} - {*ONLY_WHEN_ASKED}:
        return []
    mine, best, wrong = found["fewscan"], max(peers, key=lambda name: found[name]["dice"]), []
    if mine["dice"] < found[best]["dice"] - MOST_BELOW:
        wrong.append(f"Dice {mine['dice']} is more than {MOST_BELOW} below {best}'s {found[best]['dice']}")
    if mine["folding"] >= MOST_FOLDING:
        wrong.append(f"{mine['folding']:.3%} of the voxels fold, less than {MOST_FOLDING:.1%} claimed")
    share = mine["seconds"] / found["ants_syn"]["seconds"]
    if share > MOST_OF_TIME:
        wrong.append(f"it takes {share:.2f} of ants_syn's time, a third or less claimed")
    return wrong


def measured(
    system: str, pairs: Sequence[Pair], folder: Path, *, python: Path | None, model: Model | None = None
) -> list[Found]:
    """Every pair, from the work folder where it is there; without a peer's interpreter by fewscan."""
    if python is None:
        warm_up()

    def measure(pair: Pair) -> Found:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "labels.nii.gz"
            run = ours(system, pair, out, model=model) if python is None else peer(system, pair, out, python=python)
            found = run | judge(out, pair.fixed)
        print(f"{system:14}{pair.name:44} Dice {found['dice']:.4f}, {found['seconds']:.2f} s", flush=True)
        return found

    return [kept(folder / f"{pair.name}.json", lambda pair=pair: measure(pair)) for pair in pairs]


def main() -> None:
    """Every row that is not there yet, then the table of this data set."""
    args = arguments()
    torch.set_num_threads(2)
    data = datasets.find(args.data)
    name, cases = args.data.resolve().name, {case.id: case for case in data.labelled}
    most = len(cases) * (len(cases) - 1)
    count = int(min(args.pairs or PAIRS_OF.get(name, PAIRS), most))
    pairs = [Pair(cases[a], cases[b]) for a, b in draw(list(cases), count, args.seed)]
    key = {"data": name, "pairs": count, "seed": args.seed}
    hashed = code_hash(parts=("methods/pairwise.py",))
    for system in args.system:
        package, python = PEERS.get(system), args.peer if system in PEERS else None
        versions = {package: version_of(package, python)} if package else {"numba": _numba()}
        code = f"{package}-{versions[package]}" if package else hashed
        with rows(args.result, key | {"system": system}, code=code) as row:
            if row is not None:
                network = load_model(args.model) if system in LEARNED else None
                found = measured(system, pairs, args.work / name / f"{system}-{code}", python=python, model=network)
                row.update(figures(pairs, found) | seen(network, pairs) | {"versions": versions})
    there = {row["key"]["system"]: row for row in load(RESULTS / args.result) if row["key"].items() >= key.items()}
    ordered = {system: there[system] for system in [*OURS, *LEARNED, *PEERS] if system in there}
    print(table(ordered))
    if wrong := misses(ordered):
        raise SystemExit(f"{name}: {'; '.join(wrong)}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer", type=Path, help="python of the environment that holds the peers")
    parser.add_argument("--model", type=Path, help="model with a registration network")
    parser.add_argument("--pairs", type=_count, help="a number or all; 60 of hippocampus_msd and else 10 if left out")
    parser.add_argument(
        "--system", action="append", choices=[*OURS, *LEARNED, *PEERS], help="only this one; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("work/registration"), help="folder that keeps finished pairs")
    parser.add_argument("--result", type=Path, default=Path(RESULT), help="file of rows; a bare name lies in results")
    args = parser.parse_args()
    if args.system is None:
        args.system = [
            *OURS,
            *(LEARNED if args.model else ()),
            *(p for p in PEERS if args.peer is not None and p not in ONLY_WHEN_ASKED),
        ]
    if args.model is None and any(system in LEARNED for system in args.system):
        parser.error("give --model, a folder that fewscan train --method register or joint left")
    if args.peer is None and any(system in PEERS for system in args.system):
        parser.error("give --peer, the python of an environment made from benchmarks/peers/classical.txt")
    return args


def _count(text: str) -> float:
    if text == "all":
        return math.inf
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a number of pairs or all, got {text!r}")
    return int(text)


def _label(case: CaseFiles) -> Path:
    assert case.label is not None
    return case.label


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or math.isnan(value) else round(value, digits)


def _numba() -> str:
    """Its version, or that it is not there and torch runs instead."""
    try:
        import numba
    except ImportError:
        return "none"
    return str(numba.__version__)


if __name__ == "__main__":
    main()
