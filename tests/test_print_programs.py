"""Programs of other people judge what is written; skipped where scripts/install_print_tools was not run."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from shapes import ball, oblique

from fewscan import api
from fewscan.data.io import write_labelmap

VALIDATOR = Path(__file__).resolve().parent.parent / "build" / "gltf" / "node_modules" / "gltf-validator"
CHECK = """
const validator = require(process.argv[1]), fs = require('fs');
validator.validateBytes(new Uint8Array(fs.readFileSync(process.argv[2])))
  .then(found => console.log(found.issues.numErrors, found.issues.numWarnings));
"""
COUNTS = ("Degenerate facets", "Edges fixed", "Facets removed", "Facets added", "Facets reversed", "Backwards edges")
WARNINGS = re.compile(r"repair|error|warning|manifold|open edge|self.intersect", re.I)

needs_admesh = pytest.mark.skipif(shutil.which("admesh") is None, reason="admesh is not installed")
needs_slicer = pytest.mark.skipif(shutil.which("prusa-slicer") is None, reason="prusa-slicer is not installed")
needs_validator = pytest.mark.skipif(
    shutil.which("node") is None or not VALIDATOR.is_dir(), reason="gltf-validator is not installed"
)


def run(*words):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True, timeout=250)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A hollow ball on oblique thick slices, and voxels that touch by edges and corners."""
    folder = tmp_path_factory.mktemp("parts")
    label = ball(geometry=oblique((30, 30, 12)), radius_mm=12)
    data = label.data.copy()
    data[1:5, 1:5, 1:5] = 2 * (np.random.default_rng(3).random((4, 4, 4)) > 0.5)
    write_labelmap(data, folder / "seg.nii.gz", native=label.geometry)
    api.mesh(folder / "seg.nii.gz", folder / "out", additions=api.Additions(hollow_mm=2.0, drain_mm=3.0))
    return folder / "out"


@needs_admesh
@pytest.mark.parametrize("name", ["label_1.stl", "label_2.stl"])
def test_admesh_finds_nothing_to_mend(parts, name):
    said = run("admesh", parts / name).stdout
    found = {count: int(n) for count in COUNTS for n in re.findall(rf"{count}\s*:\s*(\d+)", said)}
    assert found == dict.fromkeys(COUNTS, 0)
    assert re.search(r"Total disconnected facets\s*:\s*0\s+0", said)


@needs_slicer
@pytest.mark.parametrize("name", ["label_1.stl", "model.3mf"])
def test_the_slicer_makes_gcode_without_repairs(parts, tmp_path, name):
    code = tmp_path / "out.gcode"
    done = run("prusa-slicer", "--export-gcode", "--scale-to-fit", "60,60,60", "-o", code, parts / name)
    assert not WARNINGS.findall(done.stdout + done.stderr)
    assert "G1 " in code.read_text()


@needs_validator
def test_the_gltf_validator_finds_no_error(parts):
    assert run("node", "-e", CHECK, VALIDATOR, parts / "model.glb").stdout.split() == ["0", "0"]
