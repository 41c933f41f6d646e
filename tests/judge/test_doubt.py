"""Signs of doubt, and the way from a cross-validation to an expected Dice."""

import html
import io
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from phantom import SMALL, write_dataset
from rich.console import Console

import fewscan
from fewscan import api, runs
from fewscan.data import dataset as datasets
from fewscan.data.io import read_image
from fewscan.deliver.predicted import expectations
from fewscan.errors import ConfigError, DataError
from fewscan.judge import doubt as doubts
from fewscan.judge.confidence import read_calibration
from fewscan.judge.doubt import doubt, signs_of
from fewscan.methods.personalize import PersonalizeConfig
from fewscan.space.geometry import Geometry
from fewscan.tables import expected


def answer(size, *, shift=0, sharp=0.95):
    """Probabilities of one box of that size."""
    probs = torch.full((2, 16, 16, 16), 1 - sharp)
    probs[0] = sharp
    box = (slice(4 + shift, 4 + shift + size),) * 3
    probs[1][box], probs[0][box] = sharp, 1 - sharp
    return probs


One = SimpleNamespace(overlapping=False, names={1: "box"}, weights=())


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


def test_signs_describe_the_mask_that_is_written_not_the_one_without_weights():
    """Where the loss gave a class weight, the written mask is larger than what the divided probabilities show."""
    weighted = SimpleNamespace(**{**vars(One), "weights": (1.0, 4.0)})
    vague = answer(8, sharp=0.7)  # 0.7 against 0.3; divided by the weights 0.37 against 0.63
    found = signs_of([vague, vague], weighted)["box"]
    assert found["steady"] == 1.0
    assert found["sharp"] < signs_of([vague, vague], One)["box"]["sharp"]


def test_doubt_looks_at_the_answer_of_which_predictions_are_made(trained, monkeypatch):
    root, model = trained
    volume = read_image(root / "data" / "images" / "case_03.nii.gz", channels=model.plan.channels)
    plan = replace(model.plan, weights=(1.0, 30.0, 30.0))

    def predictor(windows):  # "ball" everywhere, by less than its weight
        return torch.tensor([0.0, 1.0, -9.0]).view(1, 3, 1, 1, 1).expand(len(windows), 3, *windows.shape[2:])

    assert set(doubt(volume, plan, predictor=predictor).signs) == {"ball"}


def test_a_bundle_in_doubt_shows_where_another_one_is_certain():
    mean = torch.zeros(3, 4, 4, 12)
    mean[1] = 1.0  # one bundle is sure everywhere
    mean[2, :, :, 7] = 0.5
    plan, grid = SimpleNamespace(overlapping=True), Geometry((4, 4, 12), np.eye(4))
    assert doubts._slices(mean, plan, grid) == (7,)


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
    assert known["widths"].keys() == {"ball", "rod"}
    assert [width[1:] for width in known["widths"].values()] == [[0.8]] * 2
    assert len(known["held_out"]) == 8
    assert 0 <= known["error"] < 0.3
    scan = root / "data" / "images" / "case_03.nii.gz"
    done = api.predict(model, scan, tmp_path / "out", calibration=root / "folds", device="cpu")
    rows = done[0].expected["labels"]
    assert set(rows) == {"ball", "rod"}
    assert all(0 <= row["low"] <= row["dice"] <= row["high"] <= 1 for row in rows.values())
    assert all(row["level"] == 0.8 for row in rows.values())
    noted = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"][0]["expected"]["labels"]
    assert noted["ball"]["dice"] == rows["ball"]["dice"] != round(rows["ball"]["dice"], 3)
    assert len(done[0].expected["slices"]) > 0
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(expected([("new", done[0].expected)]))
    told = " ".join(screen.export_text().split())
    assert "(80%)" in told
    assert "of patients like those of the calibration, the share that such a range is to hold on average" in told
    assert "such ranges held fewer" in told
    assert "warning" not in done[0].expected
    (tmp_path / "run").mkdir()
    (tmp_path / "out").rename(tmp_path / "run" / "predictions")
    page = api.report(tmp_path / "run", tmp_path / "r.html").read_text()
    assert "Expected Dice, worst first" in page
    assert "to hold 80% on average. It is as wide as to hold that share of those left out" in page
    assert "19 of 20" not in page


def test_the_report_of_a_cross_validation_shows_expected_against_measured_dice(trained, tmp_path):
    folds = trained[0] / "folds"
    known = read_calibration(folds)
    page = api.report(folds, tmp_path / "folds.html").read_text()
    assert page.count(" expected, ") == len(known.held_out) == 8
    label, expected, measured = known.held_out[0]
    assert f"<title>{label}: {expected:.3f} expected, {measured:.3f} measured</title>" in page
    assert f"differ by {known.error:.3f} on average over 4 patients" in page
    assert "to hold 80% on average. It is as wide as" in page
    assert "such ranges held fewer. So few patients allow no more." in page
    shutil.copy(folds / "evaluation.json", tmp_path)
    (tmp_path / "calibration.json").write_text('{"signs": [], "half": 0.1}')  # as it was written before
    assert "cross-validate again" in api.report(tmp_path, tmp_path / "old.html").read_text()


def expectation(dice, **more):
    return {"dice": dice, "low": dice - 0.1, "high": dice + 0.1, "level": 0.8, "found": True} | more


def test_the_worst_comes_first_where_rounding_would_tie():
    near = {"liver": expectation(0.85449), "spleen": expectation(0.85431), "aorta": expectation(0.85440)}
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(expected([("new", {"labels": near})]))
    one_each = [{"id": name, "expected": {"labels": {name: row}}} for name, row in near.items()]
    unknown = {"id": "old", "expected": {"labels": {"vein": {}}}}  # sorts last, wherever it stood
    for told in (screen.export_text(), expectations([unknown, *one_each])):
        assert told.index("spleen") < told.index("aorta") < told.index("liver")
    assert told.index("liver") < told.index("vein")


def test_a_label_that_is_missed_is_learnt_from_and_expected_to_be_worth_nothing(trained, tmp_path, monkeypatch):
    root, model = trained
    folds = tmp_path / "folds"
    shutil.copytree(root / "folds", folds)
    for number in (0, 1):  # as if the rod had been missed in two of the scans, so that two are left to tell of it
        signs, scores = folds / f"fold_{number}" / runs.SIGNS, folds / f"fold_{number}" / "evaluation.json"
        noted, judged = json.loads(signs.read_text()), json.loads(scores.read_text())
        for case, row in noted.items():
            row.pop("rod", None)
            next(c for c in judged["cases"] if c["id"] == case)["labels"]["rod"]["dice"] = 0.0
        signs.write_text(json.dumps(noted))
        scores.write_text(json.dumps(judged))
    fewscan.crossval(root / "data", folds, steps=40, settings=SMALL, device="cpu")
    known = json.loads((folds / "calibration.json").read_text())
    assert known["missed"] == 2
    assert [row[0] for row in known["held_out"]].count("rod") == 2
    assert known["widths"].keys() == {"ball"}  # two patients tell no range
    assert "not found, 2, are no dot" in api.report(folds, tmp_path / "folds.html").read_text()

    def blind(volume, plan, *, predictor):
        found = doubt(volume, plan, predictor=predictor)
        return found._replace(signs={"ball": found.signs["ball"]})

    monkeypatch.setattr("fewscan.judge.expectation.doubt", blind)
    scan = root / "data" / "images" / "case_03.nii.gz"
    [done] = api.predict(model, scan, tmp_path / "out", calibration=folds, device="cpu")
    rod = done.expected["labels"]["rod"]
    assert rod == {"dice": 0.0, "low": None, "high": None, "level": None, "found": False}
    noted = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"][0]["expected"]["labels"]
    assert noted["rod"] == rod
    assert done.expected["labels"]["ball"]["found"]
    page = expectations([{"id": "new", "expected": done.expected}])
    assert page.index("rod") < page.index("ball")
    assert "not found; 0 if it is there" in page
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(expected([("new", {"labels": {"rod": rod}}), ("older", {"labels": {"rod": rod | {"low": 0.0}}})]))
    told = screen.export_text()
    assert told.count("not found; 0 if it is there") == 2
    assert "on average" not in told + expectations([{"id": "new", "expected": {"labels": {"rod": rod}}}])


def test_a_calibration_of_other_predictions_or_labels_is_refused(trained, tmp_path):
    root, model = trained
    scan = root / "data" / "images" / "case_03.nii.gz"
    with pytest.raises(ConfigError, match="mirrored"):
        api.predict(model, scan, tmp_path / "out", calibration=root / "folds", tta=True, device="cpu")
    known = json.loads((root / "folds" / "calibration.json").read_text())
    (tmp_path / "calibration.json").write_text(json.dumps(known | {"labels": ["ball", "liver"]}))
    with pytest.raises(DataError, match=r"labels ball, liver, the model gives ball, rod"):
        api.predict(model, scan, tmp_path / "out", calibration=tmp_path, device="cpu")
    assert not (tmp_path / "out").exists()


def test_folds_that_were_trained_otherwise_than_the_model_are_warned_of(trained, tmp_path):
    root, model = trained
    scan, said = root / "data" / "images" / "case_03.nii.gz", []
    known = json.loads((root / "folds" / "calibration.json").read_text())
    assert (known["recipe"]["method"], known["recipe"]["folds"], known["recipe"]["steps"]) == ("segment", 4, 40)
    other = replace(model.settings, train=replace(model.settings.train, lr=0.5))
    longer = model.provenance | {"steps": 4000, "method": "joint", "labelled": ["case_00"]}
    odd = replace(model, settings=other, provenance=longer)
    [done] = api.predict(odd, scan, tmp_path / "out", calibration=root / "folds", device="cpu", observe=said.append)
    [warned] = [line for line in said if str(line).startswith("warning: ")]
    lengths, scans = "4000 steps, the folds 40 each", "1 labelled scan(s), the folds 4, 1 of them the same"
    for part in ("by joint, the folds by segment", "train.lr is 0.5, in the folds 0.003", lengths, scans):
        assert part in warned
        assert part in done.expected["warning"]
    page = expectations([{"id": "new", "expected": done.expected}])
    assert "Beware: the model was trained otherwise" in page
    del known["recipe"]  # as it was written before
    (tmp_path / "calibration.json").write_text(json.dumps(known))
    [done] = api.predict(odd, scan, tmp_path / "old", calibration=tmp_path, device="cpu")
    assert "warning" not in done.expected


def test_of_a_personalised_scan_the_answer_of_before_is_expected_and_called_so(trained, tmp_path):
    root, model = trained
    scan, quick = root / "data" / "images" / "case_03.nii.gz", PersonalizeConfig(views=1, rounds=1, steps=0)
    [plain] = api.predict(model, scan, tmp_path / "plain", calibration=root / "folds", device="cpu")
    out = tmp_path / "run" / "predictions"
    [done] = api.personalize(
        model, scan, out, atlases=api.open(root / "data"), mode="always", config=quick, calibration=root / "folds",
        device="cpu",
    )  # fmt: skip
    assert done.personalized["kept"] == "after"
    assert done.expected == plain.expected | {"of": "before"}
    assert done.expected["slices"]
    noted = json.loads((out / "predictions.json").read_text())["predictions"][0]["expected"]
    assert noted["of"] == "before"
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(expected([("case_03", done.expected)]))
    page = api.report(tmp_path / "run", tmp_path / "r.html").read_text()
    for told in (" ".join(screen.export_text().split()), html.unescape(page)):
        assert "case_03 (before)" in told
        assert "the Dice expected is that of the model's own answer" in told


def test_where_the_guard_keeps_the_model_s_own_answer_it_is_that_of_which_dice_is_expected(trained, tmp_path):
    root, model = trained
    scan, quick = root / "data" / "images" / "case_03.nii.gz", PersonalizeConfig(views=1, rounds=1, steps=0)
    single = datasets.select(api.open(root / "data"), labelled=["case_00"], unlabelled=[])  # which calibrates nothing
    [done] = api.personalize(
        model, scan, tmp_path / "out", atlases=single, config=quick, calibration=root / "folds", device="cpu"
    )
    assert done.personalized["kept"] == "before"
    assert "of" not in done.expected
    assert done.expected["slices"]
    assert "(before)" not in expectations([{"id": "case_03", "expected": done.expected}])


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
