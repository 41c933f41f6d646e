"""What is predicted of what a user points at: the scans of data sets under their cases' names, and no label maps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from series import AXIAL, anatomy, write_series

from fewscan.errors import DataError
from fewscan.judge.evaluate import evaluate
from fewscan.learn.inputs import find_scans

ONE = ("image",)


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """Makes files without content."""

    def make(*names: str) -> Path:
        for name in names:
            file = tmp_path / f"{name}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        return tmp_path

    return make


def found(root: Path, *channels: str) -> dict[str, list[str]]:
    scans = find_scans([root], channels=channels or ONE)
    return {
        scan.id: [file.relative_to(root).as_posix().removesuffix(".nii.gz") for file in scan.images] for scan in scans
    }


@pytest.mark.parametrize(
    ("files", "scans"),
    [
        (["a", "a_seg", "b"], {"a": ["a"], "b": ["b"]}),
        (
            ["knee1/image", "knee1/seg", "knee2/image"],
            {"knee1": ["knee1/image"], "knee2": ["knee2/image"]},
        ),
        (["knee1/image", "knee1/seg"], {"knee1": ["knee1/image"]}),
        (["images/knee1", "labels/knee1"], {"knee1": ["images/knee1"]}),
        (["images/a", "labels/a", "test/images/t", "test/labels/t"], {"a": ["images/a"], "t": ["test/images/t"]}),
        (
            ["imagesTr/a_0000", "labelsTr/a", "imagesTs/b_0000"],
            {"a": ["imagesTr/a_0000"], "b": ["imagesTs/b_0000"]},
        ),
        (["sub-1/anat/sub-1_T2w", "derivatives/x/sub-1_T2w_dseg"], {"sub-1": ["sub-1/anat/sub-1_T2w"]}),
        (["p1/image", "p1/mask", "p1/seg"], {"p1": ["p1/image"]}),
        (["a", "b"], {"a": ["a"], "b": ["b"]}),
        (["p1/anat/a", "p2/deep/er/b"], {"a": ["p1/anat/a"], "b": ["p2/deep/er/b"]}),
    ],
)
def test_the_cases_of_a_data_set_are_predicted_and_their_label_maps_are_not(
    put: Callable[..., Path], files: list[str], scans: dict[str, list[str]]
) -> None:
    assert found(put(*files)) == scans


@pytest.mark.parametrize(
    ("files", "scans"),
    [
        (["a_t1", "a_flair", "a_seg"], {"a": ["a_t1", "a_flair"]}),
        (["p1/t1", "p1/flair", "p1/seg", "p2/t1", "p2/flair"], {p: [f"{p}/t1", f"{p}/flair"] for p in ("p1", "p2")}),
        (["a_t1", "a_flair", "b_t1", "b_flair"], {p: [f"{p}_t1", f"{p}_flair"] for p in "ab"}),
        (["images/a_0000", "images/a_0001", "labels/a"], {"a": ["images/a_0000", "images/a_0001"]}),
        (["p1/image", "p1/seg"], {"p1": ["p1/image"]}),
    ],
)
def test_channels_go_in_the_order_of_the_model(
    put: Callable[..., Path], files: list[str], scans: dict[str, list[str]]
) -> None:
    assert found(put(*files), "t1", "flair") == scans


@pytest.mark.parametrize(
    ("files", "scans"),
    [
        (["a", "b", "scans/old"], {"a": ["a"], "b": ["b"]}),
        (["a", "b", "images/old"], {"a": ["a"], "b": ["b"]}),
        (["a", "b", "imgs/old", "labels/old"], {"a": ["a"], "b": ["b"]}),
        (["a", "sub-01/anat/sub-01_T1w"], {"a": ["a"]}),
        (["a", "sub-01/anat/sub-01_T1w", "derivatives/x/sub-01_dseg"], {"a": ["a"]}),
        (
            ["siteA/a1", "siteA/a2", "siteB/b1", "siteB/seg"],
            {i: [f"site{i[0].upper()}/{i}"] for i in ("a1", "a2", "b1")},
        ),
        (["images/a", "labels/a", "labels/b", "more/c"], {"a": ["images/a"], "c": ["more/c"]}),
        (["siteA/a1", "siteB/x/b1", "test/t"], {"a1": ["siteA/a1"], "b1": ["siteB/x/b1"], "t": ["test/t"]}),
    ],
)
def test_a_layout_that_passes_images_over_is_no_data_set(
    put: Callable[..., Path], files: list[str], scans: dict[str, list[str]]
) -> None:
    assert found(put(*files)) == scans


def test_a_series_beside_files_takes_nothing_from_them(put: Callable[..., Path], tmp_path: Path) -> None:
    write_series(tmp_path / "one/dicom/s1", anatomy(), AXIAL)
    write_series(tmp_path / "two/p1", anatomy(), AXIAL)
    put("one/a", "one/b", "two/conv/p8", "two/conv/p9")
    assert sorted(found(tmp_path / "one")) == ["a", "b"]
    assert sorted(found(tmp_path / "two")) == ["p1", "p8", "p9"]
    put("two/p1_seg", "two/p7_seg")  # label maps, the only files of the folder itself
    assert list(found(tmp_path / "two")) == ["p1"]


@pytest.mark.parametrize("drawn", [(), ("p1/seg", "p3/seg")])
def test_a_patient_who_lacks_a_channel_takes_it_from_nobody_else(
    put: Callable[..., Path], drawn: tuple[str, ...]
) -> None:
    root = put("p1/t1", "p1/flair", "p2/t1", "p2/flair", "p3/t1", *drawn)
    full = {p: [f"{p}/t1", f"{p}/flair"] for p in ("p1", "p2")}
    assert found(root, "t1", "flair") == {**full, "p3": ["p3/t1"]}


def test_hidden_folders_hold_no_scans(tmp_path: Path) -> None:
    for name in ("p1/study/s1", ".Trashes/501/old", "p1/.old/s0"):
        write_series(tmp_path / name, anatomy(), AXIAL)
    assert list(found(tmp_path)) == ["p1"]


@pytest.mark.parametrize("listed", [False, True], ids=["closed", "listed but closed"])
@pytest.mark.parametrize("files", [["a", "b"], ["x/a", "y/b"], ["images/a", "labels/a"]])
def test_a_folder_that_may_not_be_read_is_no_case(
    put: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, files: list[str], listed: bool
) -> None:
    root = put(*files, "lost+found/c", "test/images/d")
    shut = [str(root / "lost+found"), str(root / "test")]

    def guarded(call: Callable[..., Any], *, folder: bool) -> Callable[..., Any]:
        def guard(path: Any = ".", *args: Any, **more: Any) -> Any:
            name = str(path)
            if (folder and name in shut) or any(name.startswith(s + os.sep) for s in shut):
                raise PermissionError(13, "Permission denied", name)
            return call(path, *args, **more)

        return guard

    for name in ("listdir", "scandir", "stat"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name), folder=name != "stat" and not listed))
    assert sorted(found(root)) == sorted({Path(file).name for file in files})
    with pytest.raises(DataError, match="may not be read; change its permissions"):
        find_scans([root / "lost+found"], channels=ONE)


@pytest.mark.parametrize("listing", ["dataset.json", "labels.json"])
def test_a_broken_listing_ends_no_prediction_of_plain_images(put: Callable[..., Path], listing: str) -> None:
    root = put("one/a", "one/b", "two/images/a", "two/labels/a", "three/a", "three/a_seg")
    for folder in ("one", "two", "three"):
        (root / folder / listing).write_text("{")
    assert sorted(found(root / "one")) == ["a", "b"]
    for folder in ("two", "three"):
        with pytest.raises(DataError, match=f"{listing}: not readable as JSON"):
            found(root / folder)


def test_channels_with_other_names_are_refused(put: Callable[..., Path]) -> None:
    with pytest.raises(
        DataError, match="is one of the channels flair, t1, the model takes T2, ADC; name the files like"
    ):
        found(put("a_t1", "a_flair", "a_seg"), "T2", "ADC")


def test_a_held_out_case_of_the_same_name_is_not_mixed_up(put: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="several inputs are named 'a'"):
        found(put("images/a", "labels/a", "test/images/a"))


def test_series_are_called_like_the_cases_of_training(tmp_path: Path) -> None:
    for name in ("p1/study/s1", "p2/study/s1"):
        write_series(tmp_path / name, anatomy(), AXIAL)
    assert list(found(tmp_path)) == ["p1", "p2"]


def test_a_series_or_channels_given_from_inside_their_folder_are_called_like_it(
    tmp_path: Path, put: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_series(tmp_path / "p1", anatomy(), AXIAL))
    for given in (Path(), Path("../p1/../p1"), Path("."), tmp_path / "p1"):
        assert [scan.id for scan in find_scans([given], channels=ONE)] == ["p1"]
    put("p2/t1", "p2/flair")
    monkeypatch.chdir(tmp_path / "p2")
    [scan] = find_scans([Path("t1.nii.gz"), Path("flair.nii.gz")], channels=("t1", "flair"))
    assert scan.id == "p2"


def test_predictions_of_a_data_set_are_judged_by_it(tmp_path: Path) -> None:
    from fewscan.data.io import write_image, write_labelmap

    data, out = tmp_path / "data", tmp_path / "out"
    for case in ("knee1", "knee2"):
        write_image(anatomy()[None].astype("float32"), data / case / "image.nii.gz", native=AXIAL)
        write_labelmap(anatomy(), data / case / "seg.nii.gz", native=AXIAL)
    for scan in find_scans([data], channels=ONE):
        write_labelmap(anatomy(), out / f"{scan.id}.nii.gz", native=AXIAL)
    assert evaluate(out, data).values("dice") == [1.0, 1.0]
