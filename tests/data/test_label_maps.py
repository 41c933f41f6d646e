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
from fewscan.deliver.sections import judged
from fewscan.deliver.slicer import write_seg_nrrd
from fewscan.deliver.structures import structures_of
from fewscan.errors import DataError
from fewscan.exporting import export
from fewscan.judge.evaluate import evaluate
from fewscan.learn.inputs import find_scans
from fewscan.registration import _reference
from fewscan.space.geometry import from_ras
from fewscan.space.volume import IGNORE


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


def listed(scans: Any, names: Mapping[str, str]) -> None:
    (scans.root / "labels.json").write_text(json.dumps(names))


def test_a_misspelt_segment_is_refused_and_one_that_is_not_listed_is_named(scans: Any) -> None:
    put_segments(scans, "a", {1: "liver", 2: "splen"})
    put_segments(scans, "b", {1: "liver"})
    listed(scans, {"1": "liver", "2": "spleen"})
    [fault] = [f for f in examine(find(scans.root)).findings if f.severity == "error"]
    assert "segment 2 is called 'splen', and label 2 of the list 'spleen', as no segment is" in fault.message
    listed(scans, {"1": "liver", "3": "spleen"})
    found = examine(find(scans.root))
    assert found.usable
    told = {f.code: f.message for f in found.findings if f.severity == "warning"}
    assert told["segment-not-listed"] == "splen: not in the list, so taken for background"
    assert told["label-without-file"].startswith("spleen: listed in labels.json or dataset.json, but in no case")


def test_a_segment_that_was_added_is_judged_and_exported_or_told(
    scans: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    put_segments(scans, "a", {1: "lesion", 2: "liver"}, numbers={1: 2, 2: 1})
    out = tmp_path_factory.mktemp("out")
    write_labelmap((scans.label(ord("a"), (1, 2)) == 1).astype(np.uint16), out / "a.nii.gz", native=scans.geometry)
    [case] = evaluate(out / "a.nii.gz", scans.root / "a.seg.nrrd", known={1: "Liver"}).cases
    assert {name: score.dice for name, score in case.labels.items()} == {"Liver": 1.0, "lesion": 0.0}
    listed(scans, {"1": "liver"})
    for kind, target in (("seg-nrrd", "b.seg.nrrd"), ("bids", "bids")):
        with pytest.raises(DataError, match=r"holds segments \['lesion'\] not in the list \['liver'\]; give"):
            export(scans.root / "a.seg.nrrd", out / target, kind=kind)


def test_segments_without_names_of_their_own_are_judged_by_number(
    scans: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    put_segments(scans, "a", {1: "Segment_1", 2: "Segment_2", 3: "Segment_3"})
    label = scans.label(ord("a"), (1, 2, 3))
    file = tmp_path_factory.mktemp("out") / "a.nii.gz"
    write_labelmap(np.where(label == 3, 0, label).astype(np.uint16), file, native=scans.geometry)
    for known in ({1: "label 1", 2: "label 2"}, {}):
        [case] = evaluate(file, scans.root / "a.seg.nrrd", known=known).cases
        assert {name: score.dice for name, score in case.labels.items()} == {
            "label 1": 1.0,
            "label 2": 1.0,
            "label 3": 0.0,
        }
    (file.parent / "labels.json").write_text(json.dumps({"1": "label 1", "2": "label 2"}))  # as a report finds them
    reference, _, _ = judged(case, file.parent, named={})
    np.testing.assert_array_equal(reference.data, label)


def test_segments_of_the_fixed_scan_that_the_moving_one_lacks_are_no_others(scans: Any) -> None:
    put_segments(scans, "a", {1: "kidney", 2: "liver", 3: "vessel"})
    put_segments(scans, "b", {1: "Liver", 2: "spleen", 3: "vessel"})
    carried = read_labels(scans.root / "b.seg.nrrd")
    found = _reference(scans.root / "a.seg.nrrd", scans.root / "a.nii.gz", carried, scans.root / "b.seg.nrrd")
    here = scans.label(ord("a"), (1, 2, 3))
    np.testing.assert_array_equal(found.data, np.select([here == 2, here == 3], [1, 3], 0))
    assert found.names == {1: "Liver", 2: "spleen", 3: "vessel"}


def test_files_that_say_nothing_stop_no_search_and_numbers_that_agree_may_be_mixed(scans: Any) -> None:
    put_segments(scans, "a", {1: "liver", 2: "spleen"})
    head = "NRRD0004\ntype: uint8\ndimension: 3\nspace: left-posterior-superior\nsizes: 3 3 3\nencoding: raw\n"
    head += "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n\n"
    for case, content in (("b", b""), ("c", head.encode() + bytes(27)), ("d", head.encode())):
        scans.write_image(f"{case}.nii.gz", seed=ord(case))
        (scans.root / f"{case}.seg.nrrd").write_bytes(content)
    scans.write_image("e.nii.gz", seed=5)
    scans.write_label("e_seg.nii.gz", scans.label(5, (2,)))
    scans.write_image("test/t.nii.gz", seed=6)
    scans.write_label("test/t_seg.nii.gz", scans.label(6, (1, 7)))
    data = find(scans.root)
    assert [data.names[value] for value in (1, 2)] == ["liver", "spleen"]
    assert {f.case for f in examine(data).findings if f.code == "label-unreadable"} == {"b", "d"}
    scans.write_label("e_seg.nii.gz", scans.label(5, (2, 3)))
    with pytest.raises(DataError, match=r"a\.seg\.nrrd names its labels, .*e_seg\.nii\.gz numbers them"):
        find(scans.root)


def test_what_was_not_looked_at_stays_so_in_a_repaired_copy_of_segments(
    scans: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    put_segments(scans, "a", {1: "liver", 9: "nobody looked"})
    (scans.root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "ignore": 9}}))
    checkup = examine(find(scans.root))
    assert not [f for f in checkup.findings if f.code == "segment-not-listed"]
    copy = tmp_path_factory.mktemp("out") / "copy"
    fix(checkup.dataset, checkup, out=copy)
    before, after = (load(data.cases[0], data).label for data in (checkup.dataset, find(copy)))
    assert before is not None
    assert after is not None
    np.testing.assert_array_equal(after.data, before.data)
    assert (before.data == IGNORE).any()


def test_a_case_without_a_mask_of_what_is_listed_is_unlabelled_and_named(scans: Any) -> None:
    put_masks(scans, "s1", {"liver": 1})
    put_masks(scans, "s2", {"spleen": 2})
    listed(scans, {"1": "liver", "7": "kidney"})
    checkup = examine(find(scans.root))
    assert [(c.id, c.label is None, c.drawn) for c in checkup.dataset.cases] == [
        ("s1", False, None),
        ("s2", True, None),
    ]
    told = {f.code: (f.case, f.message.partition(",")[0]) for f in checkup.findings if f.severity == "warning"}
    assert told == {
        "label-unmatched": ("s2", "segmentations/ holds no mask of a structure that is listed"),
        "label-without-file": ("", "kidney: listed in labels.json or dataset.json"),
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [("liver.nii", "liver.nii.gz"), ("kidney_left.nii.gz", "left_kidney.nii.gz"), ("Spleen.nii.gz", "spleen.nii")],
)
def test_two_masks_of_one_structure_are_refused(scans: Any, one: str, other: str) -> None:
    scans.write_image("s1/ct.nii.gz")
    for name in (one, other):
        scans.write_label(f"s1/segmentations/{name}")
    with pytest.raises(DataError, match=r"are both masks of .*; keep one of the two there") as told:
        find(scans.root)
    assert one in str(told.value)
    assert other in str(told.value)


def test_masks_may_carry_the_name_of_their_case_and_an_ending(scans: Any) -> None:
    put_masks(scans, "s1", {"s1_liver": 1, "spleen_mask": 2})
    put_masks(scans, "s2", {"liver": 1, "Spleen_seg": 2})
    data = find(scans.root)
    assert (data.names, [case.drawn for case in data.cases]) == ({1: "liver", 2: "spleen"}, [None, None])
    label = load(data.cases[1], data).label
    assert label is not None
    np.testing.assert_array_equal(label.data, scans.label(ord("2"), (1, 2)))


def test_a_damaged_mask_that_nobody_lists_is_in_nobodys_way(scans: Any) -> None:
    whole = put_masks(scans, "s1", {"liver": 1, "spleen": 2}, empty=("stomach",))
    (scans.root / "s1/segmentations/aorta.nii.gz").write_bytes(b"")
    listed(scans, {"1": "liver", "2": "spleen", "3": "stomach"})
    data = find(scans.root)
    assert examine(data).usable
    label = load(data.cases[0], data).label
    assert label is not None
    np.testing.assert_array_equal(label.data, whole)
    listed(scans, {"1": "liver", "2": "aorta"})
    assert not examine(find(scans.root)).usable
