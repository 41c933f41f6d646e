"""Drafts of a data set: figures of scans left out, records, and scans that cannot be drafted."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from phantom import write_dataset
from series import NAMES

from fewscan import api, drafting
from fewscan.data import dataset as datasets
from fewscan.data.io import read_image, read_labels, write_image, write_labelmap
from fewscan.errors import ConfigError, DataError
from fewscan.exporting import export
from fewscan.methods.draft import Draft, nearest
from fewscan.methods.pairwise import RegisterConfig
from fewscan.space.deformable import DeformConfig

QUICK = RegisterConfig(deform=DeformConfig(shrink=(2, 1), steps=(15, 5)))


def test_drafts_come_with_leave_one_out_figures(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=2, unlabelled=1)
    record = api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert record["leave_one_out"]["n"] == 2
    assert 0.5 < record["leave_one_out"]["dice"] <= 1
    labels = list((tmp_path / "out" / "labels").iterdir())
    assert len(labels) == 1
    assert read_labels(labels[0]).data.any()
    assert "Leave-one-out Dice" in record["sentence"]
    again = api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert again["leave_one_out"]["dice"] == record["leave_one_out"]["dice"]


def test_one_atlas_drafts_without_a_figure_and_strangers_are_left_alone(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=1)
    record = api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert record["leave_one_out"]["dice"] is None
    assert "nothing tells how good" in record["sentence"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    with pytest.raises(ConfigError, match="not written by fewscan draft"):
        api.draft(data, tmp_path / "mine", config=QUICK, device="cpu")


def test_a_scan_that_takes_too_much_memory_does_not_cost_the_others_theirs(tmp_path, painted, monkeypatch):
    data, draft = write_dataset(tmp_path / "data", labelled=2, unlabelled=2), drafting.drafts.draft

    def large(scan, atlases, **how):
        if scan.data[0, 0, 0, 0] == 99:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draft(scan, atlases, **how)

    monkeypatch.setattr(drafting.drafts, "draft", large)
    spoil(data, "case_02")
    record = api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert "ran out of memory; deform on a coarser grid with --grid-spacing" in record["cases"]["case_02"]["failed"]
    assert "failed" not in record["cases"]["case_03"]


@pytest.fixture
def painted(monkeypatch):
    """Drafts without registration; the case whose first voxel is ``bad`` is of another body part."""

    def fake(scan, atlases, **how):
        if scan.data[0, 0, 0, 0] == 99:
            raise DataError("all 2 atlases fold on this scan; is it of the same body part as they are?")
        return Draft(atlases[0].label.data, np.ones(scan.data.shape[1:], np.float32), {})

    monkeypatch.setattr(drafting.drafts, "draft", fake)


def spoil(data, case):
    """Mark a scan as one that no atlas fits."""
    path = data / "images" / f"{case}.nii.gz"
    scan = read_image(path)
    scan.data[0, 0, 0, 0] = 99
    write_image(scan.data[0], path, native=scan.native)


def test_a_scan_that_cannot_be_drafted_does_not_cost_the_others_theirs(tmp_path, painted):
    data, lines = write_dataset(tmp_path / "data", labelled=3, unlabelled=3), []
    cases = sorted(p.name[:-7] for p in (data / "images").iterdir())
    labelled = sorted(p.name[:-7] for p in (data / "labels").iterdir())
    first, second, third = (case for case in cases if case not in labelled)
    spoil(data, second)
    spoil(data, labelled[0])
    record = api.draft(data, tmp_path / "out", config=QUICK, device="cpu", observe=lines.append)
    assert sorted(p.name[:-7] for p in (tmp_path / "out" / "labels").iterdir()) == [first, third]
    assert "atlases fold" in record["cases"][second]["failed"]
    assert list(record["leave_one_out"]["failed"]) == [labelled[0]]
    assert record["leave_one_out"]["n"] == 2
    assert f"1 could not be drafted: {second}." in record["sentence"]
    assert record["sentence"].startswith("2 scan(s) drafted")
    told = [line for line in lines if isinstance(line, str)]
    assert [line.split("; ")[0] for line in told] == [
        f"{second}: not drafted", f"leave one out: {labelled[0]}: not drafted",
    ]  # fmt: skip
    for case in (first, third):
        spoil(data, case)
    with pytest.raises(DataError, match=f"none of 3 scans could be drafted; {first}: all 2 atlases fold"):
        api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert json.loads((tmp_path / "out" / drafting.RECORD).read_text())["cases"].keys() == {first, second, third}


def test_two_scans_of_one_patient_tell_nothing_of_each_other(tmp_path, painted):
    data = write_dataset(tmp_path / "data", labelled=2)
    for path in [*(data / "images").iterdir(), *(data / "labels").iterdir()]:
        path.rename(path.with_name(path.name.replace("case_0", "case_ses-")))
    with pytest.raises(DataError, match="labelled scans of one patient and nothing else"):
        api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert not (tmp_path / "out").exists()


def test_no_more_labelled_scans_are_held_than_vote_and_they_are_the_most_alike(tmp_path, monkeypatch):
    data = datasets.find(write_dataset(tmp_path / "data", labelled=7, unlabelled=2))
    whole = {files.id: drafting.load(files, data) for files in data.cases}
    read, asked, alive, real = [], {}, [], drafting.load

    def load(files, dataset):
        case = real(files, dataset)
        read.append(weakref.ref(case))
        return case

    def fake(scan, atlases, **how):
        gc.collect()
        alive.append(sum(case() is not None for case in read))
        (own,) = [name for name, case in whole.items() if np.array_equal(case.image.data, scan.data)]
        asked[own] = [atlas.id for atlas in atlases]
        return Draft(atlases[0].label.data, np.ones(scan.data.shape[1:], np.float32), {})

    monkeypatch.setattr(drafting, "load", load)
    monkeypatch.setattr(drafting.drafts, "MOST_ATLASES", 3)
    monkeypatch.setattr(drafting.drafts, "draft", fake)
    api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert max(alive) <= 5  # those that vote, the scan, and the one before it
    for own, names in asked.items():
        pool = [whole[files.id] for files in data.labelled if files.id != own]
        assert names == [case.id for case in nearest(whole[own].image, pool, most=3)]


def test_across_modalities_the_record_says_how_votes_were_weighted(tmp_path, painted):
    data = write_dataset(tmp_path / "data", labelled=2, unlabelled=1)
    config = RegisterConfig(deform=DeformConfig(similarity="mind"))
    assert api.draft(data, tmp_path / "out", config=config, device="cpu")["fusion"] == "majority"


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_dicom_labels_lie_on_the_series_of_their_scan(case, tmp_path, kind):
    folder, file = case()
    drawn = tmp_path / "drawn.dcm"
    export(file, drawn, kind=kind, source=folder)
    still = RegisterConfig(transform="rigid")
    report = api.register(
        folder, folder, tmp_path / "out", moving_labels=drawn, fixed_labels=drawn, fixed_mask=drawn, config=still,
        device="cpu",
    )  # fmt: skip
    assert set(report["dice"]["labels"]) == set(NAMES.values())
    assert report["dice"]["mean"]["before"] == 1.0
    with pytest.raises(ConfigError, match="two of one kind"):
        api.register(
            folder, folder, tmp_path / "mixed", moving_labels=file, fixed_labels=drawn, config=still, device="cpu"
        )


def test_drafts_that_were_corrected_in_place_are_not_erased(tmp_path, painted):
    data, out = write_dataset(tmp_path / "data", labelled=1, unlabelled=2), tmp_path / "out"
    api.draft(data, out, config=QUICK, device="cpu")
    mine = sorted((out / "labels").iterdir())[1]
    label = read_labels(mine)
    label.data[0, 0, 0] = 1
    write_labelmap(label.data, mine, native=label.geometry)
    corrected = mine.read_bytes()
    with pytest.raises(ConfigError, match=rf"{mine.name}: is not as it was drafted; move your corrections"):
        api.draft(data, out, config=QUICK, device="cpu")
    assert mine.read_bytes() == corrected
    assert len(list((out / "labels").iterdir())) == 2
    (out / drafting.RECORD).write_text("{}")  # whatever became of the record
    with pytest.raises(ConfigError, match="is not as it was drafted"):
        api.draft(data, out, config=QUICK, device="cpu")
    for path in (out / "labels").iterdir():
        path.rename(tmp_path / path.name)
    api.draft(data, out, config=QUICK, device="cpu")
    assert len(list((out / "labels").iterdir())) == 2


def test_nothing_to_draft_is_refused(tmp_path):
    with pytest.raises(DataError, match="one labelled scan and nothing else"):
        api.draft(write_dataset(tmp_path / "data", labelled=1), tmp_path / "out", config=QUICK, device="cpu")
    assert drafting.RECORD == "draft.json"
