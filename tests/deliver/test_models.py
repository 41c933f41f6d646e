"""Models for other programs: the same logits, everything needed beside them, nothing of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fewscan import api
from fewscan.data.io import read_labels
from fewscan.deliver import models
from fewscan.deliver.models import LARGEST_DIFFERENCE, write_monai, write_onnx
from fewscan.errors import ModelError
from fewscan.exporting import export
from fewscan.learn.networks import Absent

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


def test_onnx_gives_the_same_logits_for_windows_of_any_size(trained: Any, tmp_path: Path) -> None:
    _, model = trained
    report = export(model.path, tmp_path / "model.onnx", kind="onnx")
    assert report["largest_difference"] <= LARGEST_DIFFERENCE
    written = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(written)
    card = {entry.key: json.loads(entry.value) for entry in written.metadata_props}
    assert card["labels"] == {"0": "background", "1": "ball", "2": "rod"}
    assert card["use"] == "research use only"
    assert card["spacing_mm"] == pytest.approx(model.plan.spacing)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(3, 1, *(d * 2 for d in card["divisible_by"]))
    answer = session.run(None, {"image": x.numpy()})[0]
    with torch.inference_mode():
        np.testing.assert_allclose(answer, model.segmenter(x).numpy(), atol=LARGEST_DIFFERENCE)
    assert str(Path(models.__file__).parent).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_a_bundle_predicts_without_fewscan_what_fewscan_does(trained: Any, tmp_path: Path) -> None:
    data, model = trained
    assert export(model.path, tmp_path / "bundle", kind="monai")["largest_difference"] <= LARGEST_DIFFERENCE
    (tmp_path / "bundle" / "images").mkdir()
    scan = data / "images" / "case_03.nii.gz"
    (tmp_path / "bundle" / "images" / scan.name).write_bytes(scan.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path / "bundle", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    ours = read_labels(api.predict(model, scan, tmp_path / "out", device="cpu")[0].path)
    theirs = read_labels(tmp_path / "bundle" / "labels" / scan.name)
    np.testing.assert_allclose(theirs.geometry.affine, ours.geometry.affine, atol=1e-5)
    assert ours.data.any()
    assert (ours.data == theirs.data).mean() > 0.999
    meta = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    assert meta["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "ball", "2": "rod"}
    assert meta["intended_use"] == "research use only"


def test_a_copy_that_differs_is_refused(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = trained
    sound = models.safetensors.torch.load_file

    def spoilt(path: Path) -> dict[str, torch.Tensor]:
        tensors = sound(path)
        return tensors | {"head.bias": tensors["head.bias"] + 0.01}

    monkeypatch.setattr(models.safetensors.torch, "load_file", spoilt)
    with pytest.raises(ModelError, match=r"the bundle differs from the model by 0\.01 in a logit"):
        write_monai(model, tmp_path / "bundle")


def test_a_model_that_only_registers_has_nothing_to_export(trained: Any, tmp_path: Path) -> None:
    _, model = trained
    for write in (write_monai, write_onnx):
        with pytest.raises(ModelError, match="only registers, there is no segmenter to export"):
            write(replace(model, segmenter=Absent()), tmp_path / "out")
    assert not list(tmp_path.iterdir())
