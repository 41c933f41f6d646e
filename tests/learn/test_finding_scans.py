"""What is predicted of what a user points at: the scans of data sets under their cases' names, and no label maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
