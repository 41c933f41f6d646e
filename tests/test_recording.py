"""What may be replaced in a folder of predictions, what may not, and what a run that was killed leaves behind."""

import errno
import json
from types import SimpleNamespace

import numpy as np
import pytest

from fewscan import prediction
from fewscan.data.bundles import SEGMENTATIONS
from fewscan.data.io import read_labels, write_image, write_labelmap
from fewscan.deliver.predicted import predictions
from fewscan.deliver.report import read_run
from fewscan.errors import ConfigError, DataError, ModelError, ScansError
from fewscan.learn.answers import Segmented
from fewscan.prediction import Answer, predict_by
from fewscan.space.geometry import Geometry

GRID = Geometry((6, 5, 4), np.eye(4))
NAMES = {1: "a", 2: "b"}
LAYOUTS = pytest.mark.parametrize("overlapping", [False, True], ids=["labels", "bundles"])


@pytest.fixture
def scan(tmp_path):
    return new_scan(tmp_path, "x")


def new_scan(folder, name):
    path = folder / "in" / f"{name}.nii.gz"
    write_image(np.zeros((1, *GRID.shape), np.float32), path, native=GRID)
    return path


def answered(scan, out, *, overlapping=False, personal=False, names=NAMES, probs=False, fails=None, **how):
    """Both labels of a scan in its lowest voxels; where it is personalised, the model's own lie one higher."""
    plan = SimpleNamespace(overlapping=overlapping, channels=("image",), kind="scalar", names=names)
    model = SimpleNamespace(plan=plan, names=names, provenance={})

    def found(height):
        labels = np.zeros(GRID.shape, np.uint8)
        labels[0, 0, height], labels[1, 0, height] = 1, 2
        share = np.full((3, *GRID.shape), 85, np.uint8) if probs else None
        return Segmented(np.stack([labels == value for value in names]) if overlapping else labels, share)

    def work(volume, tick, *, name):
        tick(0.5)
        if fails is not None and name == "x":
            raise fails
        return Answer(found(0), {}, found(1) if personal else None)

    return predict_by(work, model, scans=scan, folder=out, before=personal, **how)


def killed(scan, out, monkeypatch, **how):
    """A run that ends between the last of its files and the record of them."""

    def ended(**fields):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prediction, "Before", ended)
        with pytest.raises(KeyboardInterrupt):
            answered(scan, out, personal=True, **how)


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.nii.gz"))


def listed(overlapping):
    return [f"x/{SEGMENTATIONS}/{name}.nii.gz" for name in "ab"] if overlapping else ["x.nii.gz"]


@LAYOUTS
@pytest.mark.parametrize("personal", [False, True])
def test_a_run_that_was_killed_can_be_repeated(scan, tmp_path, monkeypatch, overlapping, personal):
    out = tmp_path / "out"
    killed(scan, out, monkeypatch, overlapping=overlapping)
    assert files_in(out / "before") == listed(overlapping)
    assert json.loads((out / "predictions.json").read_text())["predictions"] == []
    answered(new_scan(tmp_path, "y"), out, overlapping=overlapping)  # another one does not make it forgotten
    answered(scan, out, overlapping=overlapping, personal=personal)
    assert (out / "before").exists() == personal
    record = json.loads((out / "predictions.json").read_text())
    assert [row["id"] for row in record["predictions"]] == ["y", "x"]
    assert "unfinished" not in record


@LAYOUTS
def test_an_answer_of_before_goes_with_its_folders_but_not_with_what_others_put_there(scan, tmp_path, overlapping):
    out = tmp_path / "out"
    answered(scan, out, overlapping=overlapping, personal=True)
    answered(scan, out, overlapping=overlapping)
    assert not (out / "before").exists()
    [done] = answered(scan, out, overlapping=overlapping, personal=True)
    mine = done.before.path.parent / "mine.nii.gz"
    if overlapping:
        mine = done.before.path / "mine.nii.gz"
    mine.write_bytes(b"drawn by hand")
    answered(scan, out, overlapping=overlapping)
    assert [path for path in (out / "before").rglob("*") if path.is_file()] == [mine]
    assert files_in(out)[-len(listed(overlapping)) :] == listed(overlapping)


def test_no_record_leads_to_a_file_outside_of_its_folder(scan, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.nii.gz"
    answered(scan, out, overlapping=True, personal=True)
    other.write_bytes(b"mine")
    record = json.loads((out / "predictions.json").read_text())
    record["predictions"][0]["before"]["volumes_ml"] = {"../../../../other": 1.0, str(tmp_path / "other"): 1.0}
    (out / "predictions.json").write_text(json.dumps(record))
    answered(scan, out, overlapping=True)
    assert other.read_bytes() == b"mine"


def test_a_file_of_somebody_else_hinders_only_who_would_write_over_it(scan, tmp_path):
    other = tmp_path / "out" / "before" / "x.nii.gz"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"mine")
    answered(scan, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"x\.nii\.gz exists, and predictions\.json does not say that fewscan wrote"):
        answered(scan, tmp_path / "out", personal=True)
    assert other.read_bytes() == b"mine"


@pytest.mark.parametrize("text", ["[]", "{", '{"images": []}', '{"predictions": [3]}'])
def test_a_record_that_is_damaged_or_of_another_program_is_not_replaced(scan, tmp_path, text):
    out = tmp_path / "out"
    answered(scan, out)
    (out / "predictions.json").write_text(text)
    with pytest.raises(ConfigError, match=r"predictions\.json is damaged, or of another program.*give another -o"):
        answered(new_scan(tmp_path, "y"), out)
    assert (out / "predictions.json").read_text() == text


@LAYOUTS
def test_a_prediction_that_was_corrected_by_hand_is_not_replaced(scan, tmp_path, overlapping):
    out = tmp_path / "out"
    answered(scan, out, overlapping=overlapping)
    answered(scan, out, overlapping=overlapping)
    corrected = out / listed(overlapping)[0]
    drawn = read_labels(corrected).data.copy()
    drawn[0, 0, 0] = 1 - drawn[0, 0, 0]
    write_labelmap(drawn, corrected, native=GRID)
    before = corrected.read_bytes()
    with pytest.raises(ConfigError, match=r"was changed by hand since it was predicted.*--skip-existing"):
        answered(scan, out, overlapping=overlapping)
    assert answered(scan, out, overlapping=overlapping, skip_existing=True)[0].skipped
    assert corrected.read_bytes() == before


@LAYOUTS
def test_a_scan_at_whose_writing_a_run_was_killed_is_not_taken_for_finished(scan, tmp_path, monkeypatch, overlapping):
    out = tmp_path / "out"
    killed(scan, out, monkeypatch, overlapping=overlapping)
    for skipped in (False, True):
        [done] = answered(scan, out, overlapping=overlapping, skip_existing=True)
        assert done.skipped == skipped
        assert [row["id"] for row in json.loads((out / "predictions.json").read_text())["predictions"]] == ["x"]
    assert files_in(out) == listed(overlapping)


def test_where_a_run_was_killed_files_of_others_are_looked_for_also_if_finished_scans_are_left_alone(
    scan, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    killed(scan, out, monkeypatch)
    (out / "x_probabilities.nii.gz").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"x_probabilities\.nii\.gz exists"):
        answered(scan, out, probs=True, probabilities=True, skip_existing=True)


def test_masks_that_others_put_among_those_of_a_model_stay(scan, tmp_path, monkeypatch):
    out = tmp_path / "out"
    [done] = answered(scan, out, overlapping=True, personal=True)
    folders = (done.path, done.before.path)
    for folder in folders:
        (folder / "mine.nii.gz").write_bytes(b"drawn by hand")
        (folder / "notes").mkdir()
        (folder / "notes" / "mine.txt").write_text("read me")
    answered(scan, out, overlapping=True, personal=True, names={1: "a", 2: "c"})  # which knows no b
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == ["a.nii.gz", "c.nii.gz", "mine.nii.gz", "notes"]
        assert (folder / "mine.nii.gz").read_bytes() == b"drawn by hand"
        assert (folder / "notes" / "mine.txt").read_text() == "read me"
    killed(scan, out, monkeypatch, overlapping=True, names={1: "a", 2: "d"})
    answered(scan, out, overlapping=True, personal=True)
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == ["a.nii.gz", "b.nii.gz", "mine.nii.gz", "notes"]


@LAYOUTS
def test_probabilities_go_with_the_answer_that_they_are_of(scan, tmp_path, overlapping):
    out = tmp_path / "out"
    file = out / ("x/x_probabilities.nii.gz" if overlapping else "x_probabilities.nii.gz")
    for _ in range(2):  # the second time over the first
        [done] = answered(scan, out, overlapping=overlapping, probs=True, probabilities=True)
        assert done.probabilities == file
        [row] = json.loads((out / "predictions.json").read_text())["predictions"]
        assert row["probabilities"] == file.relative_to(out).as_posix()
        assert file.is_file()
    answered(scan, out, overlapping=overlapping)
    assert not file.exists()
    [row] = json.loads((out / "predictions.json").read_text())["predictions"]
    assert "probabilities" not in row


@pytest.mark.parametrize("told", [True, False])
def test_probabilities_of_somebody_else_are_neither_replaced_nor_removed(scan, tmp_path, told):
    other = tmp_path / "out" / "x_probabilities.nii.gz"
    other.parent.mkdir()
    other.write_bytes(b"mine")
    answered(scan, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"x_probabilities\.nii\.gz exists, and predictions\.json does not say"):
        answered(scan, tmp_path / "out", probs=True, probabilities=told)
    assert other.read_bytes() == b"mine"


def test_the_labels_of_a_scan_that_is_called_like_probabilities_are_not_removed(scan, tmp_path):
    out = tmp_path / "out"
    answered(scan, out, probs=True)
    (out / "x_probabilities.nii.gz").unlink()
    answered(new_scan(tmp_path, "x_probabilities"), out)
    answered(scan, out)
    assert files_in(out) == ["x.nii.gz", "x_probabilities.nii.gz"]


# -------------------------------------------------------------------------------------------------- scans that fail


def record_in(out):
    return json.loads((out / "predictions.json").read_text())


def test_a_damaged_scan_does_not_cost_the_others_theirs(scan, tmp_path):
    out, seen = tmp_path / "out", []
    for name in ("w", "y"):
        new_scan(tmp_path, name)
    sound = scan.read_bytes()
    scan.write_bytes(sound[:60])
    with pytest.raises(ScansError, match=r"^1 of 3 scans could not be predicted: x \(.*x\.nii\.gz") as told:
        answered(tmp_path / "in", out, observe=seen.append)
    assert [p.id for p in told.value.done] == ["w", "y"]
    assert files_in(out) == ["w.nii.gz", "y.nii.gz"]
    why = record_in(out)["failed"]
    assert list(why) == list(told.value.failed) == ["x"]
    assert str(tmp_path) not in json.dumps(record_in(out))
    lines = [line for line in seen if isinstance(line, str)]
    assert [line.split(",")[0].split(" could")[0] for line in lines] == ["1 of 3: w", "2 of 3: x", "3 of 3: y"]
    shares = [s.fraction for s in seen if not isinstance(s, str)]
    assert shares == sorted(shares)
    run = read_run(out)
    assert run.failed == why
    assert "<b>x</b> could not be predicted" in predictions(run)
    with pytest.raises(ScansError, match=r"^1 of 3"):  # what is finished is no reason to be silent about the rest
        answered(tmp_path / "in", out, skip_existing=True)
    scan.write_bytes(sound)
    assert [p.skipped for p in answered(tmp_path / "in", out, skip_existing=True)] == [True, False, True]
    assert "failed" not in record_in(out)


def test_a_folder_of_which_no_scan_could_be_predicted_is_reported(tmp_path):
    for name in ("x", "y"):
        new_scan(tmp_path, name).write_bytes(b"no scan")
    with pytest.raises(ScansError, match=r"^2 of 2 scans could not be predicted"):
        answered(tmp_path / "in", tmp_path / "out")
    assert predictions(read_run(tmp_path / "out")).count("could not be predicted") == 2


@pytest.mark.parametrize("fails", [DataError("x: 3 slices"), OSError(errno.EIO, "Input/output error")])
def test_a_single_scan_that_fails_says_so_itself(scan, tmp_path, fails):
    with pytest.raises(type(fails)) as told:
        answered(scan, tmp_path / "out", fails=fails)
    assert told.value is fails
    assert not (tmp_path / "out" / "predictions.json").exists()


@pytest.mark.parametrize(
    "fails",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ModelError("model: its weights are damaged"),
        ConfigError("--device: no such GPU"),
        KeyboardInterrupt(),
    ],
)
def test_what_the_next_scan_would_meet_too_ends_the_run(scan, tmp_path, fails):
    new_scan(tmp_path, "y")
    with pytest.raises(type(fails)) as told:
        answered(tmp_path / "in", tmp_path / "out", fails=fails)
    assert told.value is fails
    assert files_in(tmp_path / "out") == []


def test_what_cannot_be_written_ends_the_run(scan, tmp_path, monkeypatch):
    new_scan(tmp_path, "y")

    def full(*args, **how):
        raise DataError("out: cannot be written (Permission denied); choose another place")

    monkeypatch.setattr(prediction, "write_labelmap", full)
    with pytest.raises(DataError, match=r"^out: cannot be written"):
        answered(tmp_path / "in", tmp_path / "out")
