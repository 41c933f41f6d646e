"""What a file says about itself: shape, type, place in space, and where its voxels lie.

Every size is checked against the file before anybody allocates memory for it, so a damaged or hostile header costs a
`DataError` and nothing else.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from isal.igzip_lib import IsalError
from numpy.typing import NDArray

from fewscan.errors import DataError
from fewscan.space.geometry import Geometry

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
LONGEST_AXIS = 2**15
GZIP_RATIO = 1032  # deflate cannot shrink by more
SPACING_MM = (1e-3, 1e3)
UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, IsalError)  # type: ignore[assignment]
"""What reading or unpacking a damaged file raises."""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
TYPES = {
    "uint8": "u1 uchar unsigned_char uint8_t MET_UCHAR",
    "int8": "i1 char signed_char int8_t MET_CHAR",
    "uint16": "u2 ushort unsigned_short unsigned_short_int uint16_t MET_USHORT",
    "int16": "i2 short short_int signed_short signed_short_int int16_t MET_SHORT",
    "uint32": "u4 uint unsigned_int uint32_t MET_UINT",
    "int32": "i4 int signed_int int32_t MET_INT",
    "uint64": "u8 ulonglong unsigned_long_long uint64_t MET_ULONG_LONG",
    "int64": "i8 longlong long_long int64_t MET_LONG_LONG",
    "float32": "f4 float MET_FLOAT",
    "float64": "f8 double MET_DOUBLE",
}
DTYPES = {alias: name for name, aliases in TYPES.items() for alias in (name, *aliases.split())}


@dataclass(frozen=True, eq=False)
class Header:
    """What a file declares, checked for sense.

    Parameters
    ----------
    shape : (X, Y, Z) int
        Voxels along each spatial axis, in the file's order.
    affine : (4, 4) float
        Voxel to RAS+ mm.
    dtype : dtype
        Type on disk, with its byte order.
    ndim : int
        Number of axes longer than one, at least 3.
    payload : Path
        File that holds the voxels.
    channels : int
        Values per voxel.
    channel_first : bool
        Whether the values of one voxel lie side by side on disk.
    slope, inter : float
        What turns stored values into intensities.
    offset : int
        Bytes before the first voxel, after decompression where the whole file is compressed.
    encoding : {"raw", "gzip-file", "gzip", "zlib"}
        How the voxels are packed.
    doubts : tuple of str
        What the header leaves open, in words; empty for a good one.
    triangle : bool
        Whether the values of a voxel are said to be the lower triangle of a symmetric matrix, row by row.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    dtype: np.dtype[np.generic]
    ndim: int
    payload: Path
    channels: int = 1
    channel_first: bool = False
    slope: float = 1.0
    inter: float = 0.0
    offset: int = 0
    encoding: str = "raw"
    doubts: tuple[str, ...] = ()
    triangle: bool = False

    @property
    def voxel_bytes(self) -> int:
        """Bytes of all voxels, unpacked."""
        return math.prod(self.shape) * self.channels * self.dtype.itemsize

    @property
    def geometry(self) -> Geometry:
        """Grid of the file, in its own axis order."""
        return Geometry(self.shape, self.affine)


def suffix_of(path: Path) -> str | None:
    """The image suffix of a file name, in lower case; None for another kind of file.

    Parameters
    ----------
    path : Path
        Any path.

    Examples
    --------
    >>> suffix_of(Path("scan.NII.GZ"))
    '.nii.gz'
    """
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s) and len(name) > len(s)), None)


def check_sizes(lengths: tuple[int, ...], path: Path) -> None:
    """Refuse axis lengths that cannot be.

    Parameters
    ----------
    lengths : tuple of int
        Voxels along each axis, and values per voxel.
    path : Path
        File, for the message.

    Raises
    ------
    DataError
        If a length is below one or absurdly large.
    """
    if min(lengths) < 1 or max(lengths) > LONGEST_AXIS:
        raise DataError(
            f"{path}: declares {lengths} voxels, 1 to {LONGEST_AXIS} per axis are possible; export it again"
        )


def check(header: Header, path: Path) -> None:
    """Refuse sizes, types and places that cannot be.

    Parameters
    ----------
    header : Header
        As declared.
    path : Path
        File, for the message.

    Raises
    ------
    DataError
        If the declared image is impossible or larger than the file can hold.
    """
    check_sizes((*header.shape, header.channels), path)
    spacing = header.geometry.spacing
    if not all(SPACING_MM[0] <= s <= SPACING_MM[1] for s in spacing):
        raise DataError(f"{path}: declares voxels of {spacing} mm, which cannot be; correct the header")
    if not (math.isfinite(header.slope) and math.isfinite(header.inter)):
        raise DataError(f"{path}: intensity scale {header.slope}, {header.inter} is not finite; correct the header")
    if header.offset < 0:
        raise DataError(f"{path}: voxels start at byte {header.offset}, which cannot be; export it again")
    size = header.payload.stat().st_size
    limit = size - header.offset
    if header.encoding != "raw":
        limit = size * GZIP_RATIO
    if header.voxel_bytes > limit:
        raise DataError(
            f"{path}: truncated or damaged: declares {header.voxel_bytes} bytes of voxels, "
            f"{size} bytes in the file cannot hold them; copy or export it again"
        )


def affine_of(matrix: NDArray[np.float64], origin: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 4 x 4 form of a matrix and an origin.

    Parameters
    ----------
    matrix : (3, 3) float
        One column per voxel axis, mm.
    origin : (3,) float
        Place of the first voxel, mm.
    """
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix, origin
    return affine


def three(sizes: list[int], path: Path) -> tuple[int, int, int]:
    """Exactly three axis lengths; a 2D image gets a third of one.

    Parameters
    ----------
    sizes : list of int
        Spatial axis lengths.
    path : Path
        File, for the message.

    Raises
    ------
    DataError
        If there are more or fewer.
    """
    if len(sizes) == 2:
        sizes = [*sizes, 1]
    if len(sizes) != 3:
        raise DataError(f"{path}: axes {tuple(sizes)} are not one 3D image; save one 3D volume per file")
    return sizes[0], sizes[1], sizes[2]


def dtype_of(name: str, path: Path) -> np.dtype[np.generic]:
    """The number type behind its name in NRRD or MetaImage.

    Parameters
    ----------
    name : str
        As the header writes it.
    path : Path
        File, for the message.

    Raises
    ------
    DataError
        If it is not a plain integer or float type.
    """
    key = re.sub(r"\s+", "_", name.strip())
    if key not in DTYPES and key.lower() not in DTYPES:
        raise DataError(f"{path}: voxels of type {name!r} are not understood; save as integer or float")
    return np.dtype(DTYPES.get(key) or DTYPES[key.lower()])


def numbers(text: str, count: int) -> list[float]:
    """Exactly this many numbers from a header field; a ValueError otherwise.

    Parameters
    ----------
    text : str
        Numbers between spaces, commas or brackets.
    count : int
        How many are needed.

    Examples
    --------
    >>> numbers("(0.5,0,2)", 3)
    [0.5, 0.0, 2.0]
    """
    values = [float(v) for v in re.split(r"[\s,()]+", text.strip()) if v]
    if len(values) != count:
        raise ValueError(f"{count} numbers expected, got {text[:80]!r}")
    return values


def sibling(path: Path, name: str) -> Path:
    """The detached voxel file, which must lie beside its header.

    Parameters
    ----------
    path : Path
        The header file.
    name : str
        What it says about the voxel file.

    Raises
    ------
    DataError
        If that is not the name of one file in the same folder.
    """
    if not re.fullmatch(r"[^/\\%\s][^/\\%]*", name) or name in (".", "..", "LIST"):
        raise DataError(f"{path}: voxel file {name[:80]!r} is not one file beside the header; save into a single file")
    return path.parent / name


def with_channels(header: Header, channels: int, *, path: Path) -> Header:
    """The header, if it has this many channels.

    Parameters
    ----------
    header : Header
        As read from ``path``.
    channels : int
        Number of values per voxel that the caller expects.
    path : Path
        File, for the message.

    Raises
    ------
    DataError
        If the file holds another number.
    """
    if header.channels != channels:
        raise DataError(
            f"{path}: holds {header.channels} volumes, {channels} expected; save one 3D volume per file, "
            "or name the channels in dataset.json"
        )
    return replace(header, ndim=3 if channels == 1 else 4)


def scaled(data: NDArray[Any], *, slope: float, inter: float) -> NDArray[Any]:
    """Stored values to intensities: integers stay integers while slope and intercept allow it.

    Parameters
    ----------
    data : number
        Stored values.
    slope, inter : float
        ``data * slope + inter``.

    Examples
    --------
    >>> scaled(np.array([0, 1024], dtype=np.uint16), slope=1.0, inter=-1024.0)
    array([-1024,     0], dtype=int16)
    """
    if data.dtype.kind in "iu" and slope == 1 and float(inter).is_integer() and data.size:
        low, high = int(data.min()) + int(inter), int(data.max()) + int(inter)
        for kind in (np.int16, np.int32):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return (data.astype(np.int64 if kind is np.int32 else np.int32) + int(inter)).astype(kind)
    with np.errstate(over="ignore", invalid="ignore"):
        return data.astype(np.float32) * np.float32(slope) + np.float32(inter)
