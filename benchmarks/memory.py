"""A 512 x 512 x 600 int16 CT with 20 labels, predicted from file to file: seconds, and memory above the imports.

    python benchmarks/memory.py [--grid derived|native]

``derived``: the model works on the grid that the preset derives for scans of this size. ``native``: on the scan's own
grid, the worst case for the logits. The network is untrained: neither memory nor time depends on its weights. The
program fails when 2 GiB are exceeded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import RESULTS, TRAINING, code_hash, load, rows

MOST_GIB = 2.0
SHAPE, SPACING, LABELS = (512, 512, 600), (0.8, 0.8, 1.0), 20
CHILD = """
import json, resource, sys, time
import torch
torch.set_num_threads(2)
from fewscan import api
from fewscan.prediction import predict
import fewscan.learn.openvino_backend as fast
if fast.available():
    import openvino
model = api.load(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.monotonic()
predict(model, sys.argv[2], sys.argv[3], device="cpu")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seconds = time.monotonic() - begin
print(json.dumps({"gib_above_imports": round((after - before) / 2**20, 3), "seconds": round(seconds, 1)}))
"""


def make(folder: Path, grid: str) -> None:
    """Write the scan and an untrained model."""
    import dataclasses

    import numpy as np

    from fewscan.data.io import write_image
    from fewscan.learn import checkpoint
    from fewscan.learn.checkpoint import Model
    from fewscan.learn.config import NetworkConfig, Settings
    from fewscan.learn.plan import derive
    from fewscan.space.geometry import Geometry
    from fewscan.space.volume import Case, Labelmap, Volume

    rng = np.random.default_rng(0)
    names = {i + 1: f"organ {i + 1}" for i in range(LABELS)}
    coarse = Geometry((64, 64, 75), np.diag([6.4, 6.4, 8.0, 1.0]))
    label = np.zeros(coarse.shape, np.uint16)
    for i in range(LABELS):
        label[4 + 12 * (i % 5) : 12 + 12 * (i % 5), 20:40, 4 + 18 * (i // 5) : 16 + 18 * (i // 5)] = i + 1
    image = rng.integers(-1000, 400, (1, *coarse.shape)).astype(np.int16)
    settings = Settings(network=NetworkConfig(widths=(16, 32))) if grid == "native" else Settings()
    plan = derive(
        [Case("phantom", Volume(image, coarse, coarse), Labelmap(label, coarse, names))],
        names=names, channels=("CT",), modality="ct", settings=settings, gpu=False,
    )  # fmt: skip
    if grid == "native":
        plan = dataclasses.replace(plan, spacing=SPACING, patch=(64, 64, 64), sole=())
    else:
        fine = Geometry(SHAPE, np.diag([*SPACING, 1.0]))
        blank = np.broadcast_to(np.zeros((1, 1, 1), np.uint16), SHAPE)
        wide = Case(
            "wide", Volume(np.broadcast_to(image[:, :1, :1, :1], (1, *SHAPE)), fine, fine), Labelmap(blank, fine, names)
        )
        shaped = derive([wide], names=names, channels=("CT",), modality="ct", settings=settings, gpu=False)
        plan = dataclasses.replace(
            plan, spacing=shaped.spacing, patch=shaped.patch, kernels=shaped.kernels, strides=shaped.strides,
            widths=shaped.widths,
        )  # fmt: skip
    model = Model(
        segmenter=checkpoint.build_segmenter(plan, settings, seed=0), plan=plan, settings=settings, provenance={}
    )
    checkpoint.save_model(model, folder / "model")
    scan = rng.integers(-1000, 400, SHAPE, dtype=np.int16)
    write_image(scan, folder / "scan.nii.gz", native=Geometry(SHAPE, np.diag([*SPACING, 1.0])))


def main() -> None:
    """Measure in a process of its own, so that nothing else counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=("derived", "native"), action="append")
    args = parser.parse_args()
    for grid in args.grid or ("derived", "native"):
        with rows("memory.json", {"grid": grid}, code=code_hash(parts=TRAINING)) as row:
            if row is None:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                make(folder, grid)
                command = [sys.executable, "-c", CHILD, *(str(folder / n) for n in ("model", "scan.nii.gz", "out"))]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            row.update(json.loads(done.stdout.splitlines()[-1]))
            print(grid, row, flush=True)
    for found in load(RESULTS / "memory.json"):
        if found["gib_above_imports"] > MOST_GIB:
            raise SystemExit(f"{found['key']}: {found['gib_above_imports']} GiB above the imports, {MOST_GIB} allowed")


if __name__ == "__main__":
    main()
