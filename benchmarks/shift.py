"""Are injected shifts named? Scans of one population in two groups, one of them changed in a known way.

    python benchmarks/shift.py --data ../shared/data/hippocampus_msd --model MODEL [--cases 50] [--each 10]

Each case draws two groups of other patients, changes every scan of the second by one of `KINDS` (or by nothing), each
scan by a strength of its own, and asks `fewscan.judge.shift` what differs. It is right when the first kind named is the
one injected, with its sign, or when nothing is named where nothing was. Without ``--data`` the scans are synthetic.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from harness import code_hash, rows
from scipy import ndimage

from fewscan import api
from fewscan.data import dataset as datasets
from fewscan.judge import looks, shift
from fewscan.learn.checkpoint import Model
from fewscan.space.geometry import with_shape
from fewscan.space.volume import Volume, resample

KINDS = {  # what is injected, what ought to be named, and its sign
    "gain": ("intensity scale", 1),
    "gamma": ("contrast", -1),
    "noise": ("fine detail", 1),
    "blur": ("fine detail", -1),
    "spacing": ("voxel size", 1),
    "field of view": ("field of view", -1),
    "none": None,
}
RESULT = "shift.json"


def inject(image: Volume, kind: str, *, rng: np.random.Generator) -> Volume:
    """A changed copy of a scan."""
    data, geometry = image.data.astype(np.float32), image.geometry
    low, high = np.quantile(data, [0.005, 0.995])
    strength = rng.uniform(0.8, 1.2)
    if kind == "gain":
        data = low + (data - low) * np.float32(1 + 1.5 * strength)
    elif kind == "gamma":
        data = low + (high - low) * ((data - low) / (high - low)).clip(0, 1) ** np.float32(1 + 0.8 * strength)
    elif kind == "noise":
        data = data + rng.normal(0, 0.08 * strength * (high - low), data.shape).astype(np.float32)
    elif kind == "blur":
        data = ndimage.gaussian_filter(data, (0, *[0.9 * strength] * 3))
    elif kind == "spacing":
        x, y, z = (max(4, round(n / (1 + 0.5 * strength))) for n in geometry.shape)
        data, geometry = resample(torch.from_numpy(data), (x, y, z)).numpy(), with_shape(geometry, (x, y, z))
    elif kind == "field of view":
        cut = [round(n * 0.15 * strength) for n in geometry.shape]
        box = tuple(slice(c, n - c) for c, n in zip(cut, geometry.shape, strict=True))
        data = data[(slice(None), *box)]
        affine = geometry.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ cut
        geometry = type(geometry)((data.shape[1], data.shape[2], data.shape[3]), affine)
    return Volume(data, geometry, geometry, image.channels)


def synthetic(folder: Path, count: int) -> Path:
    """Soft blobs with noise, each of its own size, contrast and grid."""
    from fewscan.data.io import write_image
    from fewscan.space.geometry import Geometry

    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        shape = tuple(int(n) for n in rng.integers(28, 33, 3))
        field = ndimage.gaussian_filter(rng.normal(size=shape), 2.5)
        image = 100 + 60 * rng.uniform(0.85, 1.15) * field / field.std() + rng.normal(0, 4, shape)
        x, y, z = shape
        write_image(
            image.clip(0).astype(np.float32), folder / "images" / f"case_{i:02d}.nii.gz",
            native=Geometry((x, y, z), np.diag([1.0, 1.0, 1.0, 1.0])),
        )  # fmt: skip
    return folder


def cases(count: int) -> Iterator[tuple[int, str]]:
    """Seed and kind of each case, kinds in turns."""
    names = list(KINDS)
    yield from ((i, names[i % len(names)]) for i in range(count))


def right(found: shift.Systematic, kind: str) -> bool:
    """Whether the verdict names what was injected."""
    wanted = KINDS[kind]
    if wanted is None:
        return not found.named
    name, sign = wanted
    return bool(found.named) and found.named[0] == name and found.kinds[name].value * sign > 0


def run(data: datasets.Dataset, model: Model, *, seed: int, kind: str, each: int) -> dict[str, object]:
    """One case."""
    rng = np.random.default_rng(seed)
    patients = sorted({case.patient for case in data.cases})
    drawn = [patients[i] for i in rng.permutation(len(patients))[: 2 * each]]
    first = {patient: next(case for case in data.cases if case.patient == patient) for patient in drawn}
    groups: list[list[looks.Look]] = [[], []]
    for i, patient in enumerate(drawn):
        image = datasets.load(first[patient], data).image
        changed = inject(image, kind, rng=rng) if i >= each else image
        groups[i // each].append(looks.look(changed, model, case=patient))
    found = shift.systematic(*groups)
    told = ", ".join(f"{name} {found.kinds[name].value:+.1f}" for name in found.named) or "nothing"
    return {"right": right(found, kind), "named": told}


def main() -> None:
    """Every row that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data set; synthetic scans without it")
    parser.add_argument("--model", type=Path, required=True, help="whose normalisation and encoder count")
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--each", type=int, default=10, help="scans in each group")
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, found = api.load(args.model), []
    with tempfile.TemporaryDirectory() as folder:
        data = api.open(args.data or synthetic(Path(folder), 4 * args.each))
        name = args.data.name if args.data else "synthetic"
        for seed, kind in cases(args.cases):
            key = {"data": name, "kind": kind, "seed": seed, "each": args.each}
            with rows(RESULT, key, code=code_hash(parts=("judge/shift.py",))) as row:
                if row is not None:
                    row.update(run(data, model, seed=seed, kind=kind, each=args.each))
                    found.append(row["right"])
                    print(key, row["named"], row["right"], flush=True)
    print(f"{sum(found)} of {len(found)} new cases named correctly")


if __name__ == "__main__":
    main()
