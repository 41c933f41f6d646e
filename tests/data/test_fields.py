"""Displacement fields on disk: round trips, what SimpleITK makes of them, refusals."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (its customary name)
from blobs import blobs, grid, world

from fewscan.data.fields import MARK, read_field, write_field
from fewscan.errors import ConfigError, DataError, GeometryError
from fewscan.space.field import Field, then, warp_array
from fewscan.space.geometry import Array, Geometry, ras_geometry, with_spacing

SHAPE = (9, 12, 10)
LPS = np.array([-1.0, -1.0, 1.0])


def native(kind: str) -> Geometry:
    """Grids that scanners write, all anisotropic, about the world's origin."""
    turns = {
        "RAS": np.eye(3),
        "LPS": np.diag([-1.0, -1.0, 1.0]),
        "PSR": np.array([[0.0, 0, 1], [-1, 0, 0], [0, 1, 0]]),
        "oblique": np.array([[0.0, -0.8, 0.6], [-1.0, 0.0, 0.0], [0.0, 0.6, 0.8]]),
    }
    affine = np.eye(4)
    affine[:3, :3] = turns[kind] @ np.diag([2.0, 1.5, 2.5])
    affine[:3, 3] = (0.3, -0.2, 0.1) - affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return Geometry(SHAPE, affine)


every = pytest.mark.parametrize("kind", ["RAS", "LPS", "PSR", "oblique"])
names = pytest.mark.parametrize(
    ("name", "convention"), [("u.nii.gz", "fewscan"), ("u.nii", "fewscan"), ("u.nii.gz", "itk"), ("u.h5", "itk")]
)


def a_field(fixed: Geometry, *, seed: int = 0) -> Field:
    """Waves and an affine map."""
    rng = np.random.default_rng(seed)
    places = world(fixed) / 10
    mm = np.stack([1.2 * np.sin(np.einsum("i,ixyz->xyz", rng.normal(0, 0.7, 3), places) + i) for i in range(3)])
    u = np.einsum("ij,jxyz->ixyz", np.linalg.inv(fixed.affine[:3, :3]), mm)
    matrix = np.eye(4)
    matrix[:3, :3] += rng.normal(0, 0.03, (3, 3))
    matrix[:3, 3] = 1.0, -2.0, 1.5
    return then(u.astype(np.float32), matrix, fixed=fixed)


def itk_image(data: Array, geometry: Geometry) -> sitk.Image:
    """(X, Y, Z) on any grid as SimpleITK holds it."""
    image = sitk.GetImageFromArray(data.T)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin((LPS * geometry.affine[:3, 3]).tolist())
    image.SetDirection((np.diag(LPS) @ geometry.affine[:3, :3] / np.array(geometry.spacing)).ravel().tolist())
    return image


def itk_transform(path: Path) -> sitk.Transform:
    if path.suffix == ".h5":
        return sitk.ReadTransform(str(path))
    return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))


@every
@names
def test_a_field_comes_back_as_it_was(tmp_path: Path, kind: str, name: str, convention: Any) -> None:
    fixed = ras_geometry(native(kind))
    field = a_field(fixed)
    write_field(field, tmp_path / name, convention=convention, native=native(kind))
    for asked in ("auto", convention):
        found = read_field(tmp_path / name, fixed=fixed, convention=asked)
        np.testing.assert_allclose(found.u, field.u, atol=1e-4)
        assert found.fixed is fixed
    assert [p.name for p in tmp_path.iterdir()] == [name]


@every
@pytest.mark.parametrize("name", ["u.nii.gz", "u.h5"])
def test_simpleitk_maps_points_and_images_as_we_do(tmp_path: Path, kind: str, name: str) -> None:
    fixed, moving = ras_geometry(native(kind)), grid((22, 20, 16), (1.7, 1.6, 2.0), tilt=0.2)
    field = a_field(fixed)
    write_field(field, tmp_path / name, convention="itk", native=native(kind))
    transform = itk_transform(tmp_path / name)
    for index in np.ndindex(*(n // 3 for n in fixed.shape)):
        place = np.array(index) * 3 + 1.0
        start = LPS * (fixed.affine[:3, :3] @ place + fixed.affine[:3, 3])
        reached = np.linalg.inv(fixed.affine) @ np.append(LPS * transform.TransformPoint(start.tolist()), 1)
        ours = place + field.u[(slice(None), *place.astype(int))]
        assert np.abs(reached[:3] - ours).max() < 0.05
    image = blobs(world(moving))
    theirs = sitk.Resample(
        itk_image(image, moving), itk_image(np.zeros(fixed.shape), fixed), transform, sitk.sitkLinear
    )
    found = warp_array(image[None], moving, field=field)[0]
    inner = (slice(2, -2),) * 3
    assert found[inner].std() > 0.2
    np.testing.assert_allclose(found[inner], sitk.GetArrayFromImage(theirs).T[inner], atol=1e-3)


def test_one_voxel_by_hand(tmp_path: Path) -> None:
    affine = np.diag([-1.0, -2.0, 3.0, 1.0])  # the file's axes go to left, back and head
    own = Geometry((4, 3, 2), affine)
    u = np.zeros((3, 4, 3, 2), np.float32)
    u[:, 0, 0, 1] = 10, 20, 30  # the leftmost, hindmost, upper voxel: 10 mm to the right, 40 to the front, 90 up
    for convention, sign in (("fewscan", 1), ("itk", -1)):
        write_field(Field(u, ras_geometry(own)), tmp_path / "u.nii", convention=convention, native=own)  # type: ignore[arg-type]
        image = nib.load(tmp_path / "u.nii")
        data = np.asarray(image.dataobj)
        assert data.shape == (4, 3, 2, 1, 3)
        assert data.dtype == np.float32
        assert data[3, 2, 1, 0].tolist() == [sign * 10.0, sign * 40.0, 90.0]
        assert np.count_nonzero(data) == 3
        assert image.header.get_intent() == ("vector", (), MARK if convention == "fewscan" else "")
        assert image.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(image.affine, affine)


def test_a_sheared_grid_keeps_its_place(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    affine[0, 1] = 0.4
    fixed = Geometry(SHAPE, affine)
    for name, convention in (("u.nii.gz", "fewscan"), ("u.nii.gz", "itk"), ("u.h5", "itk")):
        write_field(a_field(fixed), tmp_path / name, convention=convention, native=fixed)  # type: ignore[arg-type]
        np.testing.assert_allclose(read_field(tmp_path / name, fixed=fixed).u, a_field(fixed).u, atol=1e-4)


@names
def test_a_field_is_brought_onto_another_grid(tmp_path: Path, name: str, convention: Any) -> None:
    own = native("LPS")
    write_field(a_field(ras_geometry(own)), tmp_path / name, convention=convention, native=own)
    finer = with_spacing(ras_geometry(own), (1.0, 1.5, 1.25))
    found = read_field(tmp_path / name, fixed=finer)
    assert found.fixed is finer
    inner = (slice(None), *[slice(2, -2)] * 3)
    np.testing.assert_allclose(found.millimetres()[inner], a_field(finer).millimetres()[inner], atol=0.1)


@pytest.mark.parametrize("name", ["u.nii.gz", "u.h5"])
def test_beyond_its_own_grid_nothing_moves(tmp_path: Path, name: str) -> None:
    own = Geometry((4, 4, 4), np.eye(4))
    write_field(Field(np.ones((3, 4, 4, 4), np.float32), own), tmp_path / name, convention="itk", native=own)
    found = read_field(tmp_path / name, fixed=Geometry((8, 4, 4), np.eye(4)))
    assert found.u[:, :4].min() == pytest.approx(1)
    assert np.abs(found.u[:, 4:]).max() == 0


def test_our_mark_decides_unless_told_otherwise(tmp_path: Path) -> None:
    own = native("RAS")
    write_field(a_field(own), tmp_path / "u.nii.gz", native=own)
    wrong = read_field(tmp_path / "u.nii.gz", fixed=own, convention="itk")
    np.testing.assert_allclose(wrong.millimetres(), LPS.reshape(3, 1, 1, 1) * a_field(own).millimetres(), atol=1e-4)


def test_a_displacement_intent_is_in_ras_as_for_itk(tmp_path: Path) -> None:
    own = native("oblique")
    write_field(a_field(ras_geometry(own)), tmp_path / "u.nii", native=own)
    rewrite(tmp_path / "u.nii", lambda header: header.update(intent_code=1006, intent_name=b""))
    found = read_field(tmp_path / "u.nii", fixed=ras_geometry(own))
    np.testing.assert_allclose(found.u, a_field(ras_geometry(own)).u, atol=1e-4)
    start = (LPS * own.affine[:3, 3]).tolist()
    moved = LPS * (np.array(itk_transform(tmp_path / "u.nii").TransformPoint(start)) - start)
    np.testing.assert_allclose(np.asarray(nib.load(tmp_path / "u.nii").dataobj)[0, 0, 0, 0], moved, atol=1e-3)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_other_layouts_of_nifti_are_read(tmp_path: Path, kind: Any, order: str) -> None:
    own = native("oblique")
    write_field(a_field(ras_geometry(own)), tmp_path / "u.nii", convention="itk", native=own)
    first = nib.load(tmp_path / "u.nii")
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(np.float64).newbyteorder(order))
    header.set_intent("vector")
    nib.save(kind(np.asarray(first.dataobj), first.affine, header), tmp_path / "v.nii.gz")
    found = read_field(tmp_path / "v.nii.gz", fixed=ras_geometry(own))
    np.testing.assert_allclose(found.u, a_field(ras_geometry(own)).u, atol=1e-4)


def test_files_of_simpleitk_are_read(tmp_path: Path) -> None:
    own = native("oblique")
    rng = np.random.default_rng(3)
    vectors = itk_image(np.zeros(SHAPE), own)
    data = rng.normal(0, 1, (*SHAPE[::-1], 3)).astype(np.float32)
    image = sitk.GetImageFromArray(data, isVector=True)
    image.CopyInformation(vectors)
    sitk.WriteImage(image, str(tmp_path / "u.nii.gz"))
    sitk.WriteTransform(
        sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64)), str(tmp_path / "u.h5")
    )
    fixed = ras_geometry(own)
    one, other = (read_field(tmp_path / name, fixed=fixed) for name in ("u.nii.gz", "u.h5"))
    np.testing.assert_allclose(one.u, other.u, atol=1e-4)
    at = np.rint(np.linalg.inv(own.affine) @ fixed.affine @ [2, 3, 4, 1]).astype(int)  # the same voxel in the file
    np.testing.assert_allclose(one.millimetres()[:, 2, 3, 4], LPS * data[at[2], at[1], at[0]], atol=1e-4)


def test_affine_and_composite_transforms_are_sampled(tmp_path: Path) -> None:
    fixed = ras_geometry(native("oblique"))
    turn = sitk.AffineTransform(3)
    turn.Rotate(0, 1, 0.1)
    turn.SetTranslation((2.0, -1.0, 0.5))
    write_field(a_field(fixed), tmp_path / "warp.h5", convention="itk", native=fixed)
    both = sitk.CompositeTransform([turn, sitk.ReadTransform(str(tmp_path / "warp.h5"))])  # the warp acts first
    for transform in (turn, both):
        sitk.WriteTransform(transform, str(tmp_path / "t.h5"))
        found = read_field(tmp_path / "t.h5", fixed=fixed).millimetres()
        for index in ((0, 0, 0), (4, 5, 6), (8, 2, 9)):
            start = LPS * world(fixed)[(slice(None), *index)]
            wanted = LPS * (np.array(transform.TransformPoint(start.tolist())) - start)
            np.testing.assert_allclose(found[(slice(None), *index)], wanted, atol=1e-3)


def test_an_empty_composite_is_the_identity(tmp_path: Path) -> None:
    sitk.WriteTransform(sitk.CompositeTransform(3), str(tmp_path / "t.h5"))
    assert not read_field(tmp_path / "t.h5", fixed=native("RAS")).u.any()


# --------------------------------------------------------------------------------------------------------- refusals


def rewrite(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change header fields of a .nii in place."""
    raw = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    changes: dict[str, Any] = {}
    edit(changes)
    for key, value in changes.items():
        header[key] = value
    path.write_bytes(header.binaryblock + bytes(raw[348:]))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_field(a_field(native("RAS")), tmp_path / "u.nii", native=native("RAS"))
    return tmp_path / "u.nii"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": [4, 9, 12, 10, 3, 1, 1, 1]}, r"\(9, 12, 10, 3\) voxels with intent 1007 are no displacement field"),
        ({"dim": [3, 9, 12, 10, 1, 1, 1, 1]}, r"\(9, 12, 10\) voxels .* export it as such"),
        ({"intent_code": 0}, "intent 0 are no displacement field"),
        ({"dim": [5, 9, 12, 10, 1, 2, 1, 1]}, "have 2 components, 3 are needed"),
        ({"dim": [5, 9, 12, 10, 1, 1, 1, 1]}, "have 1 components, 3 are needed"),
        ({"dim": [5, 9, 12, 10, 2, 3, 1, 1]}, "save one 3D volume per file"),
        ({"dim": [5, 90, 120, 100, 1, 3, 1, 1]}, "truncated"),
        ({"sform_code": 0, "qform_code": 0}, "neither sform nor qform"),
    ],
)
def test_files_of_another_shape_are_refused(written: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(written, lambda header: header.update(changes))
    with pytest.raises(DataError, match=message):
        read_field(written, fixed=native("RAS"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_displacements_that_are_not_finite_are_refused(written: Path, value: float) -> None:
    raw = bytearray(written.read_bytes())
    raw[352 + 40 : 352 + 44] = np.float32(value).tobytes()
    written.write_bytes(raw)
    with pytest.raises(DataError, match="1 displacements are NaN or infinite"):
        read_field(written, fixed=native("RAS"))


def test_an_itk_field_with_nan_is_refused(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.full((3, 3, 3, 3), np.nan), isVector=True)
    sitk.WriteTransform(sitk.DisplacementFieldTransform(image), str(tmp_path / "u.h5"))
    with pytest.raises(DataError, match="NaN or infinite"):
        read_field(tmp_path / "u.h5", fixed=Geometry((3, 3, 3), np.diag([-1.0, -1.0, 1.0, 1.0])))


@pytest.mark.parametrize("name", ["u.nii", "u.nii.gz", "u.h5"])
@pytest.mark.parametrize("left", [0, 10, 400, 0.6, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, name: str, left: float) -> None:
    path = tmp_path / name
    write_field(a_field(native("RAS")), path, convention="itk", native=native("RAS"))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(left * len(raw)) if 0 < left < 1 else int(left)])
    with pytest.raises(DataError, match=name):
        read_field(path, fixed=native("RAS"))


def test_a_file_that_is_not_there_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name in ("u.nii.gz", "u.h5"):
        with pytest.raises(DataError, match="no such file"):
            read_field(tmp_path / name, fixed=native("RAS"))
        (tmp_path / name).write_bytes(gzip.compress(b"not an image") if name.endswith("gz") else b"not a transform")
        with pytest.raises(DataError, match=name):
            read_field(tmp_path / name, fixed=native("RAS"))


def test_names_and_conventions_that_are_not_known_are_refused(tmp_path: Path) -> None:
    own = native("RAS")
    for name in ("u.mha", "u.nrrd", "u.txt", "u"):
        with pytest.raises(DataError, match=r"must end in \.nii\.gz, \.nii or \.h5"):
            write_field(a_field(own), tmp_path / name, native=own)
        with pytest.raises(DataError, match=r"must end in \.nii\.gz, \.nii or \.h5"):
            read_field(tmp_path / name, fixed=own)
    with pytest.raises(DataError, match=r'only the convention "itk" can be written as \.h5'):
        write_field(a_field(own), tmp_path / "u.h5", native=own)
    with pytest.raises(DataError, match='follow the convention "itk"'):
        read_field(tmp_path / "u.h5", fixed=own, convention="fewscan")
    with pytest.raises(ConfigError, match=r"unknown convention 'ants'.*known are fewscan, itk"):
        write_field(a_field(own), tmp_path / "u.nii", convention="ants", native=own)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="known are auto, fewscan, itk"):
        read_field(tmp_path / "u.nii", fixed=own, convention="ants")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["u.nii.gz", "u.h5"])
def test_a_field_of_another_place_is_refused(tmp_path: Path, name: str) -> None:
    own = native("RAS")
    write_field(a_field(own), tmp_path / name, convention="itk", native=own)
    far = own.affine.copy()
    far[:3, 3] += 500
    with pytest.raises(DataError, match="lies nowhere on the fixed image"):
        read_field(tmp_path / name, fixed=Geometry(SHAPE, far))


def test_a_field_on_another_grid_than_the_native_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match="displacement and fixed image"):
        write_field(a_field(native("RAS")), tmp_path / "u.nii.gz", native=native("oblique"))


@names
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, name: str, convention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("sitk::ERROR: no room")

    monkeypatch.setattr(sitk, "WriteTransform", fail)
    monkeypatch.setattr("fewscan.data.fields.nib.Nifti1Header", fail)
    with pytest.raises((DataError, RuntimeError), match="no room"):
        write_field(a_field(native("RAS")), tmp_path / name, convention=convention, native=native("RAS"))
    assert (tmp_path / name).read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [name]
