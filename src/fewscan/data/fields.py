"""Displacement fields on disk: our own convention, and the one that ITK, SimpleITK, ANTs and 3D Slicer read.

Both hold, for each voxel of the fixed image, how far away in mm the moving image is read: the total map, its affine
part included, on the axis order of the fixed image's own file, so that any viewer lays it over that image. "fewscan"
counts towards right, front and head (RAS+) and says so in the intent name; "itk" towards left, back and head (LPS+).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from isal import igzip
from numpy.typing import NDArray

from fewscan.data.formats import VECTOR, peek, write_nifti
from fewscan.data.headers import LPS_TO_RAS, affine_of, suffix_of
from fewscan.data.io import atomic, read_raw
from fewscan.errors import ConfigError, DataError
from fewscan.space import kernels
from fewscan.space.field import Field, from_matrix, warp_array
from fewscan.space.geometry import Geometry, check_same, from_ras, largest_gap_mm, ras_geometry, to_ras

MARK = "fewscan RAS mm"
"""Intent name by which our own files are known."""
DISPLACEMENT = 1006  # NIfTI intents; the standard puts the former in RAS+, and ITK reads it so
SAME = 0.01  # of a voxel: grids that lie no further apart are one

Convention = Literal["fewscan", "itk"]


def write_field(field: Field, path: Path, *, convention: Convention = "fewscan", native: Geometry) -> None:
    """Write a displacement field in float32 mm, whole or not at all.

    Parameters
    ----------
    field : Field
        Total map, on ``ras_geometry(native)``.
    path : Path
        Name in .nii.gz or .nii, or for ITK in .h5.
    convention : {"fewscan", "itk"}
        RAS+ and marked as ours, or LPS+ for other programs.
    native : Geometry
        The fixed image's own grid.

    Raises
    ------
    ConfigError
        If the convention is unknown.
    DataError
        If the suffix does not fit, or the file cannot be written.
    GeometryError
        If the field lies on another grid than the native one.
    """
    path = Path(path)
    _check_convention(convention, "fewscan", "itk")
    suffix = _suffix(path)
    if suffix == ".h5" and convention != "itk":
        raise DataError(f'{path}: only the convention "itk" can be written as .h5; end the name in .nii.gz')
    check_same(field.fixed, ras_geometry(native), what=f"{path}: displacement and fixed image")
    mm = field.millimetres()
    data = from_ras(_swap(mm) if convention == "itk" else mm, native)
    with atomic(path) as part:
        if suffix == ".h5":
            _write_transform(data, part, native=native, path=path)
        else:
            write_nifti(data.astype(np.float32), part, native=native, intent=MARK if convention == "fewscan" else "")


def read_field(path: Path, *, fixed: Geometry, convention: Literal["auto", "fewscan", "itk"] = "auto") -> Field:
    """Read a displacement field onto a grid, linearly if its own is another; beyond its own grid nothing moves.

    Parameters
    ----------
    path : Path
        5D vector NIfTI, or an ITK transform in .h5: displacement field, affine, or several in a row.
    fixed : Geometry
        Grid of the answer, RAS-ordered.
    convention : {"auto", "fewscan", "itk"}
        What the components of a NIfTI file mean; "auto" goes by our mark.

    Raises
    ------
    ConfigError
        If the convention is unknown.
    DataError
        If the file is damaged, no displacement field, not finite, or has nothing in common with the grid.
    """
    path = Path(path)
    _check_convention(convention, "auto", "fewscan", "itk")
    if _suffix(path) == ".h5":
        if convention == "fewscan":
            raise DataError(f'{path}: .h5 files follow the convention "itk"; read it as that')
        mm = _read_transform(path, fixed)
    else:
        own_mm, own = _read_vectors(path, convention)
        mm = _onto(own_mm, own, fixed=fixed, path=path)
    if not np.isfinite(mm).all():
        raise DataError(f"{path}: {int((~np.isfinite(mm)).sum())} displacements are NaN or infinite; export it again")
    matrix = np.linalg.inv(fixed.affine[:3, :3])
    return Field(np.einsum("ij,jxyz->ixyz", matrix, mm).astype(np.float32), fixed)


def _check_convention(convention: str, *known: str) -> None:
    if convention not in known:
        raise ConfigError(f"unknown convention {convention!r} of displacement fields; known are {', '.join(known)}")


def _suffix(path: Path) -> str:
    suffix = ".h5" if path.name.lower().endswith(".h5") else suffix_of(path)
    if suffix not in (".nii.gz", ".nii", ".h5"):
        raise DataError(f"{path}: not the name of a displacement field; it must end in .nii.gz, .nii or .h5")
    return suffix


def _swap(mm: NDArray[Any]) -> NDArray[Any]:
    """RAS+ components to LPS+ or back, (3, X, Y, Z)."""
    swapped: NDArray[Any] = mm * np.diag(LPS_TO_RAS).astype(mm.dtype).reshape(3, 1, 1, 1)
    return swapped


def _onto(mm: NDArray[Any], own: Geometry, *, fixed: Geometry, path: Path) -> NDArray[Any]:
    """The displacement on another grid, mm all along; 0 more than half a voxel beyond its own."""
    if own.shape == fixed.shape and largest_gap_mm(own, fixed) < SAME * min(fixed.spacing):
        return mm
    still = from_matrix(np.eye(4), fixed)
    _check_overlap(still, own, path)
    return warp_array(mm, own, field=still, background=0.0)


def _check_overlap(still: Field, own: Geometry, path: Path) -> None:
    if bool(kernels.outside(torch.from_numpy(still.to_moving(own)), own.shape).all()):
        raise DataError(f"{path}: the displacement field lies nowhere on the fixed image; is it that of another scan?")


# ------------------------------------------------------------------------------------------------------------ NIfTI


def _read_vectors(path: Path, convention: str) -> tuple[NDArray[Any], Geometry]:
    """RAS+ mm (3, X, Y, Z) on the RAS-ordered grid of the file."""
    header = peek(path)
    sizes, intent, name = _intent(path)
    if len(sizes) != 5 or sizes[3] != 1 or intent not in (DISPLACEMENT, VECTOR):
        raise DataError(
            f"{path}: {sizes} voxels with intent {intent} are no displacement field, which is "
            f"(X, Y, Z, 1, 3) with intent {VECTOR} (vector); export it as such"
        )
    if sizes[4] != 3:
        raise DataError(f"{path}: displacements have {sizes[4]} components, 3 are needed; export it again")
    if header.doubts:
        raise DataError(f"{path}: {', '.join(header.doubts)}; export the displacement field again")
    data, native = read_raw(path)
    ours = convention == "fewscan" or (convention == "auto" and name == MARK)
    mm, own = to_ras(data, native)
    return (mm if ours or intent == DISPLACEMENT else _swap(mm)), own


def _intent(path: Path) -> tuple[tuple[int, ...], int, str]:
    """Axis lengths, intent code and intent name of a NIfTI file that `peek` has found sound."""
    with igzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        head = stream.read(540)
    second = head[4:8] == b"n+2\0"
    header = nib.Nifti2Header(head, check=False) if second else nib.Nifti1Header(head[:348], check=False)
    sizes = tuple(int(n) for n in header["dim"][1 : int(header["dim"][0]) + 1])
    return sizes, int(header["intent_code"]), bytes(header["intent_name"].item()).decode("latin-1").rstrip("\0 ")


# ------------------------------------------------------------------------------------------------------- ITK in HDF5


def _itk_grid(geometry: Geometry) -> dict[str, list[float]]:
    """Origin, spacing and direction in LPS+, as ITK names them."""
    matrix = LPS_TO_RAS @ geometry.affine[:3, :3]
    return {
        "origin": (LPS_TO_RAS @ geometry.affine[:3, 3]).tolist(),
        "spacing": list(geometry.spacing),
        "direction": (matrix / np.array(geometry.spacing)).ravel().tolist(),
    }


def _write_transform(data: NDArray[Any], part: Path, *, native: Geometry, path: Path) -> None:
    """LPS+ mm (3, X, Y, Z) in the order of ``native``."""
    import SimpleITK as sitk  # noqa: N813  (its customary name; slow to import and rarely needed)

    image = sitk.GetImageFromArray(data.transpose(3, 2, 1, 0).astype(np.float64), isVector=True)
    grid = _itk_grid(native)
    image.SetOrigin(grid["origin"])
    image.SetSpacing(grid["spacing"])
    image.SetDirection(grid["direction"])
    try:
        sitk.WriteTransform(sitk.DisplacementFieldTransform(image), str(part))
    except RuntimeError as error:
        raise DataError(f"{path}: cannot be written ({_reason(error)}); save as .nii.gz") from None


def _read_transform(path: Path, fixed: Geometry) -> NDArray[Any]:
    """RAS+ mm (3, X, Y, Z) of any ITK transform, sampled on the fixed grid."""
    import SimpleITK as sitk  # noqa: N813

    if not path.is_file():
        raise DataError(f"{path}: no such file; check the name")
    try:
        transform = sitk.ReadTransform(str(path))
        if transform.GetDimension() != 3:
            raise DataError(f"{path}: a transform in {transform.GetDimension()}D, 3D is needed; export it again")
        own = _first_grid(transform)
        if own is not None:
            _check_overlap(from_matrix(np.eye(4), fixed), own, path)
        grid = _itk_grid(fixed)
        image = sitk.TransformToDisplacementField(
            transform, sitk.sitkVectorFloat64, fixed.shape, grid["origin"], grid["spacing"], grid["direction"]
        )
    except RuntimeError as error:
        raise DataError(f"{path}: not a transform that can be read ({_reason(error)}); export it again") from None
    return _swap(sitk.GetArrayFromImage(image).transpose(3, 2, 1, 0))


def _first_grid(transform: Any) -> Geometry | None:
    """Grid of the displacement field that moves a point first; None where an affine map does."""
    import SimpleITK as sitk  # noqa: N813

    transform = transform.Downcast()
    while isinstance(transform, sitk.CompositeTransform) and transform.GetNumberOfTransforms():
        transform = transform.GetNthTransform(transform.GetNumberOfTransforms() - 1).Downcast()  # the last acts first
    if not isinstance(transform, sitk.DisplacementFieldTransform):
        return None
    image = transform.GetDisplacementField()
    x, y, z = image.GetSize()
    matrix = LPS_TO_RAS @ np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    return Geometry((x, y, z), affine_of(matrix, LPS_TO_RAS @ np.array(image.GetOrigin())))


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].removeprefix("sitk::ERROR: ")
