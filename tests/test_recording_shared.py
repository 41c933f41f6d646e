"""Predictions of several models, scans of one name and runs at a time in one folder: each row is of its own."""

import errno
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from series import AXIAL, anatomy, write_series
from test_recording import GRID, answered, files_in

from fewscan.data import places
from fewscan.data.contents import content_of
from fewscan.data.io import read_labels, write_image
from fewscan.data.locking import locked
from fewscan.errors import ConfigError, DataError
from fewscan.learn.inputs import Scan
from fewscan.naming import label_names, record_of, recorded_names
from fewscan.recording import Record

KIDNEY, HEART = {1: "kidney", 2: "cyst"}, {1: "left ventricle", 2: "cyst"}


def put(path, value=0):
    """A scan of one value everywhere."""
    write_image(np.full((1, *GRID.shape), value, np.float32), path, native=GRID)
    return path


def rows(out):
    return json.loads((out / "predictions.json").read_text())["predictions"]


def model_of(names, weights):
    plan = SimpleNamespace(overlapping=False, channels=("image",), kind="scalar", names=names)
    return SimpleNamespace(plan=plan, names=names, provenance={"sha256": {"weights.safetensors": weights}})


def test_each_prediction_is_called_as_its_own_model_calls_it(tmp_path):
    out = tmp_path / "out"
    answered(put(tmp_path / "p1.nii.gz", 1), out, names=KIDNEY)
    answered(put(tmp_path / "p2.nii.gz", 2), out, names=HEART)
    assert label_names(out / "p1.nii.gz")[0] == KIDNEY
    assert label_names(out / "p2.nii.gz")[0] == HEART
    assert recorded_names(out) == {2: "cyst"}, "only that in which all agree"
    with pytest.raises(DataError, match="label 1 is kidney in one label map and left ventricle in another"):
        label_names(out)
    answered(tmp_path / "p2.nii.gz", out, names=KIDNEY)
    assert label_names(out)[0] == KIDNEY


def test_a_row_holds_the_hash_of_its_own_model(tmp_path):
    for name, weights in (("p1", "aaa"), ("p2", "bbb")):
        scan = put(tmp_path / f"{name}.nii.gz")
        record = Record(tmp_path / "out", model=model_of(KIDNEY, weights))
        record.finish(Scan(name, (scan,)), {"id": name})
    assert [record_of(tmp_path / "out" / f"{name}.nii.gz")["model"] for name in ("p1", "p2")] == [
        {"weights.safetensors": "aaa"},
        {"weights.safetensors": "bbb"},
    ]


def test_records_that_tell_of_one_model_for_all_rows_are_still_read(tmp_path):
    out = tmp_path / "out"
    scan = put(tmp_path / "p1.nii.gz")
    answered(scan, out, names=KIDNEY)
    [row] = rows(out)
    old = {key: value for key, value in row.items() if key not in ("model", "labels", "content")}
    told = {"model": {"weights.safetensors": "aaa"}, "labels": {"1": "kidney", "2": "cyst"}, "predictions": [old]}
    (out / "predictions.json").write_text(json.dumps(told))
    assert label_names(out / "p1.nii.gz")[0] == KIDNEY
    assert record_of(out / "p1.nii.gz")["model"] == {"weights.safetensors": "aaa"}
    answered(put(tmp_path / "p2.nii.gz"), out, names=HEART)
    assert label_names(out / "p1.nii.gz")[0] == KIDNEY, "also after another model has written beside it"


@pytest.mark.parametrize("names", [HEART, {1: "kidney", 3: "cyst"}])
def test_a_prediction_of_another_model_is_not_kept_as_that_of_this_one(tmp_path, names):
    scan, out = put(tmp_path / "p1.nii.gz"), tmp_path / "out"
    answered(scan, out, names=KIDNEY)
    with pytest.raises(ConfigError, match=r"p1\.nii\.gz is of another model, with the labels kidney, cyst; leave out"):
        answered(scan, out, names=names, skip_existing=True)
    answered(scan, out, names=names)
    assert label_names(out / "p1.nii.gz")[0] == names, "it is replaced"
    [done] = answered(scan, out, names=names, skip_existing=True)
    assert done.skipped


def test_other_weights_under_the_same_labels_are_another_model(tmp_path):
    scan = Scan("p1", (put(tmp_path / "p1.nii.gz"),))
    first = Record(tmp_path / "out", model=model_of(KIDNEY, "aaa"))
    first.finish(scan, {"id": "p1"})
    first.target(scan).write_bytes(b"mask")
    how = {"keep": True, "before": False, "probabilities": False}
    Record(tmp_path / "out", model=model_of(KIDNEY, "aaa")).check(scan, **how)
    with pytest.raises(ConfigError, match="is of another model"):
        Record(tmp_path / "out", model=model_of(KIDNEY, "bbb")).check(scan, **how)


def test_what_somebody_saves_under_the_name_while_a_scan_is_predicted_is_not_replaced(tmp_path):
    how, scan = {"before": False, "probabilities": False}, Scan("p1", (put(tmp_path / "p1.nii.gz"),))
    record = Record(tmp_path / "out", model=model_of(KIDNEY, "aaa"))
    record.check(scan, keep=False, **how)
    put(record.target(scan))
    with pytest.raises(ConfigError, match="exists and is not a prediction of fewscan"):
        record.begin(scan, **how)


def test_every_channel_of_a_scan_has_a_say_in_which_scan_it_is(tmp_path):
    scan = Scan("p1", (put(tmp_path / "p1_t1.nii.gz", 1), put(tmp_path / "p1_flair.nii.gz", 1)))
    record = Record(tmp_path / "out", model=model_of(KIDNEY, "aaa"))
    put(record.target(scan))
    record.finish(scan, {"id": "p1"})
    put(scan.images[1], 2)
    again = Record(tmp_path / "out", model=model_of(KIDNEY, "aaa"))
    with pytest.raises(ConfigError, match="has changed since"):
        again.check(scan, keep=True, before=False, probabilities=False)


@pytest.mark.parametrize("skipped", [False, True])
def test_the_prediction_of_another_scan_of_the_same_name_is_neither_replaced_nor_passed_off(tmp_path, skipped):
    one, other, out = put(tmp_path / "p7/CT.nii.gz", 7), put(tmp_path / "p8/CT.nii.gz", 8), tmp_path / "out"
    answered(one, out)
    before = (out / "CT.nii.gz").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"is the prediction of .*p7.CT\.nii\.gz, and .*p8.CT\.nii\.gz is not the sa"):
        answered(other, out, skip_existing=skipped)
    assert (out / "CT.nii.gz").stat().st_mtime_ns == before
    assert places.recall(out / "predictions.json")["CT"]["image"] == one


def test_a_scan_that_was_moved_is_still_itself(tmp_path):
    one, out = put(tmp_path / "p7/CT.nii.gz", 7), tmp_path / "out"
    answered(one, out)
    one.parent.rename(tmp_path / "moved")
    assert answered(tmp_path / "moved/CT.nii.gz", out, skip_existing=True)[0].skipped
    answered(tmp_path / "moved/CT.nii.gz", out)
    put(tmp_path / "p8/CT.nii.gz", 8)
    with pytest.raises(ConfigError, match=r"prediction of .*moved.CT\.nii\.gz"):
        answered(tmp_path / "p8/CT.nii.gz", out)
    (out / "files.local.json").unlink()  # as where the folder was handed on
    with pytest.raises(ConfigError, match="prediction of another scan"):
        answered(tmp_path / "p8/CT.nii.gz", out)


def test_a_file_that_changed_where_it_lies_is_predicted_anew_but_not_left_alone(tmp_path):
    scan, out = put(tmp_path / "x.nii.gz", 1), tmp_path / "out"
    answered(scan, out)
    put(scan, 2)
    with pytest.raises(ConfigError, match=r"x\.nii\.gz has changed since .* was predicted; predict it without --skip"):
        answered(scan, out, skip_existing=True)
    answered(scan, out)
    assert answered(scan, out, skip_existing=True)[0].skipped


def test_of_a_record_that_does_not_say_which_scan_it_is_of_a_warning_tells(tmp_path):
    scan, out, told = put(tmp_path / "x.nii.gz"), tmp_path / "out", []
    answered(scan, out)
    answered(scan, out, skip_existing=True, observe=told.append)
    assert told == []
    [row] = rows(out)
    del row["content"]
    (out / "predictions.json").write_text(json.dumps({"predictions": [row]}))
    answered(scan, out, skip_existing=True, observe=told.append)
    assert told == [], "the place is remembered"
    (out / "files.local.json").unlink()
    answered(scan, out, skip_existing=True, observe=told.append)
    assert told == ["warning: x: left alone, though nothing tells whether it is of this very scan"]


def test_two_runs_into_one_folder_keep_each_others_rows(tmp_path):
    out = tmp_path / "out"
    scans = {name: Scan(name, (put(tmp_path / f"{name}.nii.gz", i),)) for i, name in enumerate(("a", "b"))}
    runs = {name: Record(out, model=model_of(KIDNEY, "aaa")) for name in scans}  # both have read the empty folder
    for name in scans:
        runs[name].begin(scans[name], before=False, probabilities=False)
    told = json.loads((out / "predictions.json").read_text())
    assert sorted(told["unfinished"]) == ["a.nii.gz", "b.nii.gz"]
    for name in scans:
        runs[name].finish(scans[name], {"id": name})
    assert [row["id"] for row in rows(out)] == ["a", "b"]
    assert sorted(places.recall(out / "predictions.json")) == ["a", "b"]


def test_many_runs_at_a_time_lose_nothing(tmp_path):
    out = tmp_path / "out"
    scans = [put(tmp_path / f"{i}.nii.gz", i) for i in range(8)]
    runs = [threading.Thread(target=answered, args=(scan, out)) for scan in scans]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(row["id"] for row in rows(out)) == [str(i) for i in range(8)]
    assert sorted(places.recall(out / "predictions.json")) == [str(i) for i in range(8)]
    assert len(files_in(out)) == 8
    assert not list(out.glob(".*lock"))
    assert {tuple(read_labels(out / f"{i}.nii.gz").data.shape) for i in range(8)} == {GRID.shape}


@pytest.mark.parametrize(
    "step",
    [
        lambda record, scan: record.begin(scan, before=False, probabilities=False),
        lambda record, scan: record.finish(scan, {"id": scan.id}),
    ],
    ids=["begin", "finish"],
)
def test_a_record_that_cannot_be_read_for_a_moment_loses_no_row(tmp_path, monkeypatch, step):
    out, read = tmp_path / "out", Path.read_text
    scans = {name: Scan(name, (put(tmp_path / f"{name}.nii.gz"),)) for name in ("a", "b")}
    record = Record(out, model=model_of(KIDNEY, "aaa"))
    record.finish(scans["a"], {"id": "a"})
    record.target(scans["a"]).write_bytes(b"mask")
    before = (out / "predictions.json").read_bytes()

    def paused(path, *args, **how):
        if path.name == "predictions.json":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", paused)
        assert record.finished(scans["a"])
        with pytest.raises(OSError, match="Input/output error"):
            step(record, scans["b"])
    assert (out / "predictions.json").read_bytes() == before
    record.finish(scans["b"], {"id": "b"})
    assert [row["id"] for row in rows(out)] == ["a", "b"]


def test_of_a_record_that_was_damaged_meanwhile_what_the_run_knows_is_kept(tmp_path):
    out = tmp_path / "out"
    scans = {name: Scan(name, (put(tmp_path / f"{name}.nii.gz"),)) for name in ("a", "b")}
    record = Record(out, model=model_of(KIDNEY, "aaa"))
    record.finish(scans["a"], {"id": "a"})
    (out / "predictions.json").write_text('{"predictions": [')
    record.finish(scans["b"], {"id": "b"})
    assert [row["id"] for row in rows(out)] == ["a", "b"]


def test_the_lock_of_a_program_that_was_killed_is_broken(tmp_path):
    file, held = tmp_path / "record.json", tmp_path / ".record.json.lock"
    held.touch()
    with locked(file, abandoned=0.1):
        assert held.exists()
    assert not held.exists()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"), locked(tmp_path / "file" / "x" / "record.json"):
        pytest.fail("nothing can be locked there")


def test_where_nothing_may_be_written_no_lock_is_waited_for(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    begin = time.monotonic()
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(DataError, match=r"record\.json: cannot be written"), locked(tmp_path / "record.json"):
        pytest.fail("nothing can be locked there")
    assert time.monotonic() - begin < 10


def test_a_series_is_known_again_under_other_names_and_a_detached_header_by_its_voxels(tmp_path):
    first = write_series(tmp_path / "a", anatomy(), AXIAL)
    second = write_series(tmp_path / "b", anatomy() + 1, AXIAL)
    assert content_of(first) != content_of(second)
    known = content_of(first)
    for i, file in enumerate(sorted(first.iterdir())):
        file.rename(first / f"slice_{i}.dcm")
    assert content_of(first.rename(tmp_path / "c")) == known != ""
    assert content_of(tmp_path / "missing.nii.gz") == ""
    for name in ("p1", "p2"):
        (tmp_path / name).mkdir()
        size = "NDims = 3\nDimSize = 4 4 4\nElementSpacing = 1 1 1\n"
        head = f"ObjectType = Image\n{size}ElementType = MET_UCHAR\nElementDataFile = x.raw\n"
        (tmp_path / name / "x.mhd").write_text(head)
        (tmp_path / name / "x.raw").write_bytes(name.encode() * 32)
    assert content_of(tmp_path / "p1/x.mhd") != content_of(tmp_path / "p2/x.mhd") != ""
