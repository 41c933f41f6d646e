"""Personalised prediction of files, and the atlases that a model may keep."""

import json
import signal
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import safetensors.numpy
from phantom import SMALL, write_dataset

from fewscan import api, personalization
from fewscan.data import dataset as datasets
from fewscan.errors import ConfigError, DataError, ModelError
from fewscan.learn import atlases, checkpoint, engine
from fewscan.methods import personalize as methods
from fewscan.methods.personalize import PersonalizeConfig

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
    assert any("personalised" in str(line) for line in said)


def test_what_the_guard_refuses_is_what_predict_answers(project, tmp_path, monkeypatch):
    monkeypatch.setattr(methods.personalize, "objection", lambda evidence: "not today")
    done = asked(project, tmp_path / "auto", atlases=project[0] / "data")
    plain = api.predict(project[2], project[0] / "data" / "images" / "case_03.nii.gz", tmp_path / "plain", device="cpu")
    assert done[0].personalized["kept"] == "before"
    assert done[0].personalized["reason"] == "not today"
    assert done[0].path.read_bytes() == plain[0].path.read_bytes()


def test_a_scan_too_large_to_hold_is_predicted_as_it_is(project, tmp_path, monkeypatch):
    monkeypatch.setattr(personalization, "free_memory_bytes", lambda: 1)
    done = asked(project, tmp_path / "out", atlases=project[0] / "data", mode="always")
    assert "memory" in done[0].personalized["reason"]
    assert done[0].path.is_file()


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


def test_the_archive_knows_which_scans_are_of_one_patient_but_not_whose(project, tmp_path):
    _, found, model = project
    (tmp_path / "grid").mkdir()
    frames = [
        replace(one, patient="Jane Doe") for one in atlases.atlases_of(found, model.plan, folder=tmp_path / "grid")
    ]
    copy = replace(model, path=tmp_path)
    file = atlases.save_atlases([*frames[:2], replace(frames[2], patient="John Doe")], tmp_path)
    assert b"Doe" not in file.read_bytes()
    (tmp_path / "scratch").mkdir()
    kept = atlases.load_atlases(copy, folder=tmp_path / "scratch")
    assert [k.whose for k in kept] == ["patient 1", "patient 1", "patient 2"]
    assert all(isinstance(k.image, np.memmap) for k in kept)
    tensors = safetensors.numpy.load_file(file)  # as they were written before
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if "patient" not in k}, file)
    checkpoint.write_json({"cases": 3, "sha256": checkpoint.sha256(file)}, tmp_path / atlases.RECORD)
    assert [k.whose for k in atlases.load_atlases(copy)] == ["atlas 1", "atlas 2", "atlas 3"]


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
    with pytest.raises(DataError, match="no labelled case"):
        asked(project, tmp_path / "out", atlases=write_dataset(tmp_path / "bare", labelled=0, unlabelled=1))
    with pytest.raises(ConfigError, match="auto or always"):
        asked(project, tmp_path / "out", mode="perhaps")
    assert not (tmp_path / "out").exists()
