"""Images and label maps from files and back; the only place that knows foreign axis orders."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from fewscan.data.formats import peek, write_nifti
from fewscan.data.headers import LPS_TO_RAS, Header, suffix_of
from fewscan.data.label_maps import label_values, read_labels, whole
from fewscan.data.voxels import read_finite, read_raw
from fewscan.errors import DataError, ResourceError
from fewscan.space.geometry import Geometry, check_same, from_ras, to_ras
from fewscan.space.volume import IGNORE, Volume

__all__ = [
    "Header",
    "atomic",
    "label_values",
    "peek",
    "read_image",
    "read_labels",
    "read_raw",
    "sha256",
    "whole",
    "write_image",
    "write_labelmap",
]

BLOCK = 1 << 20  # bytes of a file that are read at a time


def read_image(paths: Sequence[Path] | Path, *, channels: Sequence[str] | None = None) -> Volume:
    """Read a scan, its voxel axes in RAS+ order, in the file's own number type where no scaling asks for another.

    Parameters
    ----------
    paths : Path or sequence of Path
        One file or DICOM folder, or one per channel on the same grid.
    channels : sequence of str, optional
        Channel names. A single file with several volumes is read only if as many names are given.

    Raises
    ------
    DataError
        If a file is damaged, ambiguous, 4D without names, or holds NaN or infinite voxels.
    GeometryError
        If the channels lie on different grids.
    """
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not files:
        raise DataError("no image file given; name at least one")
    names = tuple(channels or (("image",) if len(files) == 1 else tuple(f"channel {i}" for i in range(len(files)))))
    if len(files) > 1 and len(files) != len(names):
        raise DataError(f"{files[0]}: {len(files)} files for {len(names)} channels {names}; give one file per channel")
    parts = [read_finite(Path(f), volumes=len(names) if len(files) == 1 else 1) for f in files]
    for file, (_, native) in zip(files[1:], parts[1:], strict=True):
        check_same(parts[0][1], native, what=f"{files[0]} and {file}")
    native = parts[0][1]
    data = parts[0][0] if len(parts) == 1 else np.concatenate([part for part, _ in parts])
    data, geometry = to_ras(data, native)
    return Volume(np.ascontiguousarray(data), geometry, native, names)


def write_labelmap(data: NDArray[np.integer[Any]], path: Path, *, native: Geometry) -> None:
    """Write a label map on its file's own grid, in the smallest unsigned type, whole or not at all.

    Parameters
    ----------
    data : (X, Y, Z) int
        Labels in RAS+ order, on ``ras_geometry(native)``.
    path : Path
        Its suffix decides the format.
    native : Geometry
        Grid to write on.

    Raises
    ------
    DataError
        If the suffix is not understood or labels are negative or too large.
    """
    low, high = (int(data.min()), int(data.max())) if data.size else (0, 0)
    if low < 0 or high > IGNORE:
        raise DataError(f"{path}: labels run from {low} to {high}, only 0 to {IGNORE} can be written; renumber them")
    _write(from_ras(data, native).astype(np.uint8 if high < 256 else np.uint16), Path(path), native)


def write_image(data: NDArray[Any], path: Path, *, native: Geometry) -> None:
    """Write an image on its file's own grid, whole or not at all.

    Parameters
    ----------
    data : (X, Y, Z) or (C, X, Y, Z) number
        Intensities in RAS+ order, on ``ras_geometry(native)``.
    path : Path
        Its suffix decides the format.
    native : Geometry
        Grid to write on.

    Raises
    ------
    DataError
        If the suffix is not understood.
    """
    if data.dtype == np.bool_ or data.dtype == np.float16:
        data = data.astype(np.uint8 if data.dtype == np.bool_ else np.float32)
    _write(from_ras(data, native), Path(path), native)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place once the block has ended without an error.

    Parameters
    ----------
    path : Path
        File to write; its folder is made if need be.

    Raises
    ------
    ResourceError
        If the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".part-", suffix=f"-{path.name}", dir=path.parent)
    except OSError as error:
        raise disk_error(error, path) from None
    os.close(handle)
    part = Path(name)
    try:
        yield part
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except OSError as error:
        raise disk_error(error, path) from error
    except safetensors.SafetensorError as error:
        raise disk_error(_os_error(error, path), path) from error
    finally:
        part.unlink(missing_ok=True)


def _os_error(error: safetensors.SafetensorError, path: Path) -> OSError:
    """What the system said, which safetensors passes on in words only."""
    text = str(error)
    number = int(found[1]) if (found := re.search(r"\(os error (\d+)\)", text)) else errno.EIO
    if sys.platform == "win32":
        return OSError(0, text, str(path), number)
    return OSError(number, os.strerror(number) if found else text, str(path))


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def disk_error(error: OSError, path: Path) -> Exception:
    """What to raise where a file cannot be written; the error itself where there is no better.

    Parameters
    ----------
    error : OSError
        That came of it.
    path : Path
        Of the file.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{path}: the disk is full; free some space or write elsewhere")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR):
        return DataError(f"{path}: cannot be written ({error.strerror}); choose another place")
    return error


# ----------------------------------------------------------------------------------------------------------- writing


def _write(data: NDArray[Any], path: Path, native: Geometry) -> None:
    """Write (X, Y, Z) or (C, X, Y, Z) in the order of ``native``."""
    suffix = suffix_of(path)
    if suffix in (None, ".nhdr", ".mhd"):
        raise DataError(f"{path}: cannot be written in this format; end its name in .nii.gz, .nii, .nrrd or .mha")
    with atomic(path) as part:
        if suffix in (".nii", ".nii.gz"):
            write_nifti(data, part, native=native)
        else:
            _write_itk(data, part, native)


def _write_itk(data: NDArray[Any], path: Path, native: Geometry) -> None:
    import SimpleITK as sitk  # noqa: N813  (its customary name; slow to import and rarely needed)

    flipped = LPS_TO_RAS @ native.affine[:3, :3]
    image = sitk.GetImageFromArray(np.moveaxis(data, 0, -1).transpose(2, 1, 0, 3) if data.ndim == 4 else data.T)
    image.SetSpacing(native.spacing)
    image.SetDirection((flipped / np.array(native.spacing)).ravel().tolist())
    image.SetOrigin((LPS_TO_RAS @ native.affine[:3, 3]).tolist())
    try:
        sitk.WriteImage(image, str(path), True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"{path}: cannot be written ({reason}); save as .nii.gz") from None


def sha256(path: Path) -> str:
    """Hash of a file.

    Parameters
    ----------
    path : Path
        To read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
