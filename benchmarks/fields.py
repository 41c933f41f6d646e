"""Displacement fields on disk against ANTs' own resampling, both ways, to a twentieth of a voxel.

    python benchmarks/fields.py --data ../shared/data/hippocampus_msd --peer PYTHON

Images that hold their own voxel coordinates are resampled through one field by fewscan and by ANTs, so that the
difference is the distance between the two places read, in voxels. Written: a smooth field of ours over an affine, as
.nii.gz and .h5. Read: the warp of a SyN registration. ``--peer`` is an environment made from `peers/classical.txt`.
Voxels whose place is within one voxel of the moving image's border do not count: there the two programs differ in what
lies outside.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import code_hash, rows

from fewscan.data import dataset as datasets
from fewscan.data.fields import read_field, write_field
from fewscan.data.io import read_image, write_image
from fewscan.space import field as fields
from fewscan.space import kernels
from fewscan.space.field import Field
from fewscan.space.volume import Volume

PEER = Path(__file__).parent / "peers" / "apply_field.py"
MOST_VOXELS = 0.05


def smooth(fixed: Volume, seed: int) -> Field:
    """Random displacement of some voxels over a turn, a stretch and a shift."""
    rng = torch.Generator().manual_seed(seed)
    u = kernels.gaussian(torch.randn(1, 3, *fixed.geometry.shape, generator=rng), 4.0)
    u = u / u.abs().max() * 4
    angle = np.radians(7)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle) * 1.05, np.cos(angle)]]
    matrix[:3, 3] = (2.0, -1.5, 3.0)
    return fields.then(u[0].numpy(), matrix, fixed=fixed.geometry)


def ramps(moving: Volume, folder: Path) -> list[Path]:
    """Images that hold the voxel coordinate along one axis each, on the moving grid."""
    paths = []
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = -1
        line = np.arange(moving.geometry.shape[axis], dtype=np.float32).reshape(shape)
        path = folder / f"ramp{axis}.nii.gz"
        write_image(np.broadcast_to(line, moving.geometry.shape).copy(), path, native=moving.native)
        paths.append(path)
    return paths


def distance(field: Field, moving: Volume, warped: list[Path]) -> dict[str, float]:
    """Voxels between the places that fewscan and ANTs read."""
    u = field.to_moving(moving.geometry)
    axes = np.meshgrid(*[np.arange(n, dtype=np.float32) for n in u.shape[1:]], indexing="ij")
    places = u + np.stack(axes)
    size = np.array(moving.geometry.shape, np.float32).reshape(3, 1, 1, 1)
    inside = ((places >= 1) & (places <= size - 2)).all(0)
    theirs = np.stack([read_image(path).data[0] for path in warped])
    apart = np.sqrt(((theirs - places) ** 2).sum(0))[inside]
    return {"largest": float(apart.max()), "mean": float(apart.mean()), "voxels": int(inside.sum())}


def main() -> None:
    """One row for each direction and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer", type=Path, required=True)
    args = parser.parse_args()
    cases = datasets.find(args.data).labelled[:2]
    files = [case.images[0] for case in cases]
    fixed, moving = (read_image(file) for file in files)
    wrong = []
    for way in ("written .nii.gz", "written .h5", "read .nii.gz"):
        with rows(
            "fields.json",
            {"data": args.data.resolve().name, "way": way},
            code=code_hash(parts=("data/fields.py", "space/field.py")),
        ) as row:
            if row is None:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                (folder / "out").mkdir()
                path = folder / f"field{way.split()[1]}"
                images = ramps(moving, folder)
                if way.startswith("written"):
                    field = smooth(fixed, seed=0)
                    write_field(field, path, convention="itk", native=fixed.native)
                else:
                    _peer(args.peer, "make", files[0], path, files[1])
                    field = read_field(path, fixed=fixed.geometry, convention="itk")
                _peer(args.peer, "apply", files[0], path, folder / "out", *images)
                row.update(distance(field, moving, [folder / "out" / image.name for image in images]))
            print(way, row, flush=True)
            if row["largest"] > MOST_VOXELS:
                wrong.append(f"{way}: {row['largest']:.3f} voxels apart, {MOST_VOXELS} claimed")
    if wrong:
        raise SystemExit("; ".join(wrong))


def _peer(python: Path, *words: object) -> None:
    subprocess.run([str(python), str(PEER), *map(str, words)], check=True, capture_output=True)


if __name__ == "__main__":
    main()
