"""The method learns, from one case, from sparse slices and from partial labels; runs can be killed and go on."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from phantom import NAMES, SMALL, phantom, write_dataset

from fewscan import api, runs
from fewscan.data.io import read_image, read_labels, write_image, write_labelmap
from fewscan.errors import ConfigError, DataError, ModelError, ResourceError
from fewscan.learn import infer
from fewscan.learn.hardware import pick

TRAIN = """
import sys, torch
torch.set_num_threads(2)
from fewscan import api
api.train(sys.argv[1], sys.argv[2], steps=int(sys.argv[3]), resume=sys.argv[4] == "resume", device="cpu",
          method="segment",
          settings={"network.widths": "8,16,16", "train.warmup_steps": "5"},
          observe=lambda e: print(e if isinstance(e, str) else e.step, flush=True))
"""


def train(*args, **more):
    """The method that this file is about, whatever the data would choose."""
    return api.train(*args, method="segment", **more)


def dice(model, path, label):
    volume = read_image(path)
    got = infer.segment(model, volume, predictor=infer.torch_predictor(model, pick("cpu"))).label
    return [2 * ((got == v) & (label == v)).sum() / ((got == v).sum() + (label == v).sum()) for v in NAMES]


def test_it_learns_from_one_case(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=1)
    model = train(data, tmp_path / "model", steps=120, settings=SMALL, device="cpu")
    scores = dice(model, data / "images" / "case_01.nii.gz", phantom(1)[1])
    assert min(scores) > 0.8, scores


def test_it_learns_from_every_fourth_slice(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=2, unlabelled=1)
    for i in range(2):
        _, label, geometry = phantom(i)
        sparse = np.zeros_like(label)
        sparse[:, :, 1::4] = label[:, :, 1::4]
        write_labelmap(sparse, data / "labels" / f"case_{i:02d}.nii.gz", native=geometry)
    model = train(data, tmp_path / "model", steps=120, settings=SMALL, device="cpu")
    scores = dice(model, data / "images" / "case_02.nii.gz", phantom(2)[1])
    assert min(scores) > 0.7, scores


def test_it_learns_each_label_from_the_cases_that_carry_it(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=4, unlabelled=1)
    drawn = {}
    for i in range(4):
        _, label, geometry = phantom(i)
        label[label == 1 + i % 2] = 0
        drawn[f"case_{i:02d}"] = [NAMES[2 - i % 2]]
        write_labelmap(label, data / "labels" / f"case_{i:02d}.nii.gz", native=geometry)
    (data / "drawn.json").write_text(json.dumps(drawn))
    model = train(data, tmp_path / "model", steps=150, settings=SMALL, device="cpu")
    scores = dice(model, data / "images" / "case_04.nii.gz", phantom(4)[1])
    assert min(scores) > 0.7, scores


def test_the_folder_tells_how_it_was_made(trained):
    _, model = trained
    description = json.loads((model.path / "model.json").read_text())
    assert description["seed"] == 0
    assert description["steps"] == 60
    assert description["labelled"] == ["case_00", "case_01", "case_02"]
    assert description["settings"]["train"]["warmup_steps"] == 5
    assert {"torch", "numpy", "fewscan"} <= description["versions"].keys()
    lines = [json.loads(line) for line in (model.path / "history.jsonl").read_text().splitlines()]
    assert {"step", "seconds", "loss", "lr", "terms"} <= lines[0].keys()
    assert (model.path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert not (model.path / "cache").exists()


def arguments(data, out, steps, mode="new"):
    return [sys.executable, "-c", TRAIN, str(data), str(out), str(steps), mode]


def test_a_model_folder_does_not_tell_where_the_scans_lie(trained):
    data, model = trained
    for path in model.path.iterdir():
        assert str(data).encode() not in path.read_bytes(), path.name


def test_faulty_data_is_refused_by_file_fault_and_remedy(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=2)
    image, _, geometry = phantom(0)
    image[3, 3, 3] = np.nan
    write_image(image, data / "images" / "case_00.nii.gz", native=geometry)
    with pytest.raises(DataError, match=r"case_00\.nii\.gz: 1 voxels are NaN or infinite; --fix writes a copy"):
        train(data, tmp_path / "model", steps=1, settings=SMALL)
    assert not (tmp_path / "model").exists()


def run(data, out, steps, mode="new"):
    subprocess.run(arguments(data, out, steps, mode), stdout=subprocess.DEVNULL, check=True)


def start(data, out, steps):
    return subprocess.Popen(arguments(data, out, steps), stdout=subprocess.PIPE, text=True)


def wait_for_step(process, step):
    for line in process.stdout:
        if line.strip().isdigit() and int(line) >= step:
            return
    raise AssertionError("the run ended before it was stopped")


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "data", labelled=2)
    run(data, tmp_path / "whole", 60)
    frequent = TRAIN.replace("from fewscan import api", "from fewscan import api\nfrom fewscan.learn import session\n"
                             "session.SAVE_EVERY_SECONDS = session.LOG_EVERY_SECONDS = 0.0")  # fmt: skip
    monkeypatch.setattr(sys.modules[__name__], "TRAIN", frequent)
    with start(data, tmp_path / "killed", 60) as killed:
        wait_for_step(killed, 23)
        killed.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "model.json").exists()
    run(data, tmp_path / "killed", 60, "resume")
    a, b = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "killed"))
    assert a == b


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_run_leaves_a_usable_model_and_goes_on(tmp_path, number):
    data = write_dataset(tmp_path / "data", labelled=2)
    with start(data, tmp_path / "model", 100_000) as process:
        wait_for_step(process, 10)
        process.send_signal(number)
        tail = process.stdout.read()
    assert process.returncode == 0
    assert "go on with --resume" in tail
    model = api.load(tmp_path / "model")
    assert model.provenance["interrupted"]
    state = (tmp_path / "model" / "state.safetensors").stat().st_mtime
    time.sleep(0.01)
    train(data, tmp_path / "model", extend=1.0, settings=SMALL, device="cpu")
    assert (tmp_path / "model" / "state.safetensors").stat().st_mtime > state
    assert api.load(tmp_path / "model").provenance["steps"] > 10


def test_a_taken_folder_is_not_written_over(trained, tmp_path):
    data, model = trained
    before = (model.path / "weights.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="not empty; choose another folder"):
        train(data, model.path, steps=1, settings=SMALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        train(data, tmp_path / "mine", steps=1, settings=SMALL)
    assert (model.path / "weights.safetensors").read_bytes() == before
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_resuming_another_run_is_refused(trained, tmp_path):
    data, model = trained
    with pytest.raises(ModelError, match=r"belongs to another run: .*seed"):
        train(data, model.path, steps=80, seed=1, resume=True, settings=SMALL, device="cpu")
    with pytest.raises(ModelError, match="holds no state"):
        train(data, tmp_path / "none", steps=80, resume=True, settings=SMALL)
    with pytest.raises(ConfigError, match="is complete"):
        train(data, model.path, resume=True, settings=SMALL, device="cpu")


def test_no_label_at_all_is_one_sentence(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=0, unlabelled=2)
    with pytest.raises(DataError, match="label"):
        train(data, tmp_path / "model", steps=1, settings=SMALL)
    assert not (tmp_path / "model" / "model.json").exists()


def test_too_little_memory_is_said_before_anything_is_written(trained, tmp_path):
    with pytest.raises(ValueError, match=r"GiB even with the smallest patch.*--max-memory"):
        train(trained[0], tmp_path / "model", steps=1, max_memory=1 << 20)
    assert not (tmp_path / "model" / "model.json").exists()


def test_a_dry_run_writes_nothing(trained, tmp_path):
    said = []
    train(trained[0], tmp_path / "model", steps=5, dry_run=True, observe=said.append)
    assert "steps/s measured" in said[-2]
    assert said[-1] == "nothing was trained"
    assert not (tmp_path / "model").exists()


def test_the_same_seed_gives_the_same_weights(trained, tmp_path):
    data, _ = trained
    first, again, other = (
        train(data, tmp_path / name, steps=5, seed=seed, settings=SMALL, device="cpu")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    flat = [torch.cat([p.flatten() for p in m.segmenter.parameters()]) for m in (first, again, other)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


def test_predictions_lie_on_the_inputs_own_grid(trained, tmp_path):
    model = trained[1]
    image, label, geometry = phantom(0)
    from fewscan.space.geometry import Geometry, ras_geometry, to_ras

    flipped = Geometry((18, 20, 24), np.array([[0, -1.0, 0, 9], [0, 0, 1, -4], [-1, 0, 0, 2], [0, 0, 0, 1]]))
    on_ras = Geometry(ras_geometry(flipped).shape, ras_geometry(flipped).affine)
    assert on_ras.shape == (20, 24, 18)
    write_image(image, tmp_path / "turned.nii.gz", native=flipped)
    (done,) = api.predict(model, tmp_path / "turned.nii.gz", tmp_path / "out", device="cpu")
    import nibabel as nib

    a, b = nib.load(tmp_path / "turned.nii.gz"), nib.load(done.path)
    assert a.shape == b.shape == (18, 20, 24)
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-4)
    got = read_labels(done.path).data
    assert 2 * ((got == 1) & (label == 1)).sum() / ((got == 1).sum() + (label == 1).sum()) > 0.7
    assert to_ras(np.asarray(b.dataobj), flipped)[0].shape == geometry.shape


def test_the_python_interface_is_three_calls(trained, tmp_path):
    import fewscan

    data = fewscan.open(trained[0])
    model = data.train(tmp_path / "model", steps=3)
    (done,) = model.predict(data.unlabelled[0].images[0], tmp_path / "out")
    assert done.path.is_file()
    assert set(done.volumes_ml) == {"ball", "rod"}
    assert fewscan.load(tmp_path / "model").names == model.names


def test_predict_never_writes_over_the_scans(trained):
    data, model = trained
    with pytest.raises(ConfigError, match="would be overwritten"):
        api.predict(model, data / "images", data / "images")


def test_predict_never_writes_over_label_maps(trained, tmp_path):
    data, model = trained
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "case_00.nii.gz").write_bytes(b"drawn by hand")
    with pytest.raises(ConfigError, match="is not a prediction of fewscan"):
        api.predict(model, data / "images", labels, device="cpu")
    assert (labels / "case_00.nii.gz").read_bytes() == b"drawn by hand"
    api.predict(model, data / "images", tmp_path / "own", device="cpu")
    api.predict(model, data / "images", tmp_path / "own", device="cpu")


def test_what_is_there_is_skipped(trained, tmp_path):
    data, model = trained
    first = api.predict(model, data / "images" / "case_00.nii.gz", tmp_path, device="cpu")
    seen = []
    again = api.predict(model, data / "images", tmp_path, skip_existing=True, device="cpu", observe=seen.append)
    assert [p.skipped for p in again] == [True, False, False, False]
    assert first[0].path == again[0].path
    shares = [e.fraction for e in seen if not isinstance(e, str)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_case_nobody_looked_at_is_left_out(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=2)
    _, label, geometry = phantom(1)
    (data / "labels.json").unlink()
    (data / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "ball": 1, "rod": 2, "ignore": 3}}))
    write_labelmap(np.full_like(label, 3), data / "labels" / "case_01.nii.gz", native=geometry)
    model = train(data, tmp_path / "model", steps=3, settings=SMALL, device="cpu")
    assert model.provenance["labelled"] == ["case_00"]


def test_crossval_leaves_whole_patients_out_and_picks_up_where_it_was(trained, tmp_path):
    data, _ = trained
    evaluation = runs.crossval(data, tmp_path / "cv", folds="loo", steps=30, settings=SMALL, device="cpu")
    assert sorted(c.id for c in evaluation.cases) == ["case_00", "case_01", "case_02"]
    for i in range(3):
        model = json.loads((tmp_path / "cv" / f"fold_{i}" / "model" / "model.json").read_text())
        tested = json.loads((tmp_path / "cv" / f"fold_{i}" / "evaluation.json").read_text())["cases"]
        assert not {c["id"] for c in tested} & set(model["labelled"])
    said = []
    runs.crossval(data, tmp_path / "cv", folds="loo", steps=30, settings=SMALL, device="cpu", observe=said.append)
    assert [line.partition(": ")[0] for line in said] == [f"fold {i + 1} of 3" for i in range(3)]
    assert all("read back from" in line for line in said)


def test_crossval_reads_no_fold_back_whose_labels_were_corrected(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=2)
    how = {"folds": "loo", "steps": 2, "settings": SMALL, "device": "cpu", "method": "segment"}
    runs.crossval(data, tmp_path / "cv", **how)
    scan, label = (data / kind / "case_01.nii.gz" for kind in ("images", "labels"))
    os.utime(label, (1, 1))
    runs.crossval(data, tmp_path / "cv", **how)  # a copy of the data is the same data
    for path in (label, scan):
        whole = path.read_bytes()
        volume = read_image(path)
        volume.data[0, 5:9] = 0
        write_image(volume.data[0], path, native=volume.native)
        with pytest.raises(ConfigError, match=r"fold_0 was made before the label or the scan of case_01 changed"):
            runs.crossval(data, tmp_path / "cv", **how)
        path.write_bytes(whole)
    note = tmp_path / "cv" / "fold_0" / runs.RECIPE
    note.write_text(json.dumps({key: row for key, row in json.loads(note.read_text()).items() if key != "files"}))
    with pytest.raises(ConfigError, match=r"fold\.json does not say of which files it is"):
        runs.crossval(data, tmp_path / "cv", **how)


def test_crossval_refuses_before_the_first_fold_what_fails_after_it(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=3)
    out = tmp_path / "cv"
    for method, said in (("register", "--method register trains no segmenter"), ("sgement", "got 'sgement'")):
        with pytest.raises(ConfigError, match=said):
            runs.crossval(data, out, method=method, steps=2, settings=SMALL, device="cpu")
    for more, said in (
        ({"settings": {"train.rl": "1"}}, "did you mean 'train.lr'"),
        ({"budget": "5m"}, "either --budget 5m or --steps 2 for each fold"),
    ):
        with pytest.raises(ConfigError, match=said):
            runs.crossval(data, out, steps=2, device="cpu", **more)
    image, _, geometry = phantom(0)
    image[3, 3, 3] = np.nan
    write_image(image, data / "images" / "case_00.nii.gz", native=geometry)  # left out by the first fold
    with pytest.raises(DataError, match=r"case_00\.nii\.gz: 1 voxels are NaN"):
        runs.crossval(data, out, steps=2, settings=SMALL, device="cpu")
    assert not out.exists()


def test_crossval_replaces_no_evaluation_of_something_else(trained, tmp_path):
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"evaluation\.json is of another evaluation and would be replaced"):
        runs.crossval(trained[0], tmp_path, steps=2, settings=SMALL, device="cpu")
    assert os.listdir(tmp_path) == ["evaluation.json"]


def test_crossval_does_not_mix_two_splits(trained, tmp_path):
    data, _ = trained
    runs.crossval(data, tmp_path / "cv", folds="loo", steps=3, settings=SMALL, device="cpu")
    with pytest.raises(ConfigError, match="belongs to another cross-validation"):
        runs.crossval(data, tmp_path / "cv", folds=2, steps=3, settings=SMALL, device="cpu")


def test_a_run_killed_before_its_first_save_can_start_again(trained, tmp_path):
    out = tmp_path / "model"
    (out / "cache").mkdir(parents=True)
    (out / "history.jsonl").write_text("{}\n")
    (out / "run.json").write_text('{"budget": 60, "steps": null}')
    assert train(trained[0], out, steps=2, settings=SMALL, device="cpu").provenance["steps"] == 2


def test_a_budget_that_preparing_uses_up_is_refused(trained, tmp_path):
    with pytest.raises(ResourceError, match=r"all of the budget \(0\.001 s\); give a longer --budget"):
        train(trained[0], tmp_path / "model", budget=0.001, settings=SMALL, device="cpu")
    assert not (tmp_path / "model" / "model.json").exists()


def test_channels_are_found_by_their_names(tmp_path):
    from fewscan.learn.inputs import find_scans

    for name in ("a_t1.nii.gz", "a_flair.nii.gz", "b_t1.nii.gz", "b_flair.nii.gz"):
        (tmp_path / name).touch()
    scans = find_scans([tmp_path], channels=("t1", "flair"))
    assert [(s.id, [p.name for p in s.images]) for s in scans] == [
        ("a", ["a_t1.nii.gz", "a_flair.nii.gz"]),
        ("b", ["b_t1.nii.gz", "b_flair.nii.gz"]),
    ]
    (tmp_path / "c.nii.gz").touch()
    with pytest.raises(DataError, match="does not exist"):
        find_scans([tmp_path / "missing.nii.gz"], channels=("t1", "flair"))
