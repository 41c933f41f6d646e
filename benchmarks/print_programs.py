"""Meshes judged by the programs of others: an STL checker, a slicer, a glTF validator.

    scripts/install_print_tools
    python benchmarks/print_programs.py --data FOLDER

FOLDER holds ``torso_ct`` and ``mandible_masks``. Label maps, meshed as `fewscan mesh` does it: the 61 parts of a torso,
its 26 bones, an aorta, a mandible. Rows: how many files a program looked at, and what it found. admesh looks at every
STL and counts what it would mend. prusa-slicer slices the `SLICED` largest parts, one by one, and the 3MF, its parts
merged as they lie, all scaled to the bed and with supports; lines that speak of repairs, errors or warnings count.
gltf-validator counts errors and warnings of the GLB. The program fails where one of them finds anything.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, code_hash, rows

from fewscan import api

RESULT = "print_programs.json"
PARTS = ("meshing.py",)
BONES = (*range(25, 34), *range(75, 79), *range(98, 104), *range(110, 116), 117)
TORSO = "torso_ct/example_seg_fast_force_split.nii.gz"
MAPS: dict[str, tuple[str, tuple[int, ...]]] = {
    "torso": (TORSO, ()),
    "bones": (TORSO, BONES),
    "aorta": ("torso_ct/aorta/aorta.nii.gz", ()),
    "mandible": ("mandible_masks/test_0522c0017.nrrd", ()),
}
SLICED = 12
MENDED = ("Degenerate facets", "Edges fixed", "Facets removed", "Facets added", "Facets reversed", "Backwards edges")
REPAIRS = re.compile(r"repair|error|warning|manifold|open edge|self.intersect", re.I)
VALIDATOR = ROOT / "build" / "gltf" / "node_modules" / "gltf-validator"
VALIDATE = """
const validator = require(process.argv[1]), fs = require('fs');
validator.validateBytes(new Uint8Array(fs.readFileSync(process.argv[2])))
  .then(found => console.log(found.issues.numErrors, found.issues.numWarnings, found.validatorVersion));
"""


def admesh(folder: Path, scratch: Path) -> dict[str, Any]:
    """Every STL: what would be mended, edges without a neighbour."""
    files, found = sorted(folder.glob("*.stl")), 0
    for file in files:
        said = _run("admesh", file)
        found += sum(int(n) for count in MENDED for n in re.findall(rf"{count}\s*:\s*(\d+)", said))
        open_edges = re.search(r"Total disconnected facets\s*:\s*(\d+)\s+(\d+)", said)
        found += sum(map(int, open_edges.groups())) if open_edges else 1
    return {"files": len(files), "findings": found, "version": _run("admesh", "--version").split()[-1]}


def prusa_slicer(folder: Path, scratch: Path) -> dict[str, Any]:
    """The largest parts and the 3MF of all: lines about repairs, and whether there is G-code."""
    largest = sorted(folder.glob("*.stl"), key=lambda file: -file.stat().st_size)[:SLICED]
    found = 0
    for file in [*largest, folder / "model.3mf"]:
        code = scratch / "out.gcode"
        how = ("--merge", "--dont-arrange", "--fill-density", "0") if file.suffix == ".3mf" else ()
        how = (*how, "--scale-to-fit", "150,150,150", "--support-material")  # bones touch the bed in points
        said = _run("prusa-slicer", "--export-gcode", *how, "-o", code, file)
        lines = [line for line in said.splitlines() if REPAIRS.search(line)]
        print(*lines, sep="\n", end="")
        found += len(lines) + (not code.exists() or "G1 " not in code.read_text())
        code.unlink(missing_ok=True)
    version = re.search(r"PrusaSlicer-([\d.]+)", _run("prusa-slicer", "--help"))
    return {"files": len(largest) + 1, "findings": found, "version": version[1] if version else "?"}


def gltf_validator(folder: Path, scratch: Path) -> dict[str, Any]:
    """The GLB: errors and warnings."""
    errors, warnings, version = _run("node", "-e", VALIDATE, VALIDATOR, folder / "model.glb").split()
    return {"files": 1, "findings": int(errors) + int(warnings), "version": version}


PROGRAMS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "admesh": admesh,
    "prusa-slicer": prusa_slicer,
    "gltf-validator": gltf_validator,
}


def _run(*words: object) -> str:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if done.returncode and words[0] != "prusa-slicer":  # whose --help ends with 1, and whose failures leave no G-code
        raise SystemExit(f"{words[0]} failed: {(done.stdout + done.stderr)[-500:]}")
    return done.stdout + done.stderr


def main() -> None:
    """One row for each label map and program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=tuple(MAPS))
    args = parser.parse_args()
    torch.set_num_threads(2)
    if shutil.which("node") is None or not VALIDATOR.is_dir():
        raise SystemExit("run scripts/install_print_tools first")
    wrong = []
    for task, (place, labels) in MAPS.items():
        if args.task not in (None, task):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "print"
            record = api.mesh(args.data / place, folder, labels=[str(value) for value in labels])
            for program, judge in PROGRAMS.items():
                if (task, program) == ("torso", "prusa-slicer"):  # its bones stand for it
                    continue
                key = {"task": task, "program": program}
                with rows(RESULT, key, code=code_hash(parts=PARTS)) as row:
                    if row is not None:
                        row |= {"parts": len(record["parts"]), **judge(folder, Path(scratch))}
                        print(key, row, flush=True)
                        wrong += [f"{key}: {row}"] if row["findings"] else []
    if wrong:
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
