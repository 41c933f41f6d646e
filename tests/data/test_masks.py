"""Folders of masks that overlap as a data set, and what may be wrong with them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from crossing import GRID, SHAPE, crossing, write_case, write_crossings

from fewscan.data import bundles, dataset, doctor
from fewscan.data.bundles import SEGMENTATIONS, bundle_files, replace_bundles, write_bundles
from fewscan.data.io import write_labelmap
from fewscan.data.listing import RECORD
from fewscan.errors import DataError, GeometryError
from fewscan.space.geometry import Geometry


def test_the_masks_of_a_case_come_back(tmp_path: Path) -> None:
    found = dataset.find(write_crossings(tmp_path, labelled=2, unlabelled=1))
    assert (found.overlapping, found.kind, len(found.labelled), len(found.unlabelled)) == (True, "scalar", 2, 1)
    assert found.names == {1: "CC", 2: "CST"}
    loaded = dataset.load(found.cases[0], found)
    assert loaded.label is not None
    for value, name in found.names.items():
        np.testing.assert_array_equal(loaded.label.mask(value), crossing(0)[1][name])
    assert all(case.drawn is None for case in found.labelled)


def test_cases_called_as_in_bids_with_masks_of_bundles_are_no_bids(tmp_path: Path) -> None:
    for i in range(2):
        image, masks = crossing(i)
        write_case(tmp_path / f"sub-0{i}", image, {f"{name}_left": mask for name, mask in masks.items()})
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_kind": "scalar"}))
    found = dataset.find(tmp_path)
    assert (found.overlapping, found.layout) == (True, "folders with bundle_segmentations/")
    assert [(case.id, case.images[0].name) for case in found.labelled] == [
        (f"sub-0{i}", "scalars.nii.gz") for i in range(2)
    ]
    assert list(found.names.values()) == ["CC_left", "CST_left"]


def test_single_labels_do_not_overlap(tmp_path: Path) -> None:
    image, _ = crossing(0)
    folder = write_case(tmp_path / "case", image, None)
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_kind": "scalar"}))
    write_labelmap(np.ones(SHAPE, np.uint8), folder / "labels.nii.gz", native=GRID)
    found = dataset.find(tmp_path)
    assert not found.overlapping
    write_bundles(crossing(0)[1], folder, native=GRID)
    with pytest.raises(DataError, match="a label map where others have bundle_segmentations/"):
        dataset.find(tmp_path)


def test_listed_bundles_alone_are_taken_with_their_numbers(tmp_path: Path) -> None:
    data = write_crossings(tmp_path)
    said = {"channel_kind": "scalar", "labels": {"CST": 7, "AF_left": 8}}
    (data / "dataset.json").write_text(json.dumps(said))
    found = dataset.find(data)
    assert found.names == {7: "CST"}
    (data / "dataset.json").write_text(json.dumps(said | {"labels": {"UF_left": 1}}))
    with pytest.raises(DataError, match=r"no bundle among \['CC', 'CST'\] is called like one of the labels listed"):
        dataset.find(data)


def test_listed_bundles_that_no_case_has_a_file_of_are_named(tmp_path: Path) -> None:
    data = write_crossings(tmp_path)
    labels = {"CC": 1, "CST": 7, "AF_left": 8, "UF_left": 9}
    for listed, lost in ((labels, ["AF_left, UF_left"]), ({"CC": 1, "CST": 7}, [])):
        (data / "dataset.json").write_text(json.dumps({"channel_kind": "scalar", "labels": listed}))
        told = [f for f in doctor.examine(dataset.find(data)).findings if f.code == "bundle-without-file"]
        assert [f.message.partition(":")[0] for f in told] == lost
        assert all(f.severity == "warning" for f in told)


def test_a_bundle_without_a_file_was_not_looked_for_and_an_empty_one_is_absent(tmp_path: Path) -> None:
    data = write_crossings(tmp_path, labelled=3)
    (data / "case_0" / SEGMENTATIONS / "CST.nii.gz").unlink()
    write_bundles({"CC": np.zeros(SHAPE, bool)}, data / "case_1", native=GRID)
    found = dataset.find(data)
    assert [case.drawn for case in found.cases] == [frozenset({1}), None, None]
    checkup = doctor.examine(found)
    assert checkup.usable
    told = {(f.code, f.case) for f in checkup.findings}
    assert {("not-drawn", "case_0"), ("label-empty", "case_1")} <= told
    assert checkup.rows[0].labels_ml == {"CC": pytest.approx(crossing(0)[1]["CC"].sum() / 1000)}


def test_a_case_without_any_bundle_is_unlabelled(tmp_path: Path) -> None:
    data = write_crossings(tmp_path, labelled=2)
    shutil.rmtree(data / "case_1" / SEGMENTATIONS)
    (data / "case_1" / SEGMENTATIONS).mkdir()
    found = dataset.find(data)
    assert [case.id for case in found.unlabelled] == ["case_1"]


def test_a_case_without_any_bundle_that_is_listed_is_unlabelled_and_named(tmp_path: Path) -> None:
    data = write_crossings(tmp_path, labelled=2)
    (data / "case_1" / SEGMENTATIONS / "CST.nii.gz").unlink()
    (data / "dataset.json").write_text(json.dumps({"channel_kind": "scalar", "labels": {"CST": 1}}))
    found = doctor.examine(dataset.find(data))
    assert [(case.id, case.label is None) for case in found.dataset.cases] == [("case_0", False), ("case_1", True)]
    assert [f.case for f in found.findings if f.code == "label-unmatched"] == ["case_1"]


def test_masks_on_another_grid_are_refused(tmp_path: Path) -> None:
    data = write_crossings(tmp_path, labelled=2)
    write_bundles({"CC": crossing(0)[1]["CC"][1:]}, data / "case_0", native=Geometry((19, 18, 22), np.eye(4)))
    found = dataset.find(data)
    with pytest.raises(GeometryError, match=r"the image and .*CC\.nii\.gz"):
        dataset.load(found.cases[0], found)
    checkup = doctor.examine(found)
    assert [(f.code, Path(f.path).name) for f in checkup.findings if f.severity == "error"] == [
        ("grid-differs", "CC.nii.gz")
    ]


def test_masks_of_other_values_are_refused(tmp_path: Path) -> None:
    data = write_crossings(tmp_path, labelled=2)
    write_labelmap(np.full(SHAPE, 3, np.uint8), data / "case_1" / SEGMENTATIONS / "CC.nii.gz", native=GRID)
    found = dataset.find(data)
    with pytest.raises(DataError, match=r"CC\.nii\.gz: a bundle is 0 or 1, it holds \[3\]"):
        dataset.load(found.cases[1], found)
    assert [f.code for f in doctor.examine(found).findings if f.severity == "error"] == ["label-unreadable"]


def test_names_that_differ_in_capitals_only_are_refused(tmp_path: Path) -> None:
    data = write_crossings(tmp_path, labelled=2)
    folder = data / "case_1" / SEGMENTATIONS
    (folder / "CC.nii.gz").rename(folder / "cc.nii.gz")
    with pytest.raises(DataError, match=r"cc\.nii\.gz: differs from .*CC\.nii\.gz in small and capital letters only"):
        dataset.find(data)


def test_bundles_without_inputs_are_refused(tmp_path: Path) -> None:
    data = write_crossings(tmp_path, labelled=2)
    (data / "case_1" / RECORD).unlink()
    with pytest.raises(
        DataError, match=r"case_1: has bundle_segmentations/ and no inputs\.json; `fewscan tracts inputs` makes"
    ):
        dataset.find(data)
    (data / "dataset.json").unlink()
    write_case(data / "case_1", *crossing(1))
    with pytest.raises(DataError, match=r"has bundle_segmentations/ and no peaks\.nii\.gz"):
        dataset.find(data)


def test_masks_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    masks = crossing(0)[1]
    assert replace_bundles(masks, tmp_path / "p1", native=GRID) == tmp_path / "p1" / SEGMENTATIONS
    replace_bundles({"CC": masks["CC"]}, tmp_path / "p1", native=GRID)
    assert list(bundle_files(tmp_path / "p1")) == ["CC", "CST"]  # of which nobody said that it is to go
    replace_bundles({"CC": masks["CC"]}, tmp_path / "p1", native=GRID, own=["CST"])
    assert list(bundle_files(tmp_path / "p1")) == ["CC"]
    with pytest.raises(DataError, match=r"a bundle cannot be called '\.\./CC'"):
        replace_bundles({"../CC": masks["CC"]}, tmp_path / "p1", native=GRID)
    assert [p.name for p in (tmp_path / "p1").iterdir()] == [SEGMENTATIONS]


@pytest.mark.parametrize("fault", [OSError, KeyboardInterrupt])
def test_masks_that_were_there_stay_when_the_new_ones_cannot_take_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    masks, move = crossing(0)[1], os.replace
    replace_bundles(masks, tmp_path / "p1", native=GRID)

    def stopped(source: Path, target: Path) -> None:
        if source.name == SEGMENTATIONS and source.parent.name.startswith(".part-"):
            raise fault
        move(source, target)

    monkeypatch.setattr(bundles.os, "replace", stopped)
    with pytest.raises(fault):
        replace_bundles({"CC": masks["CC"]}, tmp_path / "p1", native=GRID)
    assert list(bundle_files(tmp_path / "p1")) == ["CC", "CST"]
    assert [p.name for p in (tmp_path / "p1").iterdir()] == [SEGMENTATIONS]


def test_one_case_is_no_data_set_and_its_masks_are_no_case(tmp_path: Path) -> None:
    data = write_crossings(tmp_path, labelled=2)
    with pytest.raises(DataError, match=r"case_0: is one case, .* give the folder above"):
        dataset.find(data / "case_0")
    write_bundles(crossing(0)[1], data, native=GRID)
    assert [case.id for case in dataset.find(data).cases] == ["case_0", "case_1"]


def test_nothing_is_said_of_a_case_in_which_all_labels_were_drawn(tmp_path: Path) -> None:
    data = write_crossings(tmp_path, labelled=2)
    (data / "drawn.json").write_text(json.dumps({"case_0": ["CC", "CST"], "case_1": ["CC"]}))
    told = [f for f in doctor.examine(dataset.find(data)).findings if f.code == "not-drawn"]
    assert [(f.case, f.message.split(":")[0]) for f in told] == [("case_1", "CST")]
