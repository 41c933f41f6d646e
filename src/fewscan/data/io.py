"""Images and label maps from files and back; the only place that knows foreign axis orders."""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from fewscan.data import dicom, dicom_labels
from fewscan.data.formats import peek, write_nifti
from fewscan.data.headers import LPS_TO_RAS, UNREADABLE, Header, scaled, suffix_of, with_channels
from fewscan.errors import DataError, ResourceError
from fewscan.space.geometry import Geometry, check_same, from_ras, to_ras
from fewscan.space.volume import IGNORE, Labelmap, Volume

__all__ = [
    "Header",
    "atomic",
    "label_values",
    "peek",
    "read_image",
    "read_labels",
    "read_raw",
    "whole",
    "write_image",
    "write_labelmap",
]

CHUNK = 2**22
FIX = "`fewscan check DATA --fix DIR` writes a repaired copy"


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
    parts = [_read(Path(f), volumes=len(names) if len(files) == 1 else 1) for f in files]
    for file, (_, native) in zip(files[1:], parts[1:], strict=True):
        check_same(parts[0][1], native, what=f"{files[0]} and {file}")
    native = parts[0][1]
    data = parts[0][0] if len(parts) == 1 else np.concatenate([part for part, _ in parts])
    data, geometry = to_ras(data, native)
    return Volume(np.ascontiguousarray(data), geometry, native, names)


def read_labels(
    path: Path, *, names: Mapping[int, str] | None = None, ignore: int | None = None, source: Path | None = None
) -> Labelmap:
    """Read a label map, its voxel axes in RAS+ order.

    Parameters
    ----------
    path : Path
        File of whole numbers, integer or float; or a DICOM SEG or RTSTRUCT.
    names : mapping of int to str, optional
        The labels there may be; None takes every value found and names it after its number.
    ignore : int, optional
        The file's own value for "not looked at"; becomes `fewscan.space.volume.IGNORE`.
    source : Path, optional
        Image that the labels belong to; DICOM labels need it, since they lie on the slices of its series.

    Raises
    ------
    DataError
        If values are not whole, negative, too large, or not among ``names``.
    """
    path = Path(path)
    if dicom_labels.is_label(path):
        return dicom_labels.read_dicom_labels(path, source=source, names=names)
    data, native = _read(path, volumes=1)
    label = whole(data[0], path, ignore=ignore)
    found = [v for v in label_values(label) if v not in (0, IGNORE)]
    if names is None:
        names = {v: f"label {v}" for v in found}
    unknown = [v for v in found if v not in names]
    if unknown:
        raise DataError(
            f"{path}: holds labels {unknown[:8]} not in the list {sorted(names)[:40]}; add them to labels.json"
        )
    ordered, geometry = to_ras(label, native)
    return Labelmap(np.ascontiguousarray(ordered, dtype=np.uint16), geometry, dict(names))


def label_values(label: NDArray[np.uint16]) -> list[int]:
    """Values that occur in a label map, ascending.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        Label map.

    Examples
    --------
    >>> label_values(np.array([[[0, 3], [3, 1]]], dtype=np.uint16))
    [0, 1, 3]
    """
    seen = np.zeros(65536, dtype=bool)
    for part in np.array_split(label, max(1, label.size // CHUNK), axis=-1):  # indexing makes a 64-bit copy of its part
        seen[part.ravel(order="K")] = True
    return [int(v) for v in np.flatnonzero(seen)]


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


# ----------------------------------------------------------------------------------------------------------- reading


def _read(path: Path, *, volumes: int) -> tuple[NDArray[Any], Geometry]:
    """Intensities (C, X, Y, Z) in the file's axis order, and the file's grid; refuses what is not finite."""
    if path.is_file():
        with_channels(peek(path), volumes, path=path)
    data, native = read_raw(path)
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        raise DataError(f"{path}: {int((~np.isfinite(data)).sum())} voxels are NaN or infinite; {FIX}")
    return data, native


def read_raw(path: Path, *, trust_sform: bool = False) -> tuple[NDArray[Any], Geometry]:
    """Intensities and grid as they are in the file, for those who examine and repair it.

    Parameters
    ----------
    path : Path
        File or DICOM folder.
    trust_sform : bool
        Let the sform of a NIfTI file rule even where the qform contradicts it.

    Returns
    -------
    (C, X, Y, Z) number, Geometry
        In the file's own axis order; voxels may be NaN.

    Raises
    ------
    DataError
        If the file cannot be read at all.
    """
    if dicom.on_disk(path).is_dir():
        volume = dicom.read_series(path)
        return from_ras(volume.data, volume.native), volume.native
    header = peek(path, trust_sform=trust_sform)
    data = _voxels(header, path)
    if header.slope != 1 or header.inter != 0:
        data = scaled(data, slope=header.slope, inter=header.inter)
    return data, header.geometry


def _voxels(header: Header, path: Path) -> NDArray[Any]:
    """Stored values (C, X, Y, Z) in this machine's byte order."""
    try:
        with _open(header) as stream:
            raw = _take(stream, header)
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be unpacked ({error or 'truncated'}); copy or export it again") from None
    except MemoryError:
        raise ResourceError(f"{path}: {header.voxel_bytes} bytes of voxels do not fit into memory; crop it") from None
    if len(raw) != header.voxel_bytes:
        raise DataError(
            f"{path}: truncated: {header.voxel_bytes} bytes of voxels declared, {len(raw)} found; copy it again"
        )
    values = np.frombuffer(raw, header.dtype).astype(header.dtype.newbyteorder("="), copy=False)
    if header.channel_first:
        return values.reshape((header.channels, *header.shape), order="F")
    return np.moveaxis(values.reshape((*header.shape, header.channels), order="F"), -1, 0)


def _open(header: Header) -> IO[bytes]:
    if header.encoding == "gzip-file":
        stream: IO[bytes] = igzip.open(header.payload, "rb")
        stream.read(header.offset)
        return stream
    stream = header.payload.open("rb")
    stream.seek(header.offset)
    return stream


def _take(stream: IO[bytes], header: Header) -> bytearray:
    """At most the declared bytes, grown as they come, so that a false size costs no memory."""
    raw, wanted = bytearray(), header.voxel_bytes
    if header.encoding in ("raw", "gzip-file"):
        while len(raw) < wanted and (chunk := stream.read(min(CHUNK, wanted - len(raw)))):
            raw += chunk
        if header.encoding == "gzip-file":
            stream.read(1)  # reaching the end makes the checksum count
        return raw
    unpacker = isal_zlib.decompressobj(wbits=31 if header.encoding == "gzip" else 15)
    pending = b""
    while len(raw) < wanted and not unpacker.eof:
        pending = unpacker.unconsumed_tail or stream.read(CHUNK)
        if not pending:
            break
        raw += unpacker.decompress(pending, min(CHUNK, wanted - len(raw)))
    return raw


def whole(data: NDArray[Any], path: Path, *, ignore: int | None) -> NDArray[np.uint16]:
    """Whole numbers 0 to 65534 as uint16, the file's ignore value as `IGNORE`.

    Parameters
    ----------
    data : number
        Values as read.
    path : Path
        File, for the message.
    ignore : int, optional
        The file's own value for "not looked at".

    Raises
    ------
    DataError
        If values are not whole, negative or too large.
    """
    if data.dtype.kind == "f":
        if not np.isfinite(data).all():
            raise DataError(f"{path}: labels are NaN or infinite; save the label map as whole numbers")
        rounded = np.round(data)
        if float(np.abs(data - rounded).max(initial=0)) > 1e-3:
            raise DataError(f"{path}: labels are not whole numbers; save the label map without interpolation")
        data = rounded
    hidden = None if ignore is None else data == ignore
    seen = data if hidden is None else data[~hidden]
    if seen.size and (seen.min() < 0 or seen.max() > IGNORE - 1):
        raise DataError(
            f"{path}: labels run from {seen.min()} to {seen.max()}, 0 to {IGNORE - 1} are possible; renumber them"
        )
    if hidden is None:
        return data.astype(np.uint16)
    return np.where(hidden, np.uint16(IGNORE), np.where(hidden, 0, data).astype(np.uint16))


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
