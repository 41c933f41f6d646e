"""Label maps to print-ready meshes: seconds, memory, volume error and deviation, beside marching cubes.

    python benchmarks/mesh.py --data FOLDER [--task torso|large]

FOLDER holds ``torso_ct/example_seg_fast_force_split.nii.gz``. ``torso``: its 61 labels, files and certificate included,
and each label's figures beside vtk's plain marching cubes (benchmarks/peers/mesh.txt; left out where it is missing).
``large``: a made map of 512 x 512 x 300 voxels and 20 labels, in a process of its own. Loops are compiled before the
clock starts. The program fails where a limit below is exceeded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, code_hash, load, rows

from fewscan import api
from fewscan.data.io import read_labels, write_labelmap
from fewscan.deliver.printable import deviation, topology
from fewscan.deliver.surface import Mesh, crossing_faces
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Labelmap, bounding_box

TORSO = "torso_ct/example_seg_fast_force_split.nii.gz"
MOST = {"torso": {"seconds": 10.0}, "large": {"seconds": 60.0, "gib": 3.0}}
MOST_OF_ALL = {"largest_volume_error": 0.01, "largest_deviation_voxels": 0.5, "faulty_parts": 0}
SHAPE, SPACING, LABELS = (512, 512, 300), (0.8, 0.8, 1.0), 20
CHILD = """
import json, resource, sys, time
import numpy as np, torch
torch.set_num_threads(2)
from fewscan import api
api.mesh(sys.argv[1], sys.argv[3] + "-warm")
begin, worked = time.monotonic(), time.process_time()
record = api.mesh(sys.argv[2], sys.argv[3])
print(json.dumps({
    "seconds": round(time.monotonic() - begin, 2),
    "cpu_seconds": round(time.process_time() - worked, 2),
    "gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    "parts": record["parts"],
}))
"""


def summed_up(parts: dict[str, Any]) -> dict[str, Any]:
    """The worst of all parts, and each one's figures."""
    sound = [p["watertight"] and p["manifold"] and p["oriented"] and not p["crossing_faces"] for p in parts.values()]
    return {
        "parts": len(parts),
        "faces": sum(p["faces"] for p in parts.values()),
        "largest_volume_error": max(abs(p["volume_error"]) for p in parts.values()),
        "mean_deviation_mm": round(float(np.mean([p["deviation"]["mean_mm"] for p in parts.values()])), 4),
        "largest_deviation_mm": max(p["deviation"]["largest_mm"] for p in parts.values()),
        "largest_deviation_voxels": max(p["deviation"]["largest_voxels"] for p in parts.values()),
        "faulty_parts": len(sound) - sum(sound),
        "cases": {
            name: {"volume_error": p["volume_error"], **{k: p["deviation"][k] for k in ("mean_mm", "largest_mm")}}
            for name, p in parts.items()
        },
    }


def marching_cubes(label: Labelmap) -> dict[str, Any]:
    """Every label by vtk's marching cubes (flying edges) at half height, measured like ours; seconds of vtk alone."""
    from vtkmodules.util.numpy_support import numpy_to_vtk, vtk_to_numpy
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkFiltersCore import vtkFlyingEdges3D

    parts, seconds = {}, 0.0
    for value, name in label.names.items():
        inside = label.data == value
        box = bounding_box(inside)
        begin = time.monotonic()
        mask = np.pad(inside[box], 1).astype(np.uint8)
        image = vtkImageData()
        image.SetDimensions(*mask.shape)
        image.GetPointData().SetScalars(numpy_to_vtk(mask.ravel(order="F"), deep=True))
        cubes = vtkFlyingEdges3D()
        cubes.SetInputData(image)
        cubes.SetValue(0, 0.5)
        cubes.Update()
        found = cubes.GetOutput()
        index = vtk_to_numpy(found.GetPoints().GetData()).astype(float) + [side.start - 1 for side in box]
        faces = vtk_to_numpy(found.GetPolys().GetConnectivityArray()).reshape(-1, 3).astype(np.int32)
        seconds += time.monotonic() - begin
        affine = label.geometry.affine
        mesh = Mesh(index @ affine[:3, :3].T + affine[:3, 3], np.ascontiguousarray(faces))
        if mesh.volume_mm3 < 0:
            mesh = Mesh(mesh.points, np.ascontiguousarray(faces[:, ::-1]))
        whole = topology(mesh)
        parts[name] = {
            "faces": len(faces),
            "volume_error": round(float(mesh.volume_mm3 / (inside.sum() * label.geometry.voxel_mm3)) - 1, 6),
            "deviation": deviation(mesh, label, value=value),
            "watertight": not whole.open_edges,
            "manifold": not (whole.open_edges or whole.crowded_edges or whole.split_vertices),
            "oriented": not (whole.turned_edges or whole.inverted),
            "crossing_faces": int(crossing_faces(mesh).sum()),
        }
    return {"seconds": round(seconds, 2)} | summed_up(parts)


def write_small(path: Path) -> None:
    """A map to compile the loops with."""
    data = np.zeros((12, 12, 12), np.uint16)
    data[2:6, 2:10, 2:10], data[6:10, 2:10, 2:10] = 1, 2
    write_labelmap(data, path, native=Geometry(data.shape, np.eye(4)))


def write_large(path: Path) -> None:
    """Twenty organs that touch: the nearest of twenty centres within an ellipsoid."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(0.2, 0.8, (LABELS, 3)) * SHAPE
    x, y, z = (np.arange(n, dtype=np.float32) for n in SHAPE)
    data = np.zeros(SHAPE, np.uint16)
    for i in range(SHAPE[0]):  # one plane at a time: distances to all centres at once would not fit
        far = [(i - a) ** 2 + (y[:, None] - b) ** 2 + (z[None] - c) ** 2 for a, b, c in centres]
        inside = ((x[i] - 256) / 230) ** 2 + ((y[:, None] - 256) / 230) ** 2 + ((z[None] - 150) / 135) ** 2 < 1
        data[i] = np.where(inside, np.argmin(far, 0) + 1, 0)
    write_labelmap(data, path, native=Geometry(SHAPE, np.diag([*SPACING, 1.0])))


def torso(data: Path, folder: Path, code: str) -> None:
    """Our row, and that of marching cubes."""
    write_small(folder / "small.nii.gz")
    with rows("mesh.json", {"task": "torso", "system": "fewscan"}, code=code) as row:
        if row is not None:
            api.mesh(folder / "small.nii.gz", folder / "warm")
            begin, worked = time.monotonic(), time.process_time()
            record = api.mesh(data / TORSO, folder / "out")
            row["seconds"] = round(time.monotonic() - begin, 2)
            row["cpu_seconds"] = round(time.process_time() - worked, 2)
            row.update(summed_up(record["parts"]))
            print({k: v for k, v in row.items() if k != "cases"}, flush=True)
    if importlib.util.find_spec("vtkmodules") is None:
        print("vtk is not installed: no row of marching cubes (pip install -r benchmarks/peers/mesh.txt)")
        return
    with rows("mesh.json", {"task": "torso", "system": "marching cubes"}, code=code) as row:
        if row is not None:
            row.update(marching_cubes(read_labels(data / TORSO)))
            print({k: v for k, v in row.items() if k != "cases"}, flush=True)


def large(folder: Path, code: str) -> None:
    """Seconds and peak memory of a process of its own, imports included."""
    with rows("mesh.json", {"task": "large", "system": "fewscan"}, code=code) as row:
        if row is None:
            return
        write_small(folder / "small.nii.gz")
        write_large(folder / "large.nii.gz")
        words = [str(folder / name) for name in ("small.nii.gz", "large.nii.gz", "large")]
        done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        parts = found.pop("parts")
        row.update(found | summed_up(parts))
        print({k: v for k, v in row.items() if k != "cases"}, flush=True)


def misses() -> list[str]:
    """Claims that the rows do not bear out."""
    found = []
    for row in load(RESULTS / "mesh.json"):
        if row["key"]["system"] != "fewscan":
            continue
        for name, most in (MOST[row["key"]["task"]] | MOST_OF_ALL).items():
            if row[name] > most:
                found.append(f"{row['key']['task']}: {name} {row[name]}, at most {most} claimed")
    return found


def main() -> None:
    """Every row that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=("torso", "large"), action="append")
    args = parser.parse_args()
    torch.set_num_threads(2)
    code = code_hash(parts=("meshing.py",))
    with tempfile.TemporaryDirectory() as scratch:
        if "torso" in (args.task or ["torso"]):
            torso(args.data, Path(scratch), code)
        if "large" in (args.task or ["large"]):
            large(Path(scratch), code)
    if misses():
        raise SystemExit("; ".join(misses()))


if __name__ == "__main__":
    main()
