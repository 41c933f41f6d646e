"""What a layout must not do in silence: train on held-out scans, drop or choose label maps, overlook a listing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewscan.data import layouts
from fewscan.data.dataset import CaseFiles, find
from fewscan.data.doctor import examine
from fewscan.data.io import write_labelmap
from fewscan.data.layouts import detect, seen
from fewscan.errors import DataError
from fewscan.judge.evaluate import evaluate
from fewscan.learn.inputs import find_scans


def ids(cases: tuple[CaseFiles, ...]) -> list[str]:
    return [c.id for c in cases]


FLAT = ["a", "a_seg", "b"]
EACH = ["a/image", "a/seg", "b/image"]
CONTRASTS = ["a/a_t1", "a/a_flair", "a/a_seg", "b/b_t1", "b/b_flair"]


def put(scans: Any, names: list[str], folder: str = "") -> None:
    for name in names:
        write = scans.write_label if name.endswith("seg") else scans.write_image
        write(f"{folder}{name}.nii.gz")


@pytest.mark.parametrize("files", [FLAT, EACH, CONTRASTS], ids=["flat", "each", "contrasts"])
@pytest.mark.parametrize("held", ["test/", "Test/"])
def test_what_lies_in_test_is_held_out_of_every_layout(scans: Any, files: list[str], held: str) -> None:
    put(scans, files)
    put(scans, files, held)
    data = find(scans.root)
    for cases in (data.cases, data.test):
        assert [(case.id, case.label is not None) for case in cases] == [("a", True), ("b", False)]
        assert {len(case.images) for case in cases} == {2 if files is CONTRASTS else 1}
    folder = scans.root / held.rstrip("/")
    assert all(folder in image.parents for case in data.test for image in case.images)
    assert not any(folder in image.parents for case in data.cases for image in case.images)


def test_unlabelled_held_out_channels_are_told_by_those_of_the_training_cases(scans: Any) -> None:
    put(scans, ["a_t1", "a_flair", "a_seg"])
    put(scans, ["t_t1", "t_flair"], "test/")
    data = find(scans.root)
    assert (ids(data.cases), ids(data.test)) == (["a"], ["t"])
    assert [file.name for file in data.test[0].images] == ["t_flair.nii.gz", "t_t1.nii.gz"]


def test_imagests_beside_folders_of_cases_is_held_out(scans: Any) -> None:
    put(scans, EACH)
    put(scans, ["imagesTs/t"])
    scans.write_label("labelsTs/t.nii.gz")
    data = find(scans.root)
    assert (ids(data.cases), ids(data.test)) == (["a", "b"], ["t"])
    assert data.test[0].label == scans.root / "labelsTs/t.nii.gz"


@pytest.mark.parametrize("place", ["{}/study/s1", "{}"])
def test_held_out_series_are_not_trained_on(slices: Callable[..., Path], tmp_path: Path, place: str) -> None:
    for name in ("p1", "p2", "test/p3"):
        slices(place.format(name))
    data = find(tmp_path)
    assert (ids(data.cases), ids(data.test)) == (["p1", "p2"], ["p3"])


def test_a_series_called_test_is_held_out(slices: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("p1", "test"):
        slices(name)
    data = find(tmp_path)
    assert (ids(data.cases), ids(data.test)) == (["p1"], ["test"])


def test_series_at_several_depths_are_all_found(slices: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("p1", "p2/study/s1"):
        slices(name)
    assert ids(find(tmp_path).cases) == ["p1", "p2"]


def test_a_series_given_as_here_is_called_like_its_folder(
    slices: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices("p1/inner")
    monkeypatch.chdir(tmp_path / "p1/inner")
    assert ids(find(Path()).cases) == ["inner"]
    assert ids(find(Path("../inner/../../p1/inner")).cases) == ["inner"]


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (["images/a", "labels/a_seg", "labels/b_seg"], ["b_seg"]),
        (["imagesTr/a_0000", "imagesTr/a_0001", "labelsTr/aa_seg"], ["aa_seg"]),
        (["a", "a_seg", "b_seg"], ["b_seg"]),
        (["a_t1", "a_flair", "a_seg", "b_seg"], ["b_seg"]),
        (["a", "b", "seg"], ["seg"]),
        (["a/image", "a/seg", "b/seg"], ["seg"]),
        (["sub-01/anat/sub-01_T1w", "derivatives/m/sub-01_dseg", "derivatives/m/sub-02_dseg"], ["sub-02_dseg"]),
        (["a", "a_seg", "test/t", "test/u_seg"], ["u_seg"]),
    ],
)
def test_label_maps_without_an_image_are_left_over(scans: Any, files: list[str], left: list[str]) -> None:
    put(scans, files)
    data = find(scans.root)
    assert [file.name.removesuffix(".nii.gz") for file in data.unmatched] == left
    assert not {file for case in (*data.cases, *data.test) for file in case.images} & set(data.unmatched)


def test_a_label_map_without_an_image_does_not_tear_the_channels_of_others_apart(scans: Any) -> None:
    put(scans, ["a_t1", "a_flair", "a_seg", "b_seg"])
    [case] = find(scans.root).cases
    assert (case.id, len(case.images)) == ("a", 2)


def test_label_maps_beside_series_that_belong_to_none_are_left_over(slices: Callable[..., Path], scans: Any) -> None:
    slices("p1")
    for name in ("p1_seg", "p2_seg"):
        scans.write_label(f"{name}.nii.gz")
    data = find(scans.root)
    assert (ids(data.labelled), [file.name for file in data.unmatched]) == (["p1"], ["p2_seg.nii.gz"])


@pytest.mark.parametrize("place", ["p2", "p2/study/s1"])
def test_images_beside_series_are_called_no_label_maps(slices: Callable[..., Path], scans: Any, place: str) -> None:
    slices("p1")
    slices(place)
    scans.write_image("p7.nii.gz")
    scans.write_label("p8_seg.nii.gz")
    data = find(scans.root)
    assert [file.name for file in data.unmatched] == ["p8_seg.nii.gz"]
    assert [file.name for file in data.unused] == ["p7.nii.gz"]


@pytest.mark.parametrize("place", ["p1", "p1/study/s1"])
def test_hidden_folders_hold_no_cases(slices: Callable[..., Path], tmp_path: Path, place: str) -> None:
    for name in (place, ".Trashes/501/old", ".old"):
        slices(name)
    assert ids(find(tmp_path).cases) == ["p1"]


def test_every_folder_of_series_is_asked_but_once(
    slices: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("p1", "p2/study/s1", "p2/study/s2"):
        slices(name)
    asked: list[Path] = []
    ask = layouts.is_series
    monkeypatch.setattr(layouts, "is_series", lambda folder: asked.append(folder) or ask(folder))
    assert len(detect(tmp_path).pairs) == 3
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(
    ("files", "channels", "unused"),
    [
        (["p1/t1", "p1/flair", "p1/seg", "p2/t1", "p2/flair", "p3/t1"], ("flair", "t1"), ["p3/t1"]),
        (["p1/image", "p1/seg", "p2/image", "p3/image", "p3/old"], ("image",), ["p3/old"]),
    ],
)
def test_images_of_a_set_that_is_not_complete_are_named(
    scans: Any, files: list[str], channels: tuple[str, ...], unused: list[str]
) -> None:
    put(scans, files)
    data = find(scans.root)
    assert data.channels == channels
    assert {len(case.images) for case in data.cases} == {len(channels)}
    told = [f for f in examine(data).findings if f.code == "image-unused"]
    assert [(f.severity, f.path) for f in told] == [("warning", str(scans.root / f"{name}.nii.gz")) for name in unused]


@pytest.mark.parametrize("files", [["knee1/image", "knee1/seg"], ["knee1/knee1", "knee1/seg"]])
def test_one_folder_with_a_scan_and_its_label_map_is_one_case(scans: Any, files: list[str]) -> None:
    put(scans, files)
    for root in (scans.root, scans.root / "knee1"):
        data = find(root)
        assert (ids(data.labelled), ids(data.unlabelled)) == (["knee1"], [])


def test_scans_called_like_their_folders_are_found_with_label_maps_of_one_name(scans: Any) -> None:
    put(scans, ["p/p1/p1", "p/p1/seg", "p/p2/p2", "p/p2/seg"])
    assert ids(find(scans.root / "p").labelled) == ["p1", "p2"]
    put(scans, ["q/p1/p1_t1", "q/p1/p1_t2", "q/p1/seg", "q/p2/p2_t1", "q/p2/p2_t2"])
    data = find(scans.root / "q")
    assert (ids(data.labelled), ids(data.unlabelled), data.channels) == (["p1"], ["p2"], ("t1", "t2"))


@pytest.mark.parametrize(
    ("files", "both"),
    [
        (["p1/image", "p1/mask", "p1/seg", "p2/image", "p2/seg"], ("p1/mask", "p1/seg")),
        (["p1/image", "p1/gt", "p1/seg"], ("p1/gt", "p1/seg")),
        (["p1/image", "p1/seg", "p1/p1_seg"], ("p1/p1_seg", "p1/seg")),
        (["p1", "p1_label", "p1_mask"], ("p1_label", "p1_mask")),
        (["images/p1", "labels/p1", "labels/p1_seg"], ("labels/p1", "labels/p1_seg")),
        (
            ["sub-1/sub-1_T1w", "derivatives/a/sub-1_dseg", "derivatives/b/sub-1_dseg"],
            ("derivatives/a/sub-1_dseg", "derivatives/b/sub-1_dseg"),
        ),
        (["a", "a_seg", "test/t", "test/t_seg", "test/t_gt"], ("test/t_gt", "test/t_seg")),
    ],
)
def test_of_several_label_maps_none_is_chosen(scans: Any, files: list[str], both: tuple[str, str]) -> None:
    for name in files:
        write = scans.write_image if name.endswith(("image", "p1", "T1w", "a", "t")) else scans.write_label
        write(f"{name}.nii.gz")
    first, second = (scans.root / f"{name}.nii.gz" for name in both)
    with pytest.raises(DataError) as told:
        find(scans.root)
    assert str(told.value).startswith(f"{first} and {second} may both be the label map of ")
    assert str(told.value).endswith("; keep one of the two there")
    assert seen(scans.root) is not None, "for prediction the scans are plain"


def test_two_scans_of_a_case_that_are_called_alike_are_refused(scans: Any) -> None:
    put(scans, ["p1/t1", "p1/p1_t1", "p1/seg"])
    with pytest.raises(DataError, match=r"p1_t1\.nii\.gz and .*t1\.nii\.gz are both the scan 't1' of p1; keep one"):
        find(scans.root)


def test_of_several_label_maps_of_a_nested_series_none_is_chosen(slices: Callable[..., Path], scans: Any) -> None:
    slices("p1/study/s1")
    for name in ("p1_gt", "p1_seg"):
        scans.write_label(f"{name}.nii.gz")
    with pytest.raises(DataError, match=r"p1_gt\.nii\.gz and .*p1_seg\.nii\.gz may both be the label map of p1"):
        find(scans.root)


@pytest.mark.parametrize("folder", ["", "images/", "p1/"])
def test_two_formats_of_one_scan_are_refused(scans: Any, folder: str) -> None:
    put(scans, [f"{folder}p1"])
    scans.write_image(f"{folder}p1.nii")
    with pytest.raises(DataError, match=r"p1\.nii and .*p1\.nii\.gz are both called 'p1'; keep one of the two"):
        find(scans.root)


@pytest.mark.parametrize(
    "files", [FLAT, EACH, ["sub-1/sub-1_x", "derivatives/sub-1_dseg"]], ids=["flat", "each", "bids"]
)
def test_a_listing_counts_in_every_layout(scans: Any, files: list[str]) -> None:
    for name in files:
        if name.endswith("seg"):
            scans.write_label(f"{name}.nii.gz", scans.label(0, (1, 3)))
        else:
            scans.write_image(f"{name}.nii.gz")
    listing = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "ignore": 3}}
    (scans.root / "dataset.json").write_text(json.dumps(listing))
    data = find(scans.root)
    assert (data.names, data.ignore, data.modality) == ({1: "liver"}, 3, "ct")


def test_channels_in_one_file_of_a_flat_folder_are_called_as_listed(scans: Any) -> None:
    scans.write_image("a.nii.gz", np.stack([scans.image(0), scans.image(1)]))
    scans.write_label("a_seg.nii.gz")
    (scans.root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "FLAIR"}}))
    assert find(scans.root).channels == ("T1", "FLAIR")


def test_channels_that_files_name_keep_their_names_and_order(scans: Any) -> None:
    put(scans, CONTRASTS)
    (scans.root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "FLAIR"}}))
    assert detect(scans.root).channels == ("flair", "t1")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("img", "seg"),
        ("CT", "masks"),
        ("Images", "Labels"),
        ("images", "SEGS"),
        ("Bilder", "gt"),
        ("mr", "segmentation"),
        ("volumes", "labels"),
    ],
)
def test_folders_of_scans_and_label_maps_are_known_by_usual_names(scans: Any, images: str, labels: str) -> None:
    for seed, case in enumerate(("p1", "p2", "p3")):
        scans.write_image(f"{images}/{case}.nii.gz", seed=seed)
        if case != "p3":
            scans.write_label(f"{labels}/{case}.nii.gz", seed=seed)
    data = find(scans.root)
    assert (ids(data.labelled), ids(data.unlabelled), data.channels) == (["p1", "p2"], ["p3"], ("image",))


@pytest.mark.parametrize("folders", [("Bilder", "Konturen"), ("ct", "mr"), ("ct", "mr", "masks"), ("A", "B", "C")])
def test_folders_of_which_nobody_knows_what_they_hold_are_refused(scans: Any, folders: tuple[str, ...]) -> None:
    for folder in folders:
        for case in ("p1", "p2", "p3"):
            scans.write_image(f"{folder}/{case}.nii.gz", seed=len(folder))
    with pytest.raises(
        DataError, match=r"hold files of the same names \(p1, p2, p3\).*images/ and labels/.*segs"
    ) as told:
        find(scans.root)
    assert all(f"{folder}/" in str(told.value) for folder in folders)


@pytest.mark.parametrize(
    "files",
    [["p1/t1", "p1/flair", "p2/t1", "p2/flair"], ["p1/anat", "p2/anat"], ["p1/x", "p2/x", "p3/x"], ["p1/x", "p2/y"]],
)
def test_unlabelled_cases_in_their_folders_are_no_doubt(scans: Any, files: list[str]) -> None:
    put(scans, files)
    assert detect(scans.root).pairs


@pytest.mark.parametrize(
    ("scan", "label"), [("ct_1", "seg_1"), ("volume-1", "segmentation-1"), ("1", "mask_1"), ("img_1", "Label_1")]
)
@pytest.mark.parametrize("place", [("", ""), ("images/", "labels/")], ids=["flat", "folders"])
def test_label_maps_may_be_called_so_in_front(
    scans: Any, tmp_path_factory: pytest.TempPathFactory, scan: str, label: str, place: tuple[str, str]
) -> None:
    scans.write_image(f"{place[0]}{scan}.nii.gz")
    scans.write_image(f"{place[0]}{scan.replace('1', '2')}.nii.gz", seed=1)
    scans.write_label(f"{place[1]}{label}.nii.gz")
    data = find(scans.root)
    assert (ids(data.labelled), ids(data.unlabelled), data.unmatched) == ([scan], [scan.replace("1", "2")], ())
    assert [s.id for s in find_scans([scans.root], channels=["image"])] == [scan, scan.replace("1", "2")]
    out = tmp_path_factory.mktemp("out")
    write_labelmap(scans.label(), out / f"{scan}.nii.gz", native=scans.geometry)
    assert evaluate(out, scans.root / place[1]).values("dice") == [1.0]


def test_a_scan_that_begins_like_a_label_map_stays_one(scans: Any) -> None:
    put(scans, ["mask_study_1", "mask_study_2", "ct_1", "mr_1", "gt_1"])
    assert ids(find(scans.root).unlabelled) == ["ct_1", "gt_1", "mask_study_1", "mask_study_2", "mr_1"]


def test_label_maps_in_a_folder_beside_loose_scans_are_theirs(
    scans: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scans.write_image("p1.nii.gz")
    scans.write_image("p2.nii.gz", seed=1)
    scans.write_label("segmentations/p1.nii.gz")
    data = find(scans.root)
    assert (ids(data.labelled), ids(data.unlabelled)) == (["p1"], ["p2"])
    assert [s.id for s in find_scans([scans.root], channels=["image"])] == ["p1", "p2"]
    out = tmp_path_factory.mktemp("out")
    write_labelmap(scans.label(), out / "p1.nii.gz", native=scans.geometry)
    assert evaluate(out, scans.root).values("dice") == [1.0]


@pytest.mark.parametrize(
    "files",
    [
        ["brain.nii.gz", "brain_seg.nii.gz"],
        ["knee.nrrd", "Segmentation.seg.nrrd"],
        ["art.nii.gz", "ven.nii.gz", "tumor_mask.nii.gz"],
    ],
)
def test_labelled_cases_in_their_folders_are_no_doubt(tmp_path: Path, files: list[str]) -> None:
    for file in (tmp_path / case / name for case in ("p1", "p2") for name in files):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    found = detect(tmp_path).pairs
    assert [(case, len(pair.images), pair.label) for case, pair in found.items()] == [
        (case, len(files) - 1, tmp_path / case / files[-1]) for case in ("p1", "p2")
    ]


@pytest.mark.parametrize(
    ("files", "place", "left"),
    [
        (["p1", "p2", "labels/p1", "out/p1", "out/p2"], "", ["out"]),
        (["p1", "p1_seg", "p2", "masks/p1", "out/p1", "out/p2"], "", []),
        (["ct/p1", "ct/p2", "pet/p1", "pet/p2", "labels/p1"], "ct/", ["pet"]),
    ],
)
def test_predictions_and_other_readers_are_not_taken_for_scans(
    scans: Any, files: list[str], place: str, left: list[str]
) -> None:
    for name in files:
        write = scans.write_label if name.startswith(("labels", "masks")) or "_seg" in name else scans.write_image
        write(f"{name}.nii.gz")
    data = find(scans.root)
    assert (ids(data.labelled), ids(data.unlabelled)) == (["p1"], ["p2"])
    assert [case.images for case in data.cases] == [(scans.root / f"{place}{case}.nii.gz",) for case in ("p1", "p2")]
    told = [f for f in examine(data).findings if f.code == "folder-left-out"]
    assert [(f.severity, f.path) for f in told] == [("warning", str(scans.root / name)) for name in left]
