"""Models for other programs: the same logits, everything needed beside them, nothing of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from phantom import phantom

from fewscan.data.io import read_image, read_labels, write_image
from fewscan.deliver import models
from fewscan.deliver.models import LARGEST_DIFFERENCE, write_monai, write_onnx
from fewscan.errors import ModelError
from fewscan.exporting import export
from fewscan.learn import infer
from fewscan.learn.checkpoint import Model
from fewscan.learn.hardware import Hardware
from fewscan.learn.networks import Absent
from fewscan.space.geometry import Geometry

RUN = """
import json, sys, warnings
warnings.simplefilter("ignore")
from monai.bundle import ConfigParser
parser = ConfigParser()
parser.read_config("configs/inference.json")
parser.read_meta("configs/metadata.json")
parser.get_parsed_content("run")
print(json.dumps(sorted(name for name in sys.modules if name.startswith("fewscan"))))
"""


def test_onnx_gives_the_same_logits_for_windows_of_any_size(untrained: Model, tmp_path: Path) -> None:
    report = export(untrained.path, tmp_path / "model.onnx", kind="onnx")
    assert report["largest_difference"] <= LARGEST_DIFFERENCE
    written = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(written)
    card = {entry.key: json.loads(entry.value) for entry in written.metadata_props}
    assert card["labels"] == {"0": "background", "1": "ball", "2": "rod"}
    assert card["use"] == "research use only"
    assert card["spacing_mm"] == pytest.approx(untrained.plan.spacing)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(3, 1, *(d * 2 for d in card["divisible_by"]))
    answer = session.run(None, {"image": x.numpy()})[0]
    with torch.inference_mode():
        np.testing.assert_allclose(answer, untrained.segmenter(x).numpy(), atol=LARGEST_DIFFERENCE)
    assert str(Path(models.__file__).parent).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_a_bundle_predicts_without_fewscan_what_fewscan_does(untrained: Model, tmp_path: Path) -> None:
    assert export(untrained.path, tmp_path / "bundle", kind="monai")["largest_difference"] <= LARGEST_DIFFERENCE
    (tmp_path / "bundle" / "images").mkdir()
    scans = {}
    for name, factor in (("several_windows", 1.9), ("smaller_than_a_window", 0.7)):
        image, _, grid = phantom(0)
        native = Geometry(grid.shape, grid.affine @ np.diag([-1.0, 1.0, factor, 1.0]))  # to be turned and resampled
        scans[name] = tmp_path / "bundle" / "images" / f"{name}.nii.gz"
        write_image(image, scans[name], native=native)
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path / "bundle", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    predictor = infer.torch_predictor(untrained, Hardware(device=torch.device("cpu"), precision="fp32"))
    for name, scan in scans.items():
        volume = read_image(scan)
        ours, theirs = (
            infer.segment(untrained, volume, predictor=predictor).label,
            read_labels(tmp_path / "bundle" / "labels" / f"{name}.nii.gz"),
        )
        np.testing.assert_allclose(theirs.geometry.affine, volume.geometry.affine, atol=1e-5)
        assert {1, 5} & set(np.unique(ours))
        assert (ours == theirs.data).mean() > 0.9999, name
    meta = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    assert meta["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "ball", "2": "rod"}
    assert meta["intended_use"] == "research use only"


def test_a_copy_that_differs_is_refused(untrained: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = models.safetensors.torch.load_file

    def spoilt(path: Path) -> dict[str, torch.Tensor]:
        tensors = sound(path)
        return tensors | {"head.bias": tensors["head.bias"] + 0.01}

    monkeypatch.setattr(models.safetensors.torch, "load_file", spoilt)
    with pytest.raises(ModelError, match=r"the bundle differs from the model by 0\.01 in a logit"):
        write_monai(untrained, tmp_path / "bundle")


def test_a_model_that_only_registers_has_nothing_to_export(untrained: Model, tmp_path: Path) -> None:
    for write in (write_monai, write_onnx):
        with pytest.raises(ModelError, match="only registers, there is no segmenter to export"):
            write(replace(untrained, segmenter=Absent()), tmp_path / "out")
    assert not list(tmp_path.iterdir())
