"""Does the proof of orientation name what is wrong? All 48 signed permutations, with and without a tumour.

    python benchmarks/orientation.py --data ../shared/data/tracts --people 4

Directions: the released peaks of one real subject, with and without a synthetic tumour pushed into them; and first
directions of tensors fitted to simulated scans of made-up people by two protocols. Tensors are fitted once and their
directions exchanged and reversed, which is what exchanged gradient tables do to them (the tests refit one).
A row counts the ways in which the fix was named, and how often the right directions were called wrong.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import code_hash, rows
from numpy.typing import NDArray

from fewscan.space.field import Field
from fewscan.space.geometry import Geometry
from fewscan.space.orientation import axes_text, prove, signed_permutations
from fewscan.tracts import anatomy as anatomies
from fewscan.tracts import cohort, inputs
from fewscan.tracts.anatomy import Anatomy, Tumour
from fewscan.tracts.estimate import fit_tensors
from fewscan.tracts.population import CohortConfig, Render, plan

CODE = ("space/orientation.py", "tracts/cohort.py")
LEAST_NAMED = 0.95


def judge(vectors: NDArray[np.float32], weight: NDArray[np.float32], geometry: Geometry) -> dict[str, Any]:
    """What the proof says of all 48 ways."""
    named = falsely = right = 0
    leads, begin = [], time.perf_counter()
    for way in signed_permutations():
        turned = np.tensordot(way.astype(np.float32), vectors, axes=(1, 0))
        found = prove(turned, weight, geometry=geometry)
        truly = axes_text(way) == "x,y,z"
        right += truly and found.verdict == "right"
        falsely += truly and found.verdict == "wrong"
        named += found.axes == axes_text(way.T) and found.verdict == ("right" if truly else "wrong")
        leads.append(found.lead)
    seconds = (time.perf_counter() - begin) / 48
    return {
        "named_of_48": int(named), "right_of_2": int(right), "right_called_wrong": int(falsely),
        "least_lead": float(min(leads)), "voxels": found.voxels, "seconds_each": seconds,
    }  # fmt: skip


def released(folder: Path, radius_mm: float) -> tuple[NDArray[np.float32], NDArray[np.float32], Geometry]:
    """First peaks of the real subject; with a tumour, pushed aside and thinned as in the cohort."""
    values, geometry, _ = inputs.read_peaks(folder / "real_subject" / "peaks.nii.gz")
    mask = inputs.read_mask(folder / "real_subject" / "brain_mask.nii.gz", geometry) & (np.abs(values).sum(0) > 0)
    if radius_mm > 0:
        places = np.argwhere(mask)
        middle = geometry.affine[:3, :3] @ places.mean(0) + geometry.affine[:3, 3]
        tumour = Tumour(centre_mm=(float(middle[0]) + 30, float(middle[1]) + 5, float(middle[2]) + 15),
                        radius_mm=radius_mm)  # fmt: skip
        real = Anatomy(
            geometry=geometry, mask=mask, s0=mask.astype(np.float32), d=mask.astype(np.float32),
            f=np.ones((3, *geometry.shape), np.float32), v=values, bundles={},
        )  # fmt: skip
        still = Field(np.zeros((3, *geometry.shape), np.float32), geometry)
        person = anatomies.Person(field=still, mirror=False, fraction=(1.0, 1.0, 1.0), diffusivity=1.0)
        patient, _, _ = anatomies.portrayed(real, person, tumour=tumour)
        values, mask = patient.v * 3 * np.repeat(patient.f, 3, axis=0), patient.mask  # three thirds of the length
    found = inputs.inputs_of_peaks(values, mask=mask)
    return found.principal, found.clearness, geometry


def simulated(
    real: Anatomy, render: Render, config: CohortConfig
) -> tuple[NDArray[np.float32], NDArray[np.float32], Geometry]:
    """First directions and anisotropy of a made-up person."""
    anatomy, gradients, dwi = cohort.scan_of(real, render, config=config)[:3]
    tensors = fit_tensors(np.ascontiguousarray(dwi[:, anatomy.mask].T), gradients)
    principal = inputs.fill(tensors.principal, anatomy.mask)
    return principal, inputs.fill(tensors.fa[:, None], anatomy.mask)[0], anatomy.geometry


def main() -> None:
    """One row for each subject, protocol and state; fails where a claim does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--people", type=int, default=4)
    args = parser.parse_args()
    code, found = code_hash(parts=CODE), []
    for radius in (0, 12, 20):
        key = {"subject": "real, released peaks", "protocol": "released", "tumour_mm": radius}
        with rows("orientation.json", key, code=code) as row:
            if row is not None:
                row.update(judge(*released(args.data, radius)))
                found.append((key, row))
                print(key, row, flush=True)
    config = CohortConfig(train=0, val=0, pool=0, test=args.people)
    real = anatomies.read_anatomy(args.data / "tracts_core.npz")
    for render in plan(config):
        protocol = config.protocols[render.protocol].name
        key = {"subject": f"made-up {render.person}", "protocol": protocol, "tumour_mm": "yes" if render.tumour else 0}
        with rows("orientation.json", key, code=code) as row:
            if row is not None:
                row.update(judge(*simulated(real, render, config)))
                found.append((key, row))
                print(key, row, flush=True)
    wrong = [key for key, row in found if row["named_of_48"] < LEAST_NAMED * 48 or row["right_called_wrong"]]
    if wrong:
        raise SystemExit(f"claims not met: {wrong}")


if __name__ == "__main__":
    main()
