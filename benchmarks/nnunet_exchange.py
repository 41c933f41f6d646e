"""A data set handed to nnU-Net and taken back.

    python benchmarks/nnunet_exchange.py --data FOLDER --peer VENV      (benchmarks/peers/nnunet.txt)

nnU-Net examines the export itself: its integrity check refuses what it could not train on. Then fewscan reads it again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from harness import code_hash, rows

import fewscan
from fewscan.data import dataset as datasets

RESULT = "nnunet_exchange.json"
PARTS = ("exporting.py", "data/dataset.py")
VERSION = "from importlib.metadata import version; print(version('nnunetv2'))"


def exchange(data: Path, programs: Path, folder: Path) -> dict[str, Any]:
    """Out, examined, and back in."""
    raw, done = folder / "raw", folder / "preprocessed"
    given = fewscan.open(data)
    fewscan.export(data, raw / "Dataset101_Export", kind="nnunet")
    places = {"nnUNet_raw": raw, "nnUNet_preprocessed": done, "nnUNet_results": folder / "results"}
    command = [programs / "nnUNetv2_extract_fingerprint", "-d", "101", "--verify_dataset_integrity", "-np", "2"]
    subprocess.run(command, env=os.environ | {k: str(v) for k, v in places.items()}, check=True)
    seen = json.loads((done / "Dataset101_Export" / "dataset_fingerprint.json").read_text())
    back = fewscan.open(raw / "Dataset101_Export")
    pairs = [
        (datasets.load(a, given), datasets.load(b, back)) for a, b in zip(given.labelled, back.labelled, strict=True)
    ]
    assert all(one.label is not None and two.label is not None for one, two in pairs)
    return {
        "cases": len(given.labelled),
        "seen_by_nnunet": len(seen["spacings"]),
        "same_names": list(given.names.values()) == list(back.names.values()),
        "same_voxels": all(bool((one.image.data == two.image.data).all()) for one, two in pairs),
        "same_foreground": all(
            bool(((one.label.data > 0) == (two.label.data > 0)).all()) for one, two in pairs if one.label and two.label
        ),
        "version": subprocess.check_output([programs / "python", "-c", VERSION], text=True).strip(),
    }


def main() -> None:
    """One row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set with labelled cases")
    parser.add_argument("--peer", type=Path, required=True, help="environment of nnU-Net")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        rows(RESULT, {"set": args.data.name}, code=code_hash(parts=PARTS)) as row,
    ):
        if row is not None:
            row |= exchange(args.data, args.peer / "bin", Path(scratch))
            print(row, flush=True)
            if False in row.values() or row["cases"] != row["seen_by_nnunet"]:
                raise SystemExit("nnU-Net does not see what was exported, or it does not come back")


if __name__ == "__main__":
    main()
