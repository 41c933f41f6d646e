"""Signs of doubt, and the way from a cross-validation to an expected Dice."""

import json
from types import SimpleNamespace

import pytest
import torch
from phantom import SMALL, write_dataset

import fewscan
from fewscan import api
from fewscan.data.io import read_image
from fewscan.errors import DataError
from fewscan.judge import doubt as doubts
from fewscan.judge.doubt import doubt, signs_of


def answer(size, *, shift=0, sharp=0.95):
    """Probabilities of one box of that size."""
    probs = torch.full((2, 16, 16, 16), 1 - sharp)
    probs[0] = sharp
    box = (slice(4 + shift, 4 + shift + size),) * 3
    probs[1][box], probs[0][box] = sharp, 1 - sharp
    return probs


One = SimpleNamespace(overlapping=False, names={1: "box"})


def test_what_is_blurred_or_moves_about_is_doubted():
    sure = signs_of([answer(8), answer(8), answer(8)], One)["box"]
    vague = signs_of([answer(8, sharp=0.6), answer(8, sharp=0.6)], One)["box"]
    unsteady = signs_of([answer(8), answer(8, shift=2), answer(8, shift=-2)], One)["box"]
    assert sure["steady"] == 1.0
    assert vague["sharp"] < sure["sharp"]
    assert unsteady["steady"] < 0.5
    assert unsteady["sharp"] == sure["sharp"]


def test_a_label_that_was_not_found_has_no_signs():
    assert signs_of([answer(0)], One) == {}


def test_slices_in_doubt_are_named_in_world_millimetres(trained):
    root, model = trained
    volume = read_image(root / "data" / "images" / "case_03.nii.gz", channels=model.plan.channels)

    def predictor(windows):
        logits = torch.zeros(len(windows), 3, *windows.shape[2:])
        logits[:, 0] = 9.0
        logits[..., 12] = 0.0  # nothing is known in one slice
        return logits

    found = doubt(volume, model.plan, predictor=predictor)
    assert abs(found.slices[0] - 12) <= 1  # views are turned a little
    assert found.heights_mm[0] == pytest.approx(float((volume.geometry.affine @ [0, 0, found.slices[0], 1])[2]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("doubt")
    write_dataset(root / "data", labelled=4)
    fewscan.crossval(root / "data", root / "folds", steps=40, settings=SMALL, device="cpu")
    model = api.train(root / "data", root / "model", steps=40, settings=SMALL, device="cpu")
    return root, model


def test_a_cross_validation_tells_what_dice_to_expect(trained, tmp_path):
    root, model = trained
    known = json.loads((root / "folds" / "calibration.json").read_text())
    assert known["patients"] == 4
    assert known["level"] == pytest.approx(0.8)
    assert 0 <= known["error"] < 0.3
    scan = root / "data" / "images" / "case_03.nii.gz"
    done = api.predict(model, scan, tmp_path / "out", calibration=root / "folds", device="cpu")
    rows = done[0].expected["labels"]
    assert set(rows) == {"ball", "rod"}
    assert all(0 <= row["low"] <= row["dice"] <= row["high"] <= 1 for row in rows.values())
    assert len(done[0].expected["slices"]) > 0
    (tmp_path / "run").mkdir()
    (tmp_path / "out").rename(tmp_path / "run" / "predictions")
    page = api.report(tmp_path / "run", tmp_path / "r.html").read_text()
    assert "Expected Dice, worst first" in page


def test_a_folder_without_a_calibration_is_refused(trained, tmp_path):
    root, model = trained
    scan = root / "data" / "images" / "case_03.nii.gz"
    with pytest.raises(DataError, match="crossval"):
        api.predict(model, scan, tmp_path / "out", calibration=root / "model", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_scan_too_large_to_be_held_has_no_expectation(trained, tmp_path, monkeypatch):
    root, model = trained
    monkeypatch.setattr(doubts, "free_memory_bytes", lambda: 1)
    scan = root / "data" / "images" / "case_03.nii.gz"
    done = api.predict(model, scan, tmp_path / "out", calibration=root / "folds", device="cpu")
    assert "too large" in done[0].expected["reason"]
