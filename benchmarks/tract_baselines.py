"""Rows of ``tracts.py`` that need no network: baselines by registration, chance, the ceiling, seconds for inputs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from bundle_cohort import Place, Scores, cases_of, mean, subject_of
from numpy.typing import NDArray

from fewscan.data.bundles import bundle_files, read_bundle
from fewscan.data.io import read_image, write_image, write_labelmap
from fewscan.judge.metrics import dice
from fewscan.methods.pairwise import RegisterConfig, register
from fewscan.space import field as fields
from fewscan.space.geometry import Array, Geometry
from fewscan.space.volume import Volume
from fewscan.tracts.bundles import TARGETS
from fewscan.tracts.gradients import Gradients, fsl_to_world, spread_directions
from fewscan.tracts.population import A
from fewscan.tracts.scanner import scanned

BASELINES = ("probability map", "single template")
LEVELS = tuple(np.arange(0.05, 0.95, 0.05).round(2))
MOST_SECONDS = 120.0

Maps = dict[str, NDArray[np.float32]]


def anisotropy(case: Path) -> Volume:
    """Fractional anisotropy of a case, which registration looks at."""
    whole = read_image(case / "scalars.nii.gz", channels=("FA", "MD", "S0"))
    return replace(whole, data=whole.data[:1], channels=("FA",))


def aligned(fixed: Path, moving: Path) -> Array:
    """Affine map from one case's world to another's."""
    return register(anisotropy(fixed), anisotropy(moving), config=RegisterConfig(transform="affine")).matrix


def carried(maps: Maps, own: Geometry, matrix: Array, *, grid: Geometry) -> Maps:
    """Maps on another grid, linearly; ``matrix`` leads from that grid's world to theirs."""
    warped = fields.warp_array(np.stack(list(maps.values())), own, field=fields.from_matrix(matrix, grid))
    return dict(zip(maps, warped, strict=True))


def masks_of(case: Path) -> tuple[Maps, Geometry]:
    """The bundles of a case as maps of 0 and 1."""
    read = {name: read_bundle(file) for name, file in bundle_files(case).items() if name in TARGETS}
    return {name: mask.astype(np.float32) for name, (mask, _) in read.items()}, next(iter(read.values()))[1]


def probability_maps(cases: list[Path], template: Path) -> Maps:
    """Mean of the cases' masks in the space of one of them."""
    grid = anisotropy(template).geometry
    total = {name: np.zeros(grid.shape, np.float32) for name in TARGETS}
    for case in cases:
        maps, own = masks_of(case)
        matrix = np.eye(4) if case == template else aligned(template, case)
        for name, found in carried(maps, own, matrix, grid=grid).items():
            total[name] += found / len(cases)
    return total


def best_level(maps: Maps, cases: Iterable[Path], template: Path) -> float:
    """The threshold with the highest mean Dice on validation cases, one for all bundles."""
    own, scores = anisotropy(template).geometry, {level: list[float]() for level in LEVELS}
    for case in cases:
        truth, grid = masks_of(case)
        found = carried(maps, own, aligned(case, template), grid=grid)
        for level in LEVELS:
            scores[level].append(mean(dice(found[n] > level, truth[n] > 0) for n in TARGETS))
    return float(max(LEVELS, key=lambda level: mean(scores[level])))


@cache
def baselines(place: Place) -> dict[str, tuple[Scores, float]]:
    """Each baseline's scores, and the threshold it was given.

    All are aligned affinely by their anisotropy: training people onto the first of them for the map, and the first
    of them onto each test scan. The map's threshold is chosen on the validation people.
    """
    cohort = place.cohort()
    train = cases_of(cohort, "train")
    template = train[0]
    own = anisotropy(template).geometry
    of = {BASELINES[0]: probability_maps(train, template), BASELINES[1]: masks_of(template)[0]}
    levels = {BASELINES[0]: best_level(of[BASELINES[0]], cases_of(cohort, "val"), template), BASELINES[1]: 0.5}
    scores: dict[str, Scores] = {name: {} for name in BASELINES}
    for case in cases_of(cohort, "test"):
        truth, grid = masks_of(case)
        matrix, (person, twin) = aligned(case, template), subject_of(case)
        for name, maps in of.items():
            found = carried(maps, own, matrix, grid=grid)
            values = [dice(found[n] > levels[name], truth[n] > 0) for n in TARGETS]
            scores[name].setdefault(person, {})[twin] = values
    return {name: (scores[name], levels[name]) for name in BASELINES}


def chance(cases: Iterable[Path]) -> float:
    """Mean Dice of two different bundles of a person: what knowing where bundles are, but not which, is worth."""
    values = []
    for case in cases:
        truth, _ = masks_of(case)
        values += [dice(truth[one] > 0, truth[other] > 0) for one, other in combinations(TARGETS, 2)]
    return round(mean(values), 4)


def ceiling(core: Path) -> dict[str, float]:
    """Dice between the masks of two processing runs of the real scan: no network can be asked for more."""
    with np.load(core, allow_pickle=False) as arrays:
        names = [str(name) for name in arrays["bundle_names"]]
        runs = [np.unpackbits(arrays[key], axis=0)[: len(names)].astype(bool) for key in ("bundles_ref", "bundles_edu")]
    return {n: round(dice(runs[0][names.index(n)], runs[1][names.index(n)]), 4) for n in TARGETS}


def seconds_for_inputs(place: Place, folder: Path) -> dict[str, Any]:
    """Wall clock of ``fewscan tracts inputs``, its start included, on a simulated scan of the whole real brain."""
    real, native = place.real, place.real.geometry
    count = A.directions[0]
    directions = np.concatenate([np.zeros((1, 3)), spread_directions(count)])
    gradients = Gradients(np.array([0.0, *[A.b[0]] * count]), directions)
    dwi = scanned(real, gradients, rng=np.random.default_rng(0), snr=A.snr)
    write_image(dwi, folder / "dwi.nii.gz", native=native)
    write_labelmap(real.mask.astype(np.uint8), folder / "brain.nii.gz", native=native)
    np.savetxt(folder / "dwi.bval", gradients.bvals[None])
    np.savetxt(folder / "dwi.bvec", fsl_to_world(native).T @ gradients.directions.T)
    words = ["tracts", "inputs", "dwi.nii.gz", "--bvals", "dwi.bval", "--bvecs", "dwi.bvec", "--mask", "brain.nii.gz"]
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "fewscan", *words, "-o", "case"], cwd=folder, check=True)
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "voxels": " x ".join(map(str, native.shape)),
        "brain_voxels": int(real.mask.sum()),
        "directions": count,
    }


def real_scores(predicted: Path, masks: Path) -> dict[str, float]:
    """Dice of each bundle against the real subject's released masks.

    Parameters
    ----------
    predicted : Path
        Folder of the predicted case.
    masks : Path
        Folder of one file a bundle.
    """
    ours = bundle_files(predicted)
    if lacking := [name for name in TARGETS if name not in ours]:
        raise SystemExit(f"{predicted}: no mask of {', '.join(lacking)}")
    return {n: round(dice(read_bundle(ours[n])[0], read_bundle(masks / f"{n}.nii.gz")[0]), 4) for n in TARGETS}
