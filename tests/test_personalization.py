"""Personalised prediction of files, and the atlases that a model may keep."""

import json
import re
import shutil
import signal
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import safetensors.numpy
import torch
from phantom import SMALL, phantom, write_dataset

from fewscan import api, exporting, personalization
from fewscan.data import dataset as datasets
from fewscan.data.io import write_labelmap
from fewscan.deliver.predicted import EVIDENCE
from fewscan.deliver.report import read_run
from fewscan.deliver.scenes import scenes
from fewscan.errors import ConfigError, DataError, ModelError, ResourceError
from fewscan.learn import atlases, checkpoint, engine, infer
from fewscan.learn.answers import Segmented
from fewscan.learn.batches import Prepared
from fewscan.methods import personalize as methods
from fewscan.methods.personalize import PersonalizeConfig
from fewscan.methods.shaping import Shaper
from fewscan.space.volume import one_hot

QUICK = PersonalizeConfig(views=1, rounds=1, steps=4, atlases=2)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Three labelled scans, one new scan and a model."""
    root = tmp_path_factory.mktemp("project")
    found = datasets.find(write_dataset(root / "data", labelled=3, unlabelled=1))
    seen = datasets.select(found, labelled=[c.id for c in found.labelled], unlabelled=[])
    model = api.train(seen, root / "model", steps=60, settings=SMALL, device="cpu")
    return root, found, model


def asked(project, out, **options):
    root, _, model = project
    scan = root / "data" / "images" / "case_03.nii.gz"
    return api.personalize(model, scan, out, config=QUICK, device="cpu", budget_per_case=None, **options)


def test_scans_are_segmented_on_their_own_grid_and_the_verdict_is_kept(project, tmp_path):
    before = {p.name: p.read_bytes() for p in (project[0] / "model").iterdir() if p.is_file()}
    said = []
    done = asked(project, tmp_path / "out", atlases=project[0] / "data", mode="always", observe=said.append,
                 probabilities=True)  # fmt: skip
    assert {p.name: p.read_bytes() for p in (project[0] / "model").iterdir() if p.is_file()} == before
    image = nib.load(project[0] / "data" / "images" / "case_03.nii.gz")
    label = nib.load(done[0].path)
    assert label.shape == image.shape
    assert set(np.unique(np.asanyarray(label.dataobj))) == {0, 1, 2}
    probs = np.asanyarray(nib.load(tmp_path / "out" / "case_03_probabilities.nii.gz").dataobj)
    assert abs(probs.astype(int).sum(-1) - 255).max() <= 3
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"][0]
    assert record["personalized"]["kept"] == "after"
    assert 0 < record["personalized"]["evidence"]["agreement"] <= 1
    shown = {key for keys in EVIDENCE.values() for key in keys}
    assert record["personalized"]["evidence"].keys() - shown == {"changed", "rounds", "steps"}
    assert record["before"]["path"] == "before/case_03.nii.gz"
    assert nib.load(done[0].before.path).shape == image.shape
    told = next(str(line) for line in said if "1 of 1: case_03" in str(line))
    assert re.search(r"; personalised: (no voxel|(less than )?\d+\.\d % of the labelled voxels) changed, [a-z]", told)


@pytest.fixture
def refined(monkeypatch):
    """Answers that are known: a cube that grows by a slice, and a rod that goes; what is kept can be set."""
    own, other = np.zeros((2, 20, 24, 18), int)
    own[4:8, 4:8, 4:8], other[4:9, 4:8, 4:8] = 1, 1
    own[12:14, 4:8, 4:8] = 2
    said = {"kept": "after", "reason": methods.FITTING}

    def answer(self, case, **options):
        shares = [one_hot(torch.from_numpy(labels)[None], 3)[0] for labels in (own, other)]
        return methods.Personalized(*shares, evidence={}, **said)

    monkeypatch.setattr(personalization.Personalizer, "__call__", answer)
    return own, other, said


@pytest.fixture
def given(refined, monkeypatch):
    """What the model itself says is known too."""
    monkeypatch.setattr(infer, "segment", lambda *args, **options: Segmented(refined[0].astype(np.uint8), None))
    return refined


def test_the_answer_of_before_is_what_predict_writes_to_the_byte(project, refined, tmp_path):
    [done] = asked(project, tmp_path / "out", atlases=project[0] / "data")
    scan = project[0] / "data" / "images" / "case_03.nii.gz"
    [plain] = api.predict(project[2], scan, tmp_path / "plain", device="cpu")
    assert done.personalized["kept"] == "after"
    assert done.before.path.read_bytes() == plain.path.read_bytes()
    assert done.before.volumes_ml == plain.volumes_ml


def test_the_answer_of_before_lies_beside_the_one_that_was_kept(project, given, tmp_path):
    own, other, _ = given
    said = []
    [done] = asked(project, tmp_path / "out", atlases=project[0] / "data", observe=said.append)
    assert np.array_equal(np.asanyarray(nib.load(done.path).dataobj), other)
    assert np.array_equal(np.asanyarray(nib.load(done.before.path).dataobj), own)
    assert done.volumes_ml == {"ball": 0.08, "rod": 0.0}
    assert done.before.volumes_ml == {"ball": 0.064, "rod": 0.032}
    assert done.before.dice == pytest.approx({"ball": 2 * 64 / (64 + 80), "rod": 0.0})
    assert done.before.voxels_changed == (16 + 32) / (80 + 32)
    row = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"][0]
    assert (row["path"], row["before"]["path"]) == ("case_03.nii.gz", "before/case_03.nii.gz")
    assert str(tmp_path) not in json.dumps(row)
    assert "; personalised: 42.9 % of the labelled voxels changed, atlases and scan fit each other" in said[-1]


@pytest.mark.parametrize(
    ("given", "seconds"), [({}, 120.0), ({"budget_per_case": 5}, 5), ({"budget_per_case": None}, None)]
)
def test_a_scan_gets_the_time_that_its_size_asks_for_unless_told(
    project, refined, monkeypatch, tmp_path, given, seconds
):
    spent, answer = [], personalization.Personalizer.__call__
    monkeypatch.setattr(
        personalization.Personalizer,
        "__call__",
        lambda self, case, **options: spent.append(options["seconds"]) or answer(self, case, **options),
    )
    root, _, model = project
    scan = root / "data" / "images" / "case_03.nii.gz"
    voxels = np.prod(nib.load(scan).shape)
    monkeypatch.setattr(personalization, "WIDE", 2 * voxels)  # so that the scan is half as large as the largest
    api.personalize(model, scan, tmp_path / "out", atlases=root / "data", config=QUICK, device="cpu", **given)
    assert spent == [pytest.approx(seconds) if seconds else None]


def test_what_was_asked_for_against_the_evidence_is_called_so(project, given, tmp_path):
    given[2]["reason"] = "nothing was calibrated; ask for --personalize always"
    [done] = asked(project, tmp_path / "out", atlases=project[0] / "data", mode="always")
    assert done.personalized["reason"] == "as asked, although nothing was calibrated"


def test_nobody_takes_answers_of_before_for_predictions(project, given, tmp_path):
    root, out, labels = project[0], tmp_path / "out", tmp_path / "labels"
    scans = [root / "data" / "images" / f"case_0{i}.nii.gz" for i in (2, 3)]
    api.personalize(project[2], scans, out, atlases=root / "data", config=QUICK, device="cpu")
    labels.mkdir()
    for i in (2, 3):
        _, label, grid = phantom(i)
        write_labelmap(label, labels / f"case_0{i}.nii.gz", native=grid)
    found, own = api.evaluate(out, labels), api.evaluate(out / "before", labels)
    assert [case.id for case in found.cases] == [case.id for case in own.cases] == ["case_02", "case_03"]
    assert found.names == own.names == ("ball", "rod")
    assert not any(found.unmatched.values())
    assert found.cases[0].labels["rod"].status == "missed"
    assert own.cases[0].labels["rod"].status == "scored"
    assert exporting.export(out, tmp_path / "bids", kind="bids")["cases"] == 2
    assert {case.id for case in datasets.find(out).cases} == {"case_02", "case_03"}
    assert len(scenes(read_run(out))) == 2
    assert set(api.mesh(out / "before" / "case_03.nii.gz", tmp_path / "mesh", purpose="view")["parts"]) == {
        "ball",
        "rod",
    }
    done = api.personalize(
        project[2], scans, out, atlases=root / "data", config=QUICK, device="cpu", skip_existing=True
    )  # fmt: skip
    assert [p.skipped for p in done] == [True, True]
    assert sorted(p.name for p in (out / "before").iterdir()) == ["case_02.nii.gz", "case_03.nii.gz"]


def test_an_answer_of_before_goes_with_the_one_that_took_its_place(project, given, tmp_path):
    out, scan = tmp_path / "out", project[0] / "data" / "images" / "case_03.nii.gz"
    asked(project, out, atlases=project[0] / "data")
    asked(project, out, atlases=project[0] / "data")  # replaces its own
    api.predict(project[2], scan, out, device="cpu")
    assert not (out / "before" / "case_03.nii.gz").exists()
    assert "before" not in json.loads((out / "predictions.json").read_text())["predictions"][0]
    asked(project, out, atlases=project[0] / "data")
    given[2]["kept"] = "before"
    asked(project, out, atlases=project[0] / "data")
    assert not (out / "before" / "case_03.nii.gz").exists()


@pytest.mark.parametrize("skip", [False, True])
def test_a_file_of_somebody_else_is_not_overwritten_by_an_answer_of_before(project, given, tmp_path, skip):
    other = tmp_path / "out" / "before" / "case_03.nii.gz"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    with pytest.raises(ConfigError, match=r"before.case_03\.nii\.gz exists, and predictions\.json does not say"):
        asked(project, tmp_path / "out", atlases=project[0] / "data", skip_existing=skip)
    assert other.read_text() == "mine"
    moved = shutil.copy(project[0] / "data" / "images" / "case_03.nii.gz", other)
    with pytest.raises(ConfigError, match="where the scans are"):
        api.predict(project[2], moved, tmp_path / "out", device="cpu")


def test_what_the_guard_refuses_is_what_predict_answers(project, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "objection", lambda evidence: "not today")
    done = asked(project, tmp_path / "auto", atlases=project[0] / "data")
    plain = api.predict(project[2], project[0] / "data" / "images" / "case_03.nii.gz", tmp_path / "plain", device="cpu")
    assert done[0].personalized["kept"] == "before"
    assert done[0].personalized["reason"] == "not today"
    assert done[0].path.read_bytes() == plain[0].path.read_bytes()
    assert done[0].before is None
    assert not (tmp_path / "auto" / "before").exists()


def test_a_scan_too_large_to_hold_is_predicted_as_it_is(project, tmp_path, monkeypatch):
    monkeypatch.setattr(personalization, "free_memory_bytes", lambda: 1)
    done = asked(project, tmp_path / "out", atlases=project[0] / "data", mode="always")
    assert "memory" in done[0].personalized["reason"]
    assert done[0].path.is_file()


def test_a_scan_that_takes_more_memory_than_thought_is_predicted_as_it_is(project, tmp_path, monkeypatch):
    def large(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(personalization.Personalizer, "__call__", large)
    done = asked(project, tmp_path / "out", atlases=project[0] / "data", mode="always")
    assert done[0].personalized["kept"] == "before"
    assert "ran out of memory" in done[0].personalized["reason"]
    assert done[0].path.is_file()


def test_a_scan_too_large_to_be_personalised_to_is_told_what_helps(project, tmp_path, monkeypatch):
    def large(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(personalization, "on_plan", large)
    with pytest.raises(ResourceError, match=r"out of memory; .*predict it without --personalize, or use --dev") as told:
        asked(project, tmp_path / "out", atlases=project[0] / "data", mode="always")
    assert "--max-memory" not in str(told.value)


def test_atlases_travel_with_a_model_only_when_asked(project, tmp_path):
    root, found, model = project
    with pytest.raises(DataError, match="--atlases"):
        asked(project, tmp_path / "none")
    seen = datasets.select(found, labelled=[c.id for c in found.labelled], unlabelled=[])
    model = api.train(seen, root / "kept", steps=2, settings=SMALL, device="cpu", keep_atlases=True)
    project = (root, found, model)
    kept = atlases.load_atlases(model)
    (tmp_path / "grid").mkdir()
    fresh = atlases.atlases_of(found, model.plan, folder=tmp_path / "grid")
    assert [k.id for k in kept] == ["atlas 1", "atlas 2", "atlas 3"]
    assert [k.whose for k in kept] == ["patient 1", "patient 2", "patient 3"]
    for one, other in zip(kept, fresh, strict=True):
        np.testing.assert_allclose(one.image, other.image, atol=4e-3)
        np.testing.assert_array_equal(one.label, other.label)
        assert one.counts == other.counts
    assert b"case_0" not in (root / "kept" / atlases.FILE).read_bytes()
    assert asked(project, tmp_path / "kept")[0].path.is_file()
    file = root / "kept" / atlases.FILE
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(ModelError, match="SHA-256"):
        asked(project, tmp_path / "damaged")


def test_a_scan_that_is_among_its_atlases_is_not_told_its_own_labels(project, tmp_path):
    root, _, model = project
    renamed, said, seen = tmp_path / "new.nii.gz", [], []
    shutil.copy(root / "data" / "images" / "case_01.nii.gz", renamed)
    real = Shaper.aligned

    def aligned(self, *args, leave=None, **options):
        found = real(self, *args, leave=leave, **options)
        if leave == "case_01":
            seen.append([atlas.id for atlas, _ in found.atlases])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shaper, "aligned", aligned)
        [done] = api.personalize(model, renamed, tmp_path / "out", atlases=root / "data", config=QUICK, device="cpu",
                                 mode="always", budget_per_case=None, observe=said.append)  # fmt: skip
    assert all("case_01" not in atlases for atlases in seen)
    assert [len(atlases) for atlases in seen] == [2, 2]  # while the atlases' worth is found out, and for the scan
    assert done.personalized["evidence"]["left_out"] == 1
    assert "atlases: 1 of 3 left out, the scan itself or others of its patient" in said
    alone = datasets.select(api.open(root / "data"), labelled=["case_01"], unlabelled=[])
    [done] = api.personalize(
        model, renamed, tmp_path / "alone", atlases=alone, config=QUICK, device="cpu", mode="always"
    )
    assert done.personalized["kept"] == "before"
    assert "every atlas is this scan itself" in done.personalized["reason"]


def test_a_scan_s_patient_is_found_by_name_and_by_what_it_shows():
    rng = np.random.default_rng(0)
    blank = held("p1_L", 1, patient="p1")
    known = [replace(blank, image=rng.random((1, 9, 9, 9), np.float32)), held("atlas 2", 1, patient="patient 2")]
    other = rng.random((1, 9, 9, 9), np.float32)
    assert atlases.patient_among(known, known[0].image.astype(np.float16).astype(np.float32), name="x") == "p1"
    assert atlases.patient_among(known, other, name="p1_R") == "p1"
    assert atlases.patient_among(known, other, name="p2") == ""


def test_the_archive_knows_which_scans_are_of_one_patient_but_not_whose(project, tmp_path):
    _, found, model = project
    (tmp_path / "grid").mkdir()
    frames = [
        replace(one, patient="Jane Doe") for one in atlases.atlases_of(found, model.plan, folder=tmp_path / "grid")
    ]
    copy = replace(model, path=tmp_path)
    file = atlases.save_atlases([*frames[:2], replace(frames[2], patient="John Doe")], tmp_path, plan=model.plan)
    assert b"Doe" not in file.read_bytes()
    (tmp_path / "scratch").mkdir()
    kept = atlases.load_atlases(copy, folder=tmp_path / "scratch")
    assert [k.whose for k in kept] == ["patient 1", "patient 1", "patient 2"]
    assert all(isinstance(k.image, np.memmap) for k in kept)
    tensors = safetensors.numpy.load_file(file)  # as they were written before
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if "patient" not in k}, file)
    checkpoint.write_json({"cases": 3, "sha256": checkpoint.sha256(file)}, tmp_path / atlases.RECORD)
    assert [k.whose for k in atlases.load_atlases(copy)] == ["atlas 1", "atlas 2", "atlas 3"]


def held(name, *labels, patient=""):
    """A case on no grid, of which it is known how many voxels each label has."""
    counts = tuple(10 * (k == 0 or k in labels) for k in range(4))
    blank = np.zeros((1, 2, 2, 2), np.float32)
    return Prepared(name, blank, np.zeros((2, 2, 2), np.int16), (), counts, np.ones(4, np.bool_), patient=patient)


def test_of_many_scans_a_few_are_kept_patients_in_turn_and_no_label_lost():
    frames = [held(f"a{i}", 1, 2, patient="a") for i in range(9)]
    fuller = [held("b", 1, patient="b"), held("c", 1, 2, 3, patient="c")]
    assert [c.id for c in atlases.in_turn([*frames, *fuller], most=2)] == ["a0", "c"]
    assert [c.id for c in atlases.in_turn([*frames, *fuller], most=4)] == ["a0", "a1", "b", "c"]
    assert atlases.in_turn(fuller, most=20) == fuller
    many = [held(str(i), 1, 2) for i in range(30)] + [held("rare", 3)]
    kept = atlases.in_turn(many, most=20)
    assert len(kept) == 20
    assert kept[-1].id == "rare"


def test_how_much_of_the_archive_is_kept_is_said(project, monkeypatch):
    root, found, _ = project
    monkeypatch.setattr(personalization, "MOST_KEPT", 2)
    seen, said = datasets.select(found, labelled=[c.id for c in found.labelled], unlabelled=[]), []
    model = api.train(seen, root / "few", steps=2, settings=SMALL, device="cpu", keep_atlases=True, observe=said.append)
    size = (root / "few" / atlases.FILE).stat().st_size
    assert said[-1] == f"atlases: 2 of 3 labelled scans lie beside the model now, {size / 1e6:.1f} MB"
    assert len(atlases.load_atlases(model)) == 2


def test_ctrl_c_while_a_copy_is_refined_writes_nothing_of_that_scan(project, tmp_path, monkeypatch):
    root, _, model = project
    scans = [root / "data" / "images" / f"case_0{i}.nii.gz" for i in (3, 0, 1)]
    real, asked_for = methods.segment.supervised, []

    def supervised(*args, **options):
        phase = real(*args, **options)
        asked_for.append(phase)

        def batches(rng):
            if len(asked_for) == 3:  # the second scan: lessons are made twice for each
                signal.raise_signal(signal.SIGINT)
            return phase.batches(rng)

        return replace(phase, batches=batches)

    monkeypatch.setattr(methods.segment, "supervised", supervised)
    monkeypatch.setattr(engine, "COOL_DOWN_SECONDS", 0.0)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        api.personalize(model, scans, tmp_path / "out", atlases=root / "data", mode="always", budget_per_case=None,
                        config=QUICK, device="cpu")  # fmt: skip
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in (tmp_path / "out").glob("*.nii.gz")] == ["case_03.nii.gz"]
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
    assert [row["id"] for row in record] == ["case_03"]


def test_foreign_atlases_and_impossible_wishes_are_refused(project, tmp_path):
    other = write_dataset(tmp_path / "other", labelled=1)
    (other / "labels.json").write_text(json.dumps({"1": "liver", "2": "rod"}))
    with pytest.raises(DataError, match="liver"):
        asked(project, tmp_path / "out", atlases=other)
    empty = write_dataset(tmp_path / "empty", labelled=2)
    for i in range(2):
        label = np.zeros((20, 24, 18), np.uint8)
        write_labelmap(label, empty / "labels" / f"case_0{i}.nii.gz", native=phantom(i)[2])
    with pytest.raises(DataError, match="empty: 2 label maps, and no voxel of ball, rod in them"):
        asked(project, tmp_path / "out", atlases=empty, mode="always")
    with pytest.raises(DataError, match="no voxel of ball, rod"):
        personalization.keep_atlases(project[2], datasets.find(empty))
    assert not (project[0] / "model" / atlases.RECORD).exists()
    with pytest.raises(DataError, match="no labelled case"):
        asked(project, tmp_path / "out", atlases=write_dataset(tmp_path / "bare", labelled=0, unlabelled=1))
    with pytest.raises(ConfigError, match="auto or always"):
        asked(project, tmp_path / "out", mode="perhaps")
    for budget in (0, "2m"):
        with pytest.raises(ConfigError, match="budget of a case must be above 0 s, auto or None"):
            api.personalize(project[2], tmp_path / "scan", tmp_path / "out", budget_per_case=budget)
    assert not (tmp_path / "out").exists()
