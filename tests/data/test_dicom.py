"""DICOM series: order, scale, place, refusals, and no word about the patient."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewscan.data.dicom import is_series, read_series
from fewscan.data.io import read_image
from fewscan.errors import DataError
from fewscan.space.geometry import from_ras


def test_a_series_is_sorted_scaled_and_placed(slices: Callable[..., Path]) -> None:
    volume = read_image(slices())
    assert volume.data.dtype == np.int16
    assert volume.native.axis_codes == "LPS"
    assert volume.native.spacing == pytest.approx((0.5, 0.7, 2.5))
    np.testing.assert_allclose(volume.native.affine[:3, 3], [10, 20, 30])
    stored = from_ras(volume.data, volume.native)[0]
    assert stored[1, 2].tolist() == [2 * 4 + 1 + 100 * z - 1024 for z in range(6)]


def test_files_without_an_image_are_passed_over(slices: Callable[..., Path]) -> None:
    def without_pixels(items: list[Any]) -> None:
        del items[-1].PixelData

    assert read_series(slices(edit=without_pixels)).data.shape == (1, 4, 5, 5)


def remove(index: int) -> Callable[[list[Any]], None]:
    return lambda items: items.pop(index) and None


def smaller(item: Any) -> Any:
    item.Rows, item.PixelData = 4, item.PixelData[:32]
    return item


def each(**values: Any) -> Callable[[list[Any]], None]:
    def edit(items: list[Any]) -> None:
        for name, value in values.items():
            setattr(items[2], name, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove(2), r"5 mm between slices 2 and 3, 2.5 mm elsewhere: slices are missing"),
        (each(SeriesInstanceUID="1.2.3"), r"holds 2 series of \[1, 5\] slices; put each into its own folder"),
        (each(ImagePositionPatient=[-10, -20, 30]), "two slices lie in the same place"),
        (each(PixelSpacing=None), "no PixelSpacing"),
        (each(PixelSpacing=[0.7, 0.9]), r"slices differ in spacing, \[0.7, 0.5\] against \[0.7, 0.9\]"),
        (lambda i: i.__setitem__(2, smaller(i[2])), r"slices of \(4, 5\) and \(4, 4\) pixels"),
        (each(ImagePositionPatient=[-4, -20, 35]), "shifted against each other"),
        (each(NumberOfFrames=2), "multi-frame"),
        (each(PixelData=b"\0\0"), "cannot be read"),
        (each(ImagePositionPatient=[1, 2]), "the place or scale of a slice is damaged"),
    ],
)
def test_series_that_cannot_be_trusted_are_refused(slices: Callable[..., Path], edit: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_series(slices(edit=edit))


def test_a_folder_without_dicom_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert not is_series(tmp_path)
    assert not is_series(tmp_path / "missing")
    with pytest.raises(DataError, match="holds no DICOM image slices"):
        read_series(tmp_path)


def test_damaged_slices_are_refused_without_a_word_about_the_patient(
    slices: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder, dice, said = slices(), random.Random(3), ""
    file = next(iter(sorted(folder.iterdir())))
    sound = file.read_bytes()
    for _ in range(150):
        raw = bytearray(sound)
        for _ in range(dice.randint(1, 6)):
            raw[dice.randrange(132, len(raw))] = dice.randrange(256)
        file.write_bytes(raw[: dice.choice([len(raw), dice.randrange(132, len(raw))])])
        try:
            read_series(folder)
        except DataError as error:
            said += str(error)
    assert said
    assert not [word for word in ("Secret", "4711") if word in said]
    assert caplog.text == ""
