"""Reading and writing: round trips, orientation, refusals."""

from __future__ import annotations

import errno
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (its customary name)

from fewscan.data.io import atomic, peek, read_image, read_labels, write_image, write_labelmap
from fewscan.errors import DataError, GeometryError, ResourceError
from fewscan.space.geometry import Geometry, check_same, to_ras
from fewscan.space.volume import IGNORE

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")


def oblique() -> Geometry:
    turn = np.array([[0.0, -0.8, 0.6], [-1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([0.5, 1.5, 3.0]), (4.0, -7.0, 11.0)
    return Geometry((5, 6, 7), affine)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", [np.int16, np.uint8, np.float32])
def test_an_image_comes_back_as_it_was(tmp_path: Path, suffix: str, kind: type) -> None:
    native = oblique()
    stored = np.random.default_rng(0).integers(0, 200, native.shape).astype(kind)
    data, geometry = to_ras(stored, native)
    write_image(data, tmp_path / f"a{suffix}", native=native)
    volume = read_image(tmp_path / f"a{suffix}")
    assert volume.data.dtype == kind
    np.testing.assert_array_equal(volume.data[0], data)
    check_same(volume.native, native, what="native", tolerance_mm=1e-3)
    check_same(volume.geometry, geometry, what="ras", tolerance_mm=1e-3)
    assert volume.data.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_agree_with_simpleitk(tmp_path: Path, suffix: str) -> None:
    native = oblique()
    data = np.random.default_rng(1).integers(0, 99, native.shape).astype(np.int16)
    image = sitk.GetImageFromArray(data.T)
    lps = np.diag([-1.0, -1.0, 1.0]) @ native.affine[:3]
    image.SetSpacing(native.spacing)
    image.SetDirection((lps[:, :3] / np.array(native.spacing)).ravel().tolist())
    image.SetOrigin(lps[:, 3].tolist())
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    volume = read_image(tmp_path / f"a{suffix}")
    check_same(volume.native, native, what="native", tolerance_mm=1e-3)
    np.testing.assert_array_equal(volume.data[0], to_ras(data, native)[0])


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_headers_with_a_voxel_file_beside_them_are_read(tmp_path: Path, suffix: str) -> None:
    data = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    sitk.WriteImage(sitk.GetImageFromArray(data.T), str(tmp_path / f"a{suffix}"), False)
    assert sorted(read_image(tmp_path / f"a{suffix}").data.ravel()) == sorted(data.ravel())


def test_headers_may_not_point_to_another_folder(tmp_path: Path) -> None:
    text = "NDims = 3\nDimSize = 1 1 1\nElementSpacing = 1 1 1\nElementType = MET_UCHAR\nElementDataFile = ../secret\n"
    (tmp_path / "a.mhd").write_text(text)
    with pytest.raises(DataError, match="not one file beside the header"):
        read_image(tmp_path / "a.mhd")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_labels_come_back_in_the_smallest_type_and_with_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    native = oblique()
    label = np.asarray(to_ras(np.arange(210).reshape(native.shape) % 4, native)[0])
    for name in ("a", "b"):
        write_labelmap(label, tmp_path / f"{name}{suffix}", native=native)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert peek(tmp_path / f"a{suffix}").dtype == np.uint8
    back = read_labels(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(back.data, label)
    assert back.names == {1: "label 1", 2: "label 2", 3: "label 3"}


def test_both_nifti_forms_are_set_and_agree(tmp_path: Path) -> None:
    write_image(np.zeros((5, 6, 7), np.int16).transpose(1, 2, 0), tmp_path / "a.nii.gz", native=oblique())
    header = nib.load(tmp_path / "a.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-4)


def test_a_sheared_grid_is_written_without_a_contradicting_qform(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.4
    write_image(np.ones((30, 30, 4), np.uint8), tmp_path / "a.nii.gz", native=Geometry((30, 30, 4), affine))
    np.testing.assert_allclose(read_image(tmp_path / "a.nii.gz").native.affine, affine, atol=1e-6)


def nifti(path: Path, data: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)
    return path


def test_integer_rescaling_stays_integer(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.array([[[0, 1024]]], np.int16))
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([1, -1024], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(raw)
    volume = read_image(path)
    assert volume.data.dtype == np.int16
    assert volume.data.ravel().tolist() == [-1024, 0]


def test_big_endian_nifti_is_read(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(np.arange(8, dtype=">i2").reshape(2, 2, 2), np.eye(4), header), tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii").data.ravel().tolist() == list(range(8))


def test_channels_in_one_file_need_their_names(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.arange(24, dtype=np.int16).reshape(2, 3, 2, 2))
    volume = read_image(path, channels=("t1", "t2"))
    assert volume.data.shape == (2, 2, 3, 2)
    assert volume.data[1, 0, 0, 0] == 1
    with pytest.raises(DataError, match=r"a\.nii: holds 2 volumes, 1 expected; save one 3D volume per file"):
        read_image(path)


def test_channels_in_several_files_must_share_a_grid(tmp_path: Path) -> None:
    a, b = (nifti(tmp_path / f"{n}.nii", np.full((2, 2, 2), v, np.int16)) for n, v in (("a", 1), ("b", 2)))
    assert read_image([a, b]).data[:, 0, 0, 0].tolist() == [1, 2]
    with pytest.raises(GeometryError, match=r"b\.nii.*grids differ"):
        read_image([a, nifti(tmp_path / "b.nii", np.zeros((2, 2, 3), np.int16))])


def test_nan_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", np.array([[[0, np.nan]]], np.float32))
    with pytest.raises(DataError, match=r"a\.nii\.gz: 1 voxels are NaN or infinite; `fewscan check DATA --fix DIR`"):
        read_image(path)


def test_contradicting_forms_are_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((5, 5, 5), np.int16), np.eye(4))
    image.set_sform(np.eye(4), 1)
    image.set_qform(np.diag([-1, 1, 1, 1]), 1)
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(DataError, match=r"sform and qform disagree by 8 mm; .* keeps the sform"):
        read_image(tmp_path / "a.nii")
    assert peek(tmp_path / "a.nii", trust_sform=True).geometry.axis_codes == "RAS"


def test_a_nifti_without_any_form_is_doubted(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.zeros((2, 2, 2), np.int16))
    raw = bytearray(path.read_bytes())
    raw[252:256] = bytes(4)  # both codes
    path.write_bytes(raw)
    assert "left and right" in peek(path).doubts[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1.5], "not whole numbers"),
        ([0, -2], "run from -2"),
        ([0, 70000], "to 70000"),
        ([0, 7], r"labels \[7\] not in the list \[1, 2\]; add them to labels.json"),
    ],
)
def test_odd_labels_are_refused(tmp_path: Path, values: list[float], message: str) -> None:
    path = nifti(tmp_path / "a.nii", np.array(values, np.float32).reshape(1, 1, 2))
    with pytest.raises(DataError, match=message):
        read_labels(path, names={1: "a", 2: "b"})


def test_float_files_of_whole_labels_are_fine_and_the_ignore_value_is_mapped(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.array([0, 1, -1], np.float32).reshape(1, 1, 3))
    assert read_labels(path, names={1: "a"}, ignore=-1).data.ravel().tolist() == [0, 1, IGNORE]


def test_a_truncated_file_is_refused(scans) -> None:
    path = scans.write_image("a.nii.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.nii\.gz"):
        read_image(path)
    raw = scans.write_image("b.nii")
    raw.write_bytes(raw.read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated or damaged: declares 2160 bytes"):
        read_image(raw)


def test_an_absurd_size_is_refused_before_memory_is_taken(scans) -> None:
    path = scans.write_image("a.nii")
    head = bytearray(path.read_bytes())
    head[42:48] = np.array([32767] * 3, "<i2").tobytes()
    (scans.root / "b.nii.gz").write_bytes(gzip.compress(bytes(head)))
    path.write_bytes(head)
    for name in ("a.nii", "b.nii.gz"):
        with pytest.raises(DataError, match="cannot hold them"):
            peek(scans.root / name)


@pytest.mark.parametrize("name", ["a.txt", "missing.nii", "a.hdr"])
def test_what_is_no_image_is_said_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"not an image file; understood are|no such file"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wrong_magic_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"\x89PNG" + b"\0" * 1000)
    with pytest.raises(DataError, match=f"a{suffix}"):
        read_image(tmp_path / f"a{suffix}")


def test_atomic_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")

    def fail() -> None:
        with atomic(tmp_path / "a.json") as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="disk is full"), atomic(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, "no space")


def test_labels_that_cannot_be_written_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run from -1 to 0"):
        write_labelmap(np.array([[[0, -1]]]), tmp_path / "a.nii.gz", native=Geometry((1, 1, 2), np.eye(4)))
    with pytest.raises(DataError, match="cannot be written in this format"):
        write_labelmap(np.zeros((1, 1, 2), int), tmp_path / "a.png", native=Geometry((1, 1, 2), np.eye(4)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("offset", [0, 16, 351])
@pytest.mark.parametrize(("kind", "first"), [(nib.Nifti1Image, 352), (nib.Nifti2Image, 544)])
def test_bytes_of_the_header_are_no_voxels(tmp_path: Path, offset: int, kind: type, first: int) -> None:
    path = tmp_path / "a.nii"
    nib.save(kind(np.arange(1000, dtype=np.int16).reshape(10, 10, 10), np.eye(4)), path)
    assert read_image(path).data[0, 0, 0, 5] == 5
    where, number = (168, "<i8") if kind is nib.Nifti2Image else (108, "<f4")
    raw = bytearray(path.read_bytes())
    raw[where : where + np.dtype(number).itemsize] = np.array(offset, number).tobytes()
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"a\.nii: voxels start at byte {offset}, inside the header of {first}"):
        read_image(path)
