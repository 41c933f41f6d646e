"""Voxels of image files and DICOM series, as they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from fewscan.data import dicom
from fewscan.data.formats import peek
from fewscan.data.headers import UNREADABLE, Header, scaled, with_channels
from fewscan.errors import DataError, ResourceError
from fewscan.space.geometry import Geometry, from_ras

CHUNK = 2**22
FIX = "`fewscan check DATA --fix DIR` writes a repaired copy"


def read_finite(path: Path, *, volumes: int) -> tuple[NDArray[Any], Geometry]:
    """Values (C, X, Y, Z) in the file's axis order, and the file's grid.

    Parameters
    ----------
    path : Path
        File or DICOM folder.
    volumes : int
        That it must hold.

    Raises
    ------
    DataError
        If the file cannot be read, holds another number of volumes, or voxels that are NaN or infinite.
    """
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
