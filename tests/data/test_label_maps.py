"""Labels that are named in their files: segments of 3D Slicer, and a mask for each structure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from series import AXIAL, NAMES, anatomy

from fewscan import meshing
from fewscan.data.dataset import find, load
from fewscan.data.doctor import examine
from fewscan.data.io import read_labels, write_image, write_labelmap
from fewscan.data.repair import fix
from fewscan.deliver.slicer import write_seg_nrrd
from fewscan.deliver.structures import structures_of
from fewscan.errors import DataError
from fewscan.exporting import export
from fewscan.judge.evaluate import evaluate
from fewscan.learn.inputs import find_scans
from fewscan.space.geometry import from_ras


def put_segments(scans: Any, case: str, names: Mapping[int, str], *, numbers: Mapping[int, int] | None = None) -> None:
    """A scan with a segmentation as 3D Slicer leaves it; ``numbers`` says what a drawn label is called in the file."""
    label = scans.label(ord(case), tuple(numbers or names))
    for drawn, told in (numbers or {}).items():
        label = np.where(label == drawn, told + 100, label).astype(np.uint16)
    label = np.where(label > 100, label - 100, label)
    scans.write_image(f"{case}.nii.gz", seed=ord(case))
    native = scans.geometry
    write_seg_nrrd(
        from_ras(label, native), scans.root / f"{case}.seg.nrrd", structures=structures_of(names), native=native
    )


def test_segments_are_matched_by_name_where_patients_number_them_otherwise(scans: Any) -> None:
    put_segments(scans, "a", {1: "liver", 2: "spleen"})
    put_segments(scans, "b", {1: "Spleen", 2: "Liver"}, numbers={1: 2, 2: 1})
    data = find(scans.root)
    assert data.names == {1: "liver", 2: "spleen"}
    for case in data.labelled:
        label = load(case, data).label
        assert label is not None
        np.testing.assert_array_equal(label.data, scans.label(ord(case.id), (1, 2)))
    checkup = examine(data)
    assert checkup.usable
    assert [list(row.labels_ml) for row in checkup.rows] == [["liver", "spleen"]] * 2


def test_numbers_that_all_files_agree_on_are_kept_and_a_listing_chooses(scans: Any) -> None:
    put_segments(scans, "a", {3: "liver", 7: "spleen"})
    put_segments(scans, "b", {3: "liver"})
    assert find(scans.root).names == {3: "liver", 7: "spleen"}
    (scans.root / "labels.json").write_text(json.dumps({"1": "spleen"}))
    data = find(scans.root)
    label = load(data.cases[0], data).label
    assert label is not None
    np.testing.assert_array_equal(label.data, scans.label(ord("a"), (3, 7)) == 7)
    (scans.root / "labels.json").write_text(json.dumps({"3": "Leber", "7": "Milz"}))  # of another language
    assert find(scans.root).names == {3: "Leber", 7: "Milz"}
    (scans.root / "labels.json").unlink()
    scans.write_image("c.nii.gz", seed=3)
    scans.write_label("c_seg.nii.gz", seed=3)
    with pytest.raises(DataError, match=r"a\.seg\.nrrd names its labels, .*c_seg\.nii\.gz numbers them"):
        find(scans.root)


def test_names_survive_the_way_through_slicer(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/labels.json").write_text(json.dumps(NAMES))
    write_labelmap(anatomy(), tmp_path / "labels/p1.nii.gz", native=AXIAL)
    file = tmp_path / "data/p1.seg.nrrd"
    file.parent.mkdir()
    export(tmp_path / "labels/p1.nii.gz", file, kind="seg-nrrd")
    write_image(anatomy().astype(np.float32), tmp_path / "data/p1.nii.gz", native=AXIAL)
    assert examine(find(file.parent)).to_json()["labels"] == NAMES
    assert {str(v): n for v, n in meshing._read(file).names.items()} == NAMES, "mesh calls its parts so"
    assert export(file, tmp_path / "again.seg.nrrd", kind="seg-nrrd")["labels"] == list(NAMES.values())
    [judged] = evaluate(tmp_path / "labels/p1.nii.gz", file).cases
    assert [score.dice for score in judged.labels.values()] == [1.0, 1.0, 1.0]


def test_layers_and_names_given_twice_are_refused(scans: Any) -> None:
    put_segments(scans, "a", {1: "liver", 2: "LIVER"})
    with pytest.raises(DataError, match="two segments are called 'liver'; give each its own name"):
        read_labels(scans.root / "a.seg.nrrd", names={1: "liver"})
    head = "NRRD0004\ntype: uint8\ndimension: 4\nspace: left-posterior-superior\nsizes: 2 3 3 3\n"
    head += "space directions: none (1,0,0) (0,1,0) (0,0,1)\nkinds: list domain domain domain\nencoding: raw\n"
    head += "space origin: (0,0,0)\nSegment0_Name:=liver\nSegment0_LabelValue:=1\nSegment1_Name:=vessel\n"
    head += "Segment1_LabelValue:=1\nSegment1_Layer:=1\n\n"
    (scans.root / "b.seg.nrrd").write_bytes(head.encode() + bytes(54))
    with pytest.raises(DataError, match=r"overlap and lie in 2 layers; in 3D Slicer.*collapse the binary labelmap"):
        read_labels(scans.root / "b.seg.nrrd")


def put_masks(scans: Any, case: str, masks: Mapping[str, int], *, empty: tuple[str, ...] = ()) -> np.ndarray:
    """A case in TotalSegmentator's layout: names of structures to the values that are theirs in the whole map."""
    label: np.ndarray = scans.label(ord(case[-1]), (1, 2))
    scans.write_image(f"{case}/ct.nii.gz", seed=ord(case[-1]))
    for name, value in masks.items():
        scans.write_label(f"{case}/segmentations/{name}.nii.gz", (label == value).astype(np.uint16))
    for name in empty:
        scans.write_label(f"{case}/segmentations/{name}.nii.gz", np.zeros(scans.shape, np.uint16))
    return label


def test_a_mask_for_each_structure_is_one_label_map(scans: Any) -> None:
    whole = put_masks(scans, "s1", {"liver": 1, "spleen": 2})
    put_masks(scans, "s2", {"spleen": 2})
    put_masks(scans, "s3", {"spleen": 2}, empty=("liver",))
    scans.write_image("s4/ct.nii.gz", seed=9)
    data = find(scans.root)
    assert data.names == {1: "liver", 2: "spleen"}
    assert ([c.id for c in data.labelled], [c.id for c in data.unlabelled]) == (["s1", "s2", "s3"], ["s4"])
    assert [c.drawn for c in data.labelled] == [None, {2}, None], "no file: not drawn; an empty one: not there"
    label = load(data.cases[0], data).label
    assert label is not None
    np.testing.assert_array_equal(label.data, whole)
    checkup = examine(data)
    assert checkup.usable
    assert [f.case for f in checkup.findings if f.code == "not-drawn"] == ["s2"]
    assert [scan.id for scan in find_scans([scans.root], channels=["image"])] == ["s1", "s2", "s3", "s4"]
    alone = find(scans.root / "s1")
    assert ([c.id for c in alone.labelled], alone.names) == (["s1"], data.names)


def test_masks_are_references_and_can_be_copied(scans: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = put_masks(scans, "s1", {"liver": 1, "spleen": 2})
    put_masks(scans, "s2", {"spleen": 2})
    out = tmp_path_factory.mktemp("out")
    write_labelmap(whole, out / "p/s1.nii.gz", native=scans.geometry)
    write_labelmap(scans.label(ord("2"), (1, 2)), out / "p/s2.nii.gz", native=scans.geometry)
    with pytest.raises(DataError, match="nothing says which number each has"):
        evaluate(out / "p", scans.root)
    (scans.root / "labels.json").write_text(json.dumps({"1": "liver", "2": "spleen"}))
    found = evaluate(out / "p", scans.root)
    assert [list(case.labels) for case in found.cases] == [["liver", "spleen"], ["spleen"]]
    assert set(found.values("dice")) == {1.0}
    [alone] = evaluate(out / "p/s1.nii.gz", scans.root / "s1/segmentations", names={1: "liver", 2: "spleen"}).cases
    assert [score.dice for score in alone.labels.values()] == [1.0, 1.0]
    checkup = examine(find(scans.root))
    fix(checkup.dataset, checkup, out=out / "copy")
    again = find(out / "copy")
    assert (again.names, [c.drawn for c in again.cases]) == ({1: "liver", 2: "spleen"}, [None, {2}])


def test_masks_that_overlap_or_hold_more_are_refused(scans: Any) -> None:
    put_masks(scans, "s1", {"liver": 1, "spleen": 2, "body": 1})
    [fault] = [f for f in examine(find(scans.root)).findings if f.severity == "error"]
    assert (fault.code, fault.remedy) == ("label-unreadable", "list the wanted structures in labels.json")
    assert "'liver' lies in 'body'" in fault.message or "'body' lies in 'liver'" in fault.message
    (scans.root / "labels.json").write_text(json.dumps({"5": "spleen", "2": "body"}))
    assert examine(find(scans.root)).usable
    scans.write_label("s1/segmentations/spleen.nii.gz", scans.label(0, (1, 2)))
    with pytest.raises(DataError, match=r"spleen\.nii\.gz: holds labels \[1, 2\].*put a label map beside the scan"):
        read_labels(scans.root / "s1/segmentations")


def test_masks_and_a_label_map_leave_a_doubt_and_masks_of_scans_are_none(scans: Any) -> None:
    put_masks(scans, "s1", {"liver": 1})
    scans.write_label("s1/seg.nii.gz")
    with pytest.raises(DataError, match=r"seg\.nii\.gz and .*segmentations may both be the label map of s1"):
        find(scans.root)


def test_a_mask_beside_the_scan_is_warned_of(scans: Any) -> None:
    for case in ("p1", "p2"):
        scans.write_image(f"{case}/ct.nii.gz", seed=ord(case[1]))
        scans.write_label(f"{case}/femur.nii.gz", seed=ord(case[1]))
    told = [f for f in examine(find(scans.root)).findings if f.code == "mask-as-channel"]
    assert [(f.severity, f.case) for f in told] == [("warning", "p1"), ("warning", "p2")]
    assert "put it into p1/segmentations/" in told[0].remedy
