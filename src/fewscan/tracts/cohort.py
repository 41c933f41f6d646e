"""Semi-synthetic cohorts: healthy people and patients made from one real brain, with the truth that no real data holds.

A patient's loss has two parts: what the scanner and its protocol cost (systematic), and what the tumour costs. Each
test subject is therefore scanned four times, {A, B} x {healthy, tumour}, with the same anatomy and the same seed of
noise. Inputs are estimated from the simulated scan, as from a real one; a network never sees the true sticks.

Whatever is made lies in a folder of its own and is made once; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from fewscan.data.bundles import SEGMENTATIONS, write_bundles
from fewscan.data.fields import write_field
from fewscan.data.io import write_labelmap
from fewscan.data.listing import read_json
from fewscan.data.proof import SIMULATED
from fewscan.errors import ConfigError, DataError
from fewscan.learn.checkpoint import USE, write_json
from fewscan.space.field import Field, determinant
from fewscan.space.geometry import Array
from fewscan.tracts import inputs
from fewscan.tracts.anatomy import (
    Anatomy,
    Person,
    Tumour,
    about_middle,
    made_up,
    portrayed,
)
from fewscan.tracts.gradients import Gradients, spread_directions
from fewscan.tracts.population import CohortConfig, Protocol, Render, plan
from fewscan.tracts.processes import set_up
from fewscan.tracts.scanner import scanned

CACHE = 2  # raised when the same plan would give other files
RECORD, CASE = "cohort.json", "case.json"
DISPLACEMENT, LESION = "displacement.nii.gz", "lesion.nii.gz"
LIMITS = (
    "one real labelled anatomy: all people are its warps",
    "its labels are a network's output, not an expert's tracing",
    "smooth warps vary less than real people do",
    "mass effect is a radial push without infiltration",
    "signals are of a ball and sticks with one diffusivity, one shell",
    "no clinical claim can rest on it",
)


@dataclass(frozen=True, eq=False)
class Subject:
    """A scan of a person with its truth, in memory.

    Parameters
    ----------
    anatomy : Anatomy
        As it is, tumour included.
    displacement : Field
        By the tumour alone; from the patient to the place before it.
    lesion : (X, Y, Z) uint8
        1 core, 2 oedema.
    inputs : Inputs
        Estimated from the scan.
    gradients : Gradients
        Of the scan.
    truth : dict
        What is known: tumour, distances, displacement of each bundle.
    bundles : mapping of str to (X, Y, Z) bool
        Labels.
    """

    anatomy: Anatomy
    displacement: Field
    lesion: NDArray[np.uint8]
    inputs: inputs.Inputs
    gradients: Gradients
    truth: dict[str, Any]
    bundles: Mapping[str, NDArray[np.bool_]]


def subject(real: Anatomy, render: Render, *, config: CohortConfig) -> Subject:
    """Make one scan of one person; the same seed gives the same one, to the bit.

    Parameters
    ----------
    real : Anatomy
        Whom all are made from.
    render : Render
        Which.
    config : CohortConfig
        How.
    """
    anatomy, gradients, dwi, displacement, lesion, truth = scan_of(real, render, config=config)
    found = inputs.estimate_inputs(dwi, gradients, mask=anatomy.mask)
    labels = {name: anatomy.bundles[name] for name in config.bundles}
    return Subject(anatomy, displacement, lesion, found, gradients, truth, labels)


def scan_of(
    real: Anatomy, render: Render, *, config: CohortConfig
) -> tuple[Anatomy, Gradients, NDArray[np.float32], Field, NDArray[np.uint8], dict[str, Any]]:
    """The person and the raw scan (V, X, Y, Z), before anything is estimated; then displacement, lesion and truth.

    Parameters
    ----------
    real : Anatomy
        Whom all are made from.
    render : Render
        Which.
    config : CohortConfig
        How.
    """
    rngs = [np.random.default_rng([config.seed, render.person, stream]) for stream in range(4)]
    protocol = config.protocols[render.protocol]
    person = made_up(real, rngs[0], variation=config.variation)
    tumour, target = (None, None) if not render.tumour else _tumour(real, person, render.person, rngs[1], config)
    gradients, pose = _acquisition(protocol, rngs[2], real)
    anatomy, displacement, lesion = portrayed(real, person, pose=pose, tumour=tumour)
    dwi = scanned(anatomy, gradients, rng=rngs[3], snr=protocol.snr, slice_mm=protocol.slice_mm, bias=protocol.bias)
    truth: dict[str, Any] = {"mirrored": person.mirror, "protocol": protocol.name, "split": render.split}
    truth["person"] = render.person
    if tumour is not None:
        truth |= {"tumour": asdict(tumour), "target": target}
        truth |= _truth(anatomy, displacement, lesion, config.bundles)
    return anatomy, gradients, dwi, displacement, lesion, truth


def make_cohort(
    real: Anatomy, out: Path, *, config: CohortConfig, jobs: int = 1, tell: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Write every scan that is not there yet; the record of the whole comes last.

    Interrupted, it finishes the scans that other processes are at and starts no more.

    Parameters
    ----------
    real : Anatomy
        Whom all are made from.
    out : Path
        Folder; a case is a folder in TractSeg's layout below train, val, pool or test.
    config : CohortConfig
        What to make.
    jobs : int
        Scans made at a time, each in a process of its own; the files are the same.
    tell : callable, optional
        Gets a line for each scan.

    Raises
    ------
    ConfigError
        If the folder holds something else, or a cohort of another plan, or there is no job.
    DataError
        If a bundle is unknown.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    if lacking := [name for name in config.bundles if name not in real.bundles]:
        raise DataError(
            f"the anatomy has no bundle {', '.join(lacking)}; it has {', '.join(sorted(real.bundles)[:8])}..."
        )
    spec, renders, begin = _spec(real, config), plan(config), time.perf_counter()
    _claim(out, spec)
    record: dict[str, Any] = {
        "format": "fewscan cohort 1",
        "spec": spec,
        "config": asdict(config),
        "limits": list(LIMITS),
    }
    write_json(record | {"complete": False, "use": USE}, out / RECORD)
    job = _Job(real, config, out, spec)
    todo = [render for render in renders if not _cached(out / render.folder(config), spec)]
    made = 0
    for folder, seconds in _all_made(job, todo, jobs=jobs):
        made += 1
        if tell is not None:
            tell(f"{len(renders) - len(todo) + made} of {len(renders)}: {folder}, {seconds:.1f} s")
    record |= {
        "cases": [render.folder(config) for render in renders],
        "complete": True,
        "made": made,
        "seconds": round(time.perf_counter() - begin, 1),
        "use": USE,
    }
    write_json(record, out / RECORD)
    return record


@dataclass(frozen=True, eq=False)
class _Job:
    """What a process needs to know to make any scan of a cohort."""

    real: Anatomy
    config: CohortConfig
    out: Path
    spec: str


def _make(job: _Job, render: Render) -> tuple[str, float]:
    """Make one scan; its folder, and how long it took."""
    start, folder = time.perf_counter(), render.folder(job.config)
    write_subject(subject(job.real, render, config=job.config), job.out / folder, spec=job.spec)
    return folder, time.perf_counter() - start


def _all_made(job: _Job, renders: Sequence[Render], *, jobs: int) -> Iterator[tuple[str, float]]:
    """Each scan as it is made."""
    if min(jobs, len(renders)) < 2:
        yield from (_make(job, render) for render in renders)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in whatever state they are
    pool = ProcessPoolExecutor(min(jobs, len(renders)), context, initializer=set_up, initargs=(threads,))
    try:
        for done in as_completed([pool.submit(_make, job, render) for render in renders]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def write_subject(made: Subject, case: Path, *, spec: str) -> None:
    """Write a case: inputs, bundles, lesion, true displacement and, last, what is known of it.

    Parameters
    ----------
    made : Subject
        From `subject`.
    case : Path
        Folder.
    spec : str
        Of the cohort, so that it is made once.
    """
    grid = made.anatomy.geometry
    inputs.write_inputs(made.inputs, case, native=grid, record={"source": SIMULATED})
    write_bundles(made.bundles, case, native=grid)
    if "tumour" in made.truth:
        write_labelmap(made.lesion, case / LESION, native=grid)
        write_field(made.displacement, case / DISPLACEMENT, native=grid)
    write_json({"spec": spec, **made.truth, "folder": SEGMENTATIONS}, case / CASE)


def _tumour(
    real: Anatomy, person: Person, number: int, rng: np.random.Generator, config: CohortConfig
) -> tuple[Tumour, dict[str, Any]]:
    """A tumour beside a target bundle for people of even number, far from it for the others."""
    healthy = portrayed(real, person)[0]
    grid = healthy.geometry
    name = str(rng.choice(config.bundles))
    radius = float(rng.uniform(*config.radius_mm))
    depth = ndimage.distance_transform_edt(healthy.mask, sampling=grid.spacing)
    apart = ndimage.distance_transform_edt(~healthy.bundles[name], sampling=grid.spacing)
    near = number % 2 == 0
    allowed = (depth > min(8.0, depth.max() / 2)) & (apart < radius if near else apart - radius > config.far_mm)
    if not allowed.any():  # a small brain: as far or as near as it goes
        allowed = healthy.mask & (apart == (apart[healthy.mask].min() if near else apart[healthy.mask].max()))
    places = np.argwhere(allowed)
    x, y, z = (grid.affine[:3, :3] @ places[rng.integers(len(places))] + grid.affine[:3, 3]).tolist()
    tumour = Tumour(centre_mm=(x, y, z), radius_mm=radius, oedema_mm=float(rng.uniform(8, 10)))
    return tumour, {"bundle": name, "kind": "near" if near else "far"}


def _acquisition(protocol: Protocol, rng: np.random.Generator, real: Anatomy) -> tuple[Gradients, Array | None]:
    """A gradient table, and how the head lies."""
    count = int(rng.integers(protocol.directions[0], protocol.directions[1] + 1))
    b = float(rng.uniform(*protocol.b))
    directions = np.concatenate([np.zeros((1, 3)), spread_directions(count)])
    angles = np.radians(protocol.angle_deg) * rng.uniform(-1, 1, 3)
    shift = protocol.shift_mm * rng.uniform(-1, 1, 3)
    gradients = Gradients(np.array([0.0, *[b] * count]), directions)
    if not (angles.any() or shift.any()):
        return gradients, None
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        one = np.eye(3)
        one[i, i] = one[j, j] = np.cos(angle)
        one[i, j], one[j, i] = -np.sin(angle), np.sin(angle)
        turn = one @ turn
    pose = about_middle(turn, real.geometry)
    pose[:3, 3] += shift
    return gradients, pose


def _truth(
    anatomy: Anatomy, displacement: Field, lesion: NDArray[np.uint8], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """For each bundle its distance from the core, true displacement and change of volume."""
    length = np.linalg.norm(displacement.millimetres(), axis=0)
    change = np.abs(np.log(determinant(torch.from_numpy(displacement.u)[None])[0].clamp(min=1e-3).numpy()))
    apart = ndimage.distance_transform_edt(lesion != 1, sampling=anatomy.geometry.spacing)
    rows = {}
    for name in names:
        inside = anatomy.bundles[name]
        if not inside.any():
            rows[name] = {"volume_ml": 0.0, "said": "nothing of the bundle is left"}
            continue
        rows[name] = {
            "volume_ml": round(float(inside.sum()) * anatomy.geometry.voxel_mm3 / 1000, 2),
            "from_core_mm": round(float(apart[inside].min()), 2),
            "displacement_mm": round(float(length[inside].mean()), 3),
            "largest_displacement_mm": round(float(length[inside].max()), 3),
            "log_volume_change": round(float(change[inside].mean()), 4),
        }
    return {"bundles": rows}


def _spec(real: Anatomy, config: CohortConfig) -> str:
    """Hash of everything a scan depends on but its own number."""
    digest = hashlib.sha256(json.dumps([CACHE, asdict(config)], sort_keys=True).encode())
    for array in (real.f, real.v, real.s0, real.d, real.mask, real.geometry.affine):
        digest.update(np.ascontiguousarray(array).tobytes())
    for name, mask in sorted(real.bundles.items()):  # all: people who are mirrored have those of the other side
        digest.update(f"{name}\0{mask.shape}".encode() + np.packbits(mask).tobytes())
    return digest.hexdigest()[:16]


def _cached(case: Path, spec: str) -> bool:
    return (case / CASE).is_file() and read_json(case / CASE).get("spec") == spec


def _claim(out: Path, spec: str) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder")
    if (out / RECORD).is_file():
        if read_json(out / RECORD).get("spec") != spec:
            raise ConfigError(f"{out}: holds a cohort of another plan or anatomy; give another -o")
    elif out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out}: holds something else; give a new folder")
