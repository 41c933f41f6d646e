"""DICOM series: order, scale, place, refusals, and no word about the patient."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import HEVCMP51, JPEG2000Lossless, RLELossless
from series import as_one_file, oblique, write_series

from fewscan.data.dicom import describe_series, is_series, on_disk, read_series
from fewscan.data.io import read_image
from fewscan.deliver import scenes
from fewscan.errors import DataError
from fewscan.learn.inputs import find_scans
from fewscan.space.geometry import Geometry, from_ras, ras_geometry, to_ras


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
        (each(SeriesInstanceUID="1.2.3"), r"holds 2 series, number \? of 1 slice\(s\), number \? of 5 slice\(s\); put"),
        (each(ImagePositionPatient=[-10, -20, 30]), "two slices lie in the same place"),
        (each(PixelSpacing=None), "no PixelSpacing"),
        (each(PixelSpacing=[0.7, 0.9]), r"slices differ in spacing, \[0.7, 0.5\] against \[0.7, 0.9\]"),
        (lambda i: i.__setitem__(2, smaller(i[2])), r"slices of \(4, 5\) and \(4, 4\) pixels"),
        (each(ImagePositionPatient=[-4, -20, 35]), "shifted against each other"),
        (each(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "slices differ in direction"),
        (each(ImageOrientationPatient=None), "no ImageOrientationPatient"),
        (each(NumberOfFrames=2), "multi-frame DICOM whose frames do not say where they lie; export it as enh"),
        (each(SamplesPerPixel=3), "colour DICOM"),
        (each(PixelData=b"\0\0"), "cannot be read"),
        (each(ImagePositionPatient=[1, 2]), "the place or scale of a slice is damaged"),
    ],
)
def test_series_that_cannot_be_trusted_are_refused(slices: Callable[..., Path], edit: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_series(slices(edit=edit))


def test_order_and_compression_change_nothing(tmp_path: Path) -> None:
    shape, angle = (9, 8, 5), np.radians(25)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    grid = Geometry(shape, turn @ np.diag([-0.7, -0.9, 3.0, 1.0]))
    data = np.random.default_rng(0).integers(-900, 2000, shape)
    plain = read_series(write_series(tmp_path / "plain", data, grid, order="forward"))
    packed = read_series(write_series(tmp_path / "rle", data, grid, order="reversed", syntax=RLELossless))
    np.testing.assert_array_equal(plain.data, packed.data)
    np.testing.assert_allclose(plain.geometry.affine, packed.geometry.affine)
    np.testing.assert_array_equal(plain.data, to_ras(data[None], grid)[0])
    np.testing.assert_allclose(plain.geometry.affine, ras_geometry(grid).affine, atol=1e-4)


def jpeg_2000(folder: Path) -> None:
    """Compress the slices of a series by SimpleITK's own encoder."""
    import SimpleITK as sitk  # noqa: N813

    for file in folder.iterdir():
        item = pydicom.dcmread(file)
        writer, packed = sitk.ImageFileWriter(), folder.parent / "packed.dcm"
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(packed))
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG2000")
        writer.Execute(sitk.GetImageFromArray(item.pixel_array[None]))
        encoded = pydicom.dcmread(packed)
        item.file_meta.TransferSyntaxUID = encoded.file_meta.TransferSyntaxUID
        item.PixelData = encoded.PixelData
        item["PixelData"].is_undefined_length = True
        item.save_as(file)


def test_what_pydicom_cannot_unpack_gdcm_does(tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(-900, 2000, (9, 8, 3))
    folder = write_series(tmp_path / "series", data, Geometry((9, 8, 3), np.diag([-1.0, -1.0, 2.0, 1.0])))
    plain = read_series(folder)
    jpeg_2000(folder)
    item = pydicom.dcmread(next(folder.iterdir()))
    assert item.file_meta.TransferSyntaxUID == JPEG2000Lossless
    np.testing.assert_array_equal(read_series(folder).data, plain.data)
    for file in folder.iterdir():
        item = pydicom.dcmread(file)
        item.file_meta.TransferSyntaxUID = HEVCMP51
        item.save_as(file)
    with pytest.raises(DataError, match=r"compressed as HEVC.*, which cannot be unpacked; export the series uncompr"):
        read_series(folder)


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


@pytest.mark.parametrize("seed", [None, 3])
def test_a_multi_frame_file_is_the_series_it_was_made_of(tmp_path: Path, seed: int | None) -> None:
    data = np.random.default_rng(0).integers(-900, 2000, oblique().shape)
    single = write_series(tmp_path / "single", data, oblique())
    whole = as_one_file(single, tmp_path / "whole", seed=seed)
    plain, framed = read_series(single), read_series(whole)
    np.testing.assert_array_equal(framed.data, plain.data)
    np.testing.assert_allclose(framed.geometry.affine, plain.geometry.affine, atol=1e-6)
    series = describe_series(whole)
    assert sorted(series.frames) == list(range(1, 10))
    assert (series.frames == tuple(range(9, 0, -1))) == (seed is None)  # highdicom writes the last slice first
    assert set(series.files) == {whole / "all.dcm"}


def test_compressed_frames_are_unpacked(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(-900, 2000, oblique().shape)
    whole = as_one_file(write_series(tmp_path / "single", data, oblique()), tmp_path / "whole", seed=1)
    plain, item = read_series(whole), pydicom.dcmread(whole / "all.dcm")
    item.compress(RLELossless, generate_instance_uid=False)
    item.save_as(whole / "all.dcm")
    np.testing.assert_array_equal(read_series(whole).data, plain.data)


def test_frames_of_two_phases_are_refused(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(-900, 2000, oblique().shape)
    whole = as_one_file(write_series(tmp_path / "single", data, oblique()), tmp_path / "whole")
    item = pydicom.dcmread(whole / "all.dcm")
    item.PerFrameFunctionalGroupsSequence = 2 * list(item.PerFrameFunctionalGroupsSequence)
    item.NumberOfFrames, item.PixelData = 18, 2 * item.PixelData
    item.save_as(whole / "all.dcm")
    with pytest.raises(DataError, match=r"18 slices in 9 places: several phases or echoes\?"):
        read_series(whole)
    del item.PerFrameFunctionalGroupsSequence[9:]
    item.save_as(whole / "all.dcm")
    with pytest.raises(DataError, match="a file holds 18 frames and tells of 9"):
        read_series(whole)


def test_one_of_several_series_is_chosen_by_its_number(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    long, short = rng.integers(0, 90, oblique().shape), rng.integers(0, 90, (*oblique().shape[:2], 2))
    folder = write_series(tmp_path / "mixed", long, oblique())
    other = write_series(tmp_path / "other", short, Geometry(short.shape, oblique().affine), tags={"SeriesNumber": 9})
    alone = read_series(folder)
    for file in other.iterdir():
        file.rename(folder / f"scout_{file.name}")
    with pytest.raises(DataError, match=r"4 of 9 slice\(s\), number 9 of 2 slice\(s\); choose one as in mixed@4"):
        read_series(folder)
    assert is_series(tmp_path / "mixed@4")
    np.testing.assert_array_equal(read_image(tmp_path / "mixed@4").data, alone.data)
    assert describe_series(tmp_path / "mixed@9").native.shape[2] == 2
    with pytest.raises(DataError, match="no single series has the number 7"):
        read_series(tmp_path / "mixed@7")
    assert not is_series(tmp_path / "nothing@4")
    assert on_disk(tmp_path / "mixed@4") == on_disk(tmp_path / "mixed") == tmp_path / "mixed"
    assert not on_disk(tmp_path / "nothing@4").exists()
    (tmp_path / "a").touch()
    assert on_disk(tmp_path / "a@4.nii.gz") == tmp_path / "a@4.nii.gz"  # a file has no series to choose from
    assert find_scans([tmp_path / "mixed@4"], channels=["image"])[0].images == (tmp_path / "mixed@4",)
    with pytest.raises(DataError, match="nothing@4 does not exist"):
        find_scans([tmp_path / "nothing@4"], channels=["image"])
    layers, missing = scenes._scan(tmp_path / "mixed@4", alone.geometry, "the scan")
    assert missing == []
    np.testing.assert_array_equal(layers[0].data, alone.data[0])
