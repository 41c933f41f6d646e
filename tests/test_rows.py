"""Rows of a record against the files they tell of: corrections, rows of older versions, scans that have failed."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_recording import GRID, NAMES, answered, listed, new_scan

from fewscan.data.contents import same
from fewscan.data.io import read_labels, write_labelmap
from fewscan.errors import ConfigError, ScansError
from fewscan.learn.inputs import Scan
from fewscan.recording import Record
from fewscan.rows import plain_reason


def record_in(out):
    return json.loads((out / "predictions.json").read_text())


def corrected(file):
    """Somebody draws one more voxel."""
    drawn = read_labels(file).data.copy()
    drawn[0, 0, 0] = 1 - drawn[0, 0, 0]
    write_labelmap(drawn, file, native=GRID)
    return file.read_bytes()


@pytest.fixture
def scan(tmp_path):
    return new_scan(tmp_path, "x")


def test_one_corrected_mask_is_kept_though_another_was_taken_away(scan, tmp_path):
    out = tmp_path / "out"
    answered(scan, out, overlapping=True)
    first, second = (out / name for name in listed(True))
    drawn = corrected(first)
    second.unlink()
    with pytest.raises(ConfigError, match="was changed by hand"):
        answered(scan, out, overlapping=True)
    assert first.read_bytes() == drawn


def test_a_label_map_that_no_longer_is_an_image_is_kept_too(scan, tmp_path):
    out = tmp_path / "out"
    answered(scan, out)
    (out / "x.nii.gz").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="was changed by hand"):
        answered(scan, out)


def test_a_corrected_label_map_can_be_kept_beside_another_model(scan, tmp_path):
    out, names = tmp_path / "out", {1: "a", 2: "c"}
    answered(scan, out)
    with pytest.raises(ConfigError, match="is of another model"):
        answered(scan, out, names=names, skip_existing=True)
    drawn = corrected(out / "x.nii.gz")
    assert answered(scan, out, names=names, skip_existing=True)[0].skipped
    assert (out / "x.nii.gz").read_bytes() == drawn


def test_what_is_corrected_while_others_are_predicted_costs_only_its_own_scan(scan, tmp_path):
    out, other = tmp_path / "out", new_scan(tmp_path, "y")
    answered([scan, other], out)

    def observe(event):
        if isinstance(event, str) and event.startswith("1 of 2: x"):
            corrected(out / "y.nii.gz")

    with pytest.raises(ScansError) as told:
        answered([scan, other], out, observe=observe)
    assert [p.id for p in told.value.done] == ["x"]
    assert "y.nii.gz was changed by hand" in told.value.failed["y"]


def test_rows_of_older_versions_say_less_and_refuse_nothing_for_it(scan, tmp_path):
    out = tmp_path / "out"
    answered(scan, out)
    record = record_in(out)
    for key in ("written", "content"):
        del record["predictions"][0][key]
    (out / "predictions.json").write_text(json.dumps(record))
    corrected(out / "x.nii.gz")
    assert not answered(scan, out)[0].skipped, "nobody knows that it was corrected"
    assert same("a", "a b c")
    assert same("a b", "a b")
    assert not same("b", "a b")
    assert not same("", "a")


def test_of_several_channels_an_older_row_knows_the_first(tmp_path):
    images = tuple(new_scan(tmp_path, name) for name in ("p_t1", "p_t2"))
    plan = SimpleNamespace(overlapping=False, channels=("t1", "t2"), kind="scalar", names=NAMES)
    model, scan = SimpleNamespace(plan=plan, names=NAMES, provenance={}), Scan("p", images)
    record = Record(tmp_path / "out", model=model)
    write_labelmap(np.zeros(GRID.shape, np.uint8), record.target(scan), native=GRID)
    record.finish(scan, {"id": "p"})
    told = record_in(tmp_path / "out")
    told["predictions"][0]["content"] = told["predictions"][0]["content"].split()[0]
    (tmp_path / "out" / "predictions.json").write_text(json.dumps(told))
    Record(tmp_path / "out", model=model).check(scan, keep=True, before=False, probabilities=False)


@pytest.mark.parametrize("mended", ["taken away", "left alone"])
def test_a_scan_that_is_no_fault_any_more_is_not_told_of(scan, tmp_path, mended):
    out, bad = tmp_path / "out", new_scan(tmp_path, "bad")
    if mended == "left alone":
        answered(bad, out)
    content = bad.read_bytes()
    bad.write_bytes(b"broken")
    with pytest.raises(ScansError):
        answered([bad, scan], out)
    assert list(record_in(out)["failed"]) == ["bad"]
    if mended == "taken away":
        bad.unlink()
        answered(scan, out)
    else:
        bad.write_bytes(content)
        assert answered([bad, scan], out, skip_existing=True)[0].skipped
    assert "failed" not in record_in(out)


def test_a_reason_names_no_folder():
    image = os.path.join("scans", "Mary Smith", "ct.nii.gz")
    reason = f"{image}: damaged; see {os.path.join('scans', 'Mary Smith', 'notes.txt')}"
    assert plain_reason(reason, [Path(image)]) == "ct.nii.gz: damaged; see notes.txt"
