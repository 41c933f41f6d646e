"""Seconds that one whole-brain prediction from peaks takes: nine channels at 2.5 mm, ten bundles.

    python benchmarks/whole_brain.py --data ../shared/data/tracts

The real subject's released peaks by `fewscan tracts inputs`, and a label map painted from ten of its bundles, in which
later ones cover earlier ones. A model with the preset's plan learns from them for twenty steps, so that its weights
mean nothing and its size is what users get; the time is that of `fewscan predict` without start-up, reading and writing
included, the median of five. The program fails above `MOST_SECONDS`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import code_hash, rows

from fewscan import api
from fewscan.data.io import peek, read_raw, write_labelmap
from fewscan.space.geometry import to_ras
from fewscan.white_matter import inputs

RESULT = "whole_brain.json"
PARTS = ("prediction.py", "methods/segment.py")
BUNDLES = [f"{name}_{side}" for name in ("AF", "CST", "IFO", "UF", "CG") for side in ("left", "right")]
MOST_SECONDS = 30.0
REPEATS = 5


def painted(subject: Path, folder: Path) -> Path:
    """A data set of one case."""
    case = folder / "subject"
    inputs(subject / "peaks.nii.gz", case)
    native = peek(subject / "peaks.nii.gz").geometry
    label = np.zeros(native.shape, np.uint16)
    for value, bundle in enumerate(BUNDLES, start=1):
        label[read_raw(subject / "bundles" / f"{bundle}.nii.gz")[0][0] > 0] = value
    write_labelmap(to_ras(label, native)[0], case / "labels.nii.gz", native=native)
    names = {"background": 0, **{name: value for value, name in enumerate(BUNDLES, start=1)}}
    (folder / "dataset.json").write_text(json.dumps({"labels": names}))
    return folder


def main() -> None:
    """One row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    torch.set_num_threads(2)
    with rows(RESULT, {"task": "whole brain"}, code=code_hash(parts=PARTS)) as row:
        if row is None:
            return
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "data").mkdir()
            found = api.open(painted(data / "real_subject", folder / "data"))
            model = api.train(found, folder / "model", steps=20, device="cpu")
            seconds = []
            for turn in range(REPEATS + 1):
                begin = time.monotonic()
                api.predict(model, found.labelled[0].images[0], folder / f"out{turn}", device="cpu")
                seconds.append(time.monotonic() - begin)
        grid = peek(data / "real_subject" / "peaks.nii.gz").geometry
        row |= {
            "seconds": round(statistics.median(seconds[1:]), 2),
            "voxels": " x ".join(map(str, grid.shape)),
            "spacing_mm": round(float(grid.spacing[0]), 2),
            "labels": len(BUNDLES),
        }
        print(row, flush=True)
    if row["seconds"] > MOST_SECONDS:
        raise SystemExit(f"{row['seconds']} s, {MOST_SECONDS} allowed")


if __name__ == "__main__":
    main()
