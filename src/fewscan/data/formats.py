"""Parsers of NIfTI-1 and -2, NRRD and MetaImage headers, and the writer of NIfTI-1.

Of what is read only header bytes are looked at, by code of our own where a library's parser may crash on damaged ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fewscan.data.headers import (
    LPS_TO_RAS,
    SUFFIXES,
    TYPES,
    UNREADABLE,
    Header,
    affine_of,
    check,
    dtype_of,
    numbers,
    sibling,
    suffix_of,
    three,
)
from fewscan.errors import DataError, GeometryError
from fewscan.space.geometry import Geometry, largest_gap_mm
from fewscan.space.volume import IGNORE

HEADER_BYTES = 2**20
MRTRIX = (".mif", ".mif.gz", ".mih")
VECTOR = 1007  # NIfTI intent of a vector in each voxel
SYMMETRIC = 1005  # of a symmetric matrix, of which the lower triangle is stored


def peek(path: Path, *, trust_sform: bool = False) -> Header:
    """Read and check the header of one image file.

    Parameters
    ----------
    path : Path
        NIfTI, NRRD or MetaImage.
    trust_sform : bool
        Let the sform of a NIfTI file rule even where the qform contradicts it.

    Raises
    ------
    DataError
        If the file is missing, of another kind, truncated, or declares something impossible.
    """
    nifti = partial(_nifti, trust_sform=trust_sform)
    readers: dict[str, Callable[[Path], Header]]
    readers = {".nii": nifti, ".nii.gz": nifti, ".nrrd": _nrrd, ".nhdr": _nrrd, ".mha": _meta, ".mhd": _meta}
    suffix = suffix_of(path)
    if path.name.lower().endswith(MRTRIX):
        raise DataError(
            f"{path}: MRtrix's own format is not read; convert it: mrconvert {path.name} dwi.nii.gz "
            "-export_grad_fsl dwi.bvec dwi.bval (the last three words for a diffusion scan only)"
        )
    if suffix is None:
        raise DataError(f"{path}: not an image file; understood are {', '.join(SUFFIXES)} and folders of DICOM files")
    try:
        with np.errstate(all="ignore"):
            header = readers[suffix](path)
            check(header, path)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the name") from None
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({error or 'truncated'}); copy or export it again") from None
    except (GeometryError, ValueError, KeyError, IndexError, OverflowError, ArithmeticError) as error:
        raise DataError(f"{path}: the header is damaged ({error}); export the file again") from None
    except HeaderDataError as error:
        raise DataError(f"{path}: the header is damaged ({error}); export the file again") from None
    return header


# ------------------------------------------------------------------------------------------------------------ NIfTI


def _nifti(path: Path, *, trust_sform: bool) -> Header:
    packed = path.name.lower().endswith(".gz")
    with igzip.open(path, "rb") if packed else path.open("rb") as stream:
        head = stream.read(540)
    magics = {348: (nib.Nifti1Header, slice(344, 348), (b"n+1\0",)), 540: (nib.Nifti2Header, slice(4, 8), (b"n+2\0",))}
    for order in ("<", ">"):
        size = int(np.frombuffer(head[:4], f"{order}i4")[0]) if len(head) >= 4 else 0
        if size in magics and len(head) >= size:
            kind, where, magic = magics[size]
            if head[where] not in magic:
                break
            header = kind(head[:size], endianness=order, check=False)
            if trust_sform and header["sform_code"] > 0:
                header["qform_code"] = 0
            return _from_nifti(header, path, packed=packed)
    raise DataError(f"{path}: not a NIfTI file (wrong magic or cut short); copy or export it again")


def _from_nifti(header: nib.Nifti1Header, path: Path, *, packed: bool) -> Header:
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise DataError(f"{path}: declares {dim[0]} axes, 1 to 7 are possible; export it again")
    sizes = [*dim[1 : dim[0] + 1], 1, 1][: max(3, dim[0])]
    extra = [n for n in sizes[3:] if n != 1]
    if len(extra) > 1:
        raise DataError(f"{path}: has {len(sizes)} axes {tuple(sizes)}; save one 3D volume per file")
    code = int(header["datatype"])
    name = nib.nifti1.data_type_codes.dtype[code].name if code in nib.nifti1.data_type_codes.dtype else f"code {code}"
    if name not in TYPES:
        raise DataError(f"{path}: voxels of type {name} are not intensities or labels; save as integer or float")
    affine, doubts = _nifti_affine(header, path, (sizes[0], sizes[1], sizes[2]))
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if not math.isfinite(slope) or slope == 0:  # the standard's "not scaled"
        slope, inter = 1.0, 0.0
    offset, least = float(header["vox_offset"]), int(header["sizeof_hdr"]) + 4  # four bytes say what else is there
    if 0 <= offset < least:
        raise DataError(f"{path}: voxels start at byte {offset:g}, inside the header of {least}; export it again")
    return Header(
        shape=(sizes[0], sizes[1], sizes[2]),
        affine=affine,
        dtype=np.dtype(name).newbyteorder(header.endianness),
        ndim=3 + len(extra),
        channels=extra[0] if extra else 1,
        slope=slope,
        inter=inter if math.isfinite(inter) else 0.0,
        payload=path,
        offset=int(offset) if 0 <= offset < 2**31 else -1,
        encoding="gzip-file" if packed else "raw",
        doubts=doubts,
        triangle=int(header["intent_code"]) == SYMMETRIC,
    )


def _nifti_affine(
    header: nib.Nifti1Header, path: Path, shape: tuple[int, int, int]
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The affine that rules; two that contradict each other are refused."""
    scale = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
    units = np.diag([scale, scale, scale, 1.0])
    sform, qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not sform and not qform:
        doubt = "neither sform nor qform is set, so left and right are only assumed"
        return units @ np.asarray(header.get_base_affine(), float), (doubt,)
    if not sform:
        return units @ np.asarray(header.get_qform(), float), ()
    affine = units @ np.asarray(header.get_sform(), float)
    if qform:
        other = _usable_qform(header, units, shape)
        gap = None if other is None else largest_gap_mm(Geometry(shape, affine), other)
        if gap is not None and gap > 1.0:
            raise DataError(
                f"{path}: sform and qform disagree by {gap:.3g} mm; `fewscan check DATA --fix DIR` keeps the sform"
            )
    return affine, ()


def _usable_qform(header: nib.Nifti1Header, units: NDArray[np.float64], shape: tuple[int, int, int]) -> Geometry | None:
    """The qform's grid; None when it is too damaged to contradict anything."""
    try:
        return Geometry(shape, units @ np.asarray(header.get_qform(), float))
    except (GeometryError, ValueError, ArithmeticError, HeaderDataError):
        return None


# ------------------------------------------------------------------------------------------------- NRRD and MetaImage


def _nrrd(path: Path) -> Header:
    with path.open("rb") as stream:
        head = stream.read(HEADER_BYTES)
    if not re.match(rb"NRRD000\d\r?\n", head):
        raise DataError(f"{path}: not an NRRD file (wrong magic); copy or export it again")
    end = re.search(rb"\r?\n\r?\n", head)
    text = head[: end.start() if end else len(head)].decode("utf-8", "replace")
    lines = (line.split(":", 1) for line in text.splitlines()[1:] if ":" in line and line[0] != "#")
    fields = {k.strip().lower(): v.strip() for k, v in lines if not v.startswith("=")}
    sizes = [int(n) for n in fields["sizes"].split()]
    detached = fields.get("data file") or fields.get("datafile")
    if not detached and end is None:
        raise DataError(f"{path}: the header has no end; copy or export the file again")
    encodings = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
    encoding = encodings.get(fields.get("encoding", "raw").lower())
    if encoding is None:
        raise DataError(f"{path}: encoding {fields['encoding']!r} is not understood; save as raw or gzip")
    if len(sizes) != int(fields["dimension"]):
        raise DataError(f"{path}: {len(sizes)} sizes for dimension {fields['dimension']}; export it again")
    channel, affine, doubts = _nrrd_space(fields, sizes, path)
    order: Literal["<", ">"] = "<" if fields.get("endian", "little").lower() == "little" else ">"
    if int(fields.get("byte skip", 0)) or int(fields.get("line skip", 0)):
        raise DataError(f"{path}: skipped bytes or lines are not understood; save with the voxels in the same file")
    header = Header(
        shape=three([n for axis, n in enumerate(sizes) if axis != channel], path),
        affine=affine,
        dtype=dtype_of(fields["type"], path).newbyteorder(order),
        ndim=3 if channel is None or sizes[channel] == 1 else 4,
        channels=1 if channel is None else sizes[channel],
        channel_first=channel == 0,
        payload=sibling(path, detached) if detached else path,
        offset=0 if detached or end is None else end.end(),
        encoding=encoding,
        doubts=doubts,
    )
    return header


def segments_of(path: Path) -> dict[int, str]:
    """Name of each segment by number, as 3D Slicer writes them into the header; none of any other file.

    Parameters
    ----------
    path : Path
        Any; one that cannot be read is told where its voxels are.
    """
    if suffix_of(path) not in (".nrrd", ".nhdr") or not path.is_file():
        return {}
    try:
        with path.open("rb") as stream:
            head = re.split(rb"\r?\n\r?\n", stream.read(HEADER_BYTES), maxsplit=1)[0].decode("utf-8", "replace")
    except OSError:
        return {}
    told = dict(re.findall(r"(?m)^(Segment\d+_(?:Name|LabelValue)):=(.*?)\s*$", head))
    names = {key.partition("_")[0]: name.strip() for key, name in told.items() if key.endswith("_Name")}
    values = {segment: told.get(f"{segment}_LabelValue", "") for segment in names}
    known = {segment: name for segment, name in names.items() if name and re.fullmatch("[0-9]{1,5}", values[segment])}
    return {int(values[segment]): name for segment, name in known.items() if 0 < int(values[segment]) < IGNORE}


def _nrrd_space(
    fields: dict[str, str], sizes: list[int], path: Path
) -> tuple[int | None, NDArray[np.float64], tuple[str, ...]]:
    """Channel axis if any, affine, doubts."""
    kinds = fields.get("kinds", "").lower().split()
    directions = re.findall(r"none|\([^)]*\)", fields.get("space directions", ""))
    spatial = [a for a in range(len(sizes)) if not (a < len(directions) and directions[a] == "none")]
    if not directions:
        spatial = [a for a in range(len(sizes)) if not (a < len(kinds) and kinds[a] not in ("domain", "space", "???"))]
    if len(sizes) == 4 and len(spatial) == 4:
        spatial = [0, 1, 2]
    channel = next((a for a in range(len(sizes)) if a not in spatial), None)
    if len(spatial) != 3 or channel not in (None, 0, len(sizes) - 1) or len(sizes) - 3 != (channel is not None):
        raise DataError(f"{path}: axes {tuple(sizes)} are not one 3D image; save one 3D volume per file")
    if not directions:
        spacings = [float(s) for s in fields.get("spacings", "").split()] or [math.nan] * len(sizes)
        spacing = [spacings[a] if math.isfinite(spacings[a]) else 1.0 for a in spatial]
        affine = affine_of(LPS_TO_RAS @ np.diag(spacing), np.zeros(3))
        return channel, affine, ("no space directions, so left and right are only assumed",)
    flips = {
        "left-posterior-superior": LPS_TO_RAS,
        "lps": LPS_TO_RAS,
        "right-anterior-superior": np.eye(3),
        "ras": np.eye(3),
        "left-anterior-superior": np.diag([-1.0, 1.0, 1.0]),
        "las": np.diag([-1.0, 1.0, 1.0]),
    }
    space = fields.get("space", "").lower()
    doubts = () if space in flips else ("the space is not named, left-posterior-superior is assumed",)
    flip = flips.get(space, LPS_TO_RAS)
    columns = np.array([numbers(directions[a], 3) for a in spatial]).T
    origin = np.array(numbers(fields.get("space origin", "(0,0,0)"), 3))
    return channel, affine_of(flip @ columns, flip @ origin), doubts


def _meta(path: Path) -> Header:
    with path.open("rb") as stream:
        head = stream.read(HEADER_BYTES)
    end = re.search(rb"ElementDataFile\s*=\s*([^\r\n]*)\r?\n?", head)
    if end is None:
        raise DataError(f"{path}: not a MetaImage file (no ElementDataFile); copy or export it again")
    lines = (line.split("=", 1) for line in head[: end.start()].decode("utf-8", "replace").splitlines() if "=" in line)
    fields = {k.strip(): v.strip() for k, v in lines}
    sizes = [int(n) for n in fields["DimSize"].split()]
    if len(sizes) != int(fields["NDims"]) or len(sizes) not in (2, 3, 4):
        raise DataError(f"{path}: {len(sizes)} sizes for {fields['NDims']} axes; save one 3D volume per file")
    side_by_side, trailing = int(fields.get("ElementNumberOfChannels", 1)), sizes[3] if len(sizes) == 4 else 1
    if min(side_by_side, trailing) > 1:
        raise DataError(f"{path}: channels within a 4D image; save one 3D volume per file")
    affine, doubts = _meta_space(fields, len(sizes))
    big = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")).lower() == "true"
    name = end.group(1).decode("utf-8", "replace").strip()
    local = name == "LOCAL"
    header = Header(
        shape=three(sizes[:3], path),
        affine=affine,
        dtype=dtype_of(fields["ElementType"], path).newbyteorder(">" if big else "<"),
        ndim=3 if side_by_side * trailing == 1 else 4,
        channels=side_by_side * trailing,
        channel_first=side_by_side > 1,
        payload=path if local else sibling(path, name),
        offset=end.end() if local else 0,
        encoding="zlib" if fields.get("CompressedData", "False").lower() == "true" else "raw",
        doubts=doubts,
    )
    if fields.get("BinaryData", "True").lower() != "true" or int(fields.get("HeaderSize", 0)):
        raise DataError(f"{path}: text voxels or skipped bytes are not understood; save as binary")
    return header


def _meta_space(fields: dict[str, str], axes: int) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Affine and doubts; of more than three axes the first three count."""
    turns = [fields[k] for k in ("TransformMatrix", "Rotation", "Orientation") if k in fields]
    offsets = [fields[k] for k in ("Offset", "Position", "Origin") if k in fields]
    spacing, origin, turn = np.ones(max(3, axes)), np.zeros(max(3, axes)), np.eye(max(3, axes))
    spacing[:axes] = numbers(fields.get("ElementSpacing") or fields.get("ElementSize") or "", axes)
    if offsets:
        origin[:axes] = numbers(offsets[0], axes)
    if turns:
        turn[:axes, :axes] = np.reshape(numbers(turns[0], axes**2), (axes, axes)).T  # one row per voxel axis on disk
    affine = affine_of(LPS_TO_RAS @ turn[:3, :3] @ np.diag(spacing[:3]), LPS_TO_RAS @ origin[:3])
    return affine, () if turns else ("no TransformMatrix, so left and right are only assumed",)


def write_nifti(data: NDArray[Any], path: Path, *, native: Geometry, intent: str | None = None) -> None:
    """Write voxels as they are, in NIfTI's order: one volume after the other.

    Parameters
    ----------
    data : (X, Y, Z) or (C, X, Y, Z) number
        In the axis order of ``native``.
    path : Path
        Name in .nii or .nii.gz; not renamed into place, see `fewscan.data.io.atomic`.
    native : Geometry
        Grid of the file.
    intent : str, optional
        Given, the channels are vector components, along the fifth axis, under this intent name.
    """
    with path.open("wb") as file:
        packed = path.name.lower().endswith(".gz")
        stream = igzip.IGzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) if packed else file
        put_nifti(data, stream, native=native, intent=intent)
        if packed:
            stream.close()


def put_nifti(
    data: NDArray[Any],
    stream: IO[bytes],
    *,
    native: Geometry,
    intent: str | None = None,
    scale: tuple[float, float] = (1.0, 0.0),
) -> None:
    """Write a NIfTI file into a stream; its header is fresh and says nothing but type, shape and place.

    Parameters
    ----------
    data : (X, Y, Z) or (C, X, Y, Z) number
        In the axis order of ``native``.
    stream : binary file
        Open for writing.
    native : Geometry
        Grid of the file.
    intent : str, optional
        As for `write_nifti`.
    scale : (2,) float
        Slope and intercept that turn what is stored into what is meant.
    """
    volumes = data if data.ndim == 4 else data[None]
    header = nib.Nifti1Header()
    header.set_data_dtype(data.dtype)
    header.set_data_shape((*native.shape, *((1,) if intent is not None else ()), *data.shape[:-3]))
    if intent is not None:
        header.set_intent(VECTOR, name=intent)
    if scale != (1.0, 0.0):
        header.set_slope_inter(*scale)
    header.set_xyzt_units("mm")
    header.set_sform(native.affine, code=1)
    header.set_qform(native.affine, code=1)
    if not np.allclose(header.get_qform(), native.affine, atol=1e-3):  # a qform cannot hold shear
        header.set_qform(native.affine, code=0)
    header["magic"], header["vox_offset"] = b"n+1", 352
    stream.write(header.binaryblock + b"\0\0\0\0")
    for volume in volumes:
        for index in range(volume.shape[-1]):  # the last axis is the slowest in the file
            stream.write(volume[..., index].tobytes(order="F"))
