"""Label maps from files, numbered as a data set numbers its labels."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data import dicom_labels
from fewscan.data.formats import peek, segments_of
from fewscan.data.masks import is_masks, mask_files
from fewscan.data.painting import lay, plain_name
from fewscan.data.voxels import CHUNK, read_finite
from fewscan.errors import DataError, FewscanError
from fewscan.space.geometry import Geometry, check_same, ras_geometry, to_ras
from fewscan.space.volume import IGNORE, Labelmap


def read_labels(
    path: Path, *, names: Mapping[int, str] | None = None, ignore: int | None = None, source: Path | None = None
) -> Labelmap:
    """Read a label map, its voxel axes in RAS+ order.

    Parameters
    ----------
    path : Path
        File of whole numbers, integer or float; a DICOM SEG or RTSTRUCT; or a folder of masks, one for each structure.
    names : mapping of int to str, optional
        The labels there may be, found by name in a file that `names_itself` if any name fits, else by number; None
        takes every value found and names it as the file does, or else after its number.
    ignore : int, optional
        The file's own value for "not looked at"; becomes `fewscan.space.volume.IGNORE`.
    source : Path, optional
        Image that the labels belong to; DICOM labels need it, since they lie on the slices of its series.

    Raises
    ------
    DataError
        If values are not whole, negative, too large, or not among ``names``; or structures overlap. If a segment has
        the number of a name that no segment has, where others are called as in ``names``.
    """
    path = Path(path)
    if dicom_labels.is_label(path):
        return dicom_labels.read_dicom_labels(path, source=source, names=names)
    if is_masks(path):
        return _merged(path, names)
    segments = _segments(path)
    data, native = read_finite(path, volumes=1)
    label = whole(data[0], path, ignore=ignore)
    if names is not None and segments:
        label = _renumbered(label, segments, names, path=path)
    found = [v for v in label_values(label) if v not in (0, IGNORE)]
    if names is None:
        names = {v: segments.get(v, f"label {v}") for v in found}
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


# ---------------------------------------------------------------------------------------- files that name their labels


def names_itself(path: Path) -> bool:
    """Whether a label file names its structures, so that its numbers, if it has any, are its own.

    Parameters
    ----------
    path : Path
        Label file, or a folder of masks.
    """
    return dicom_labels.is_label(path) or is_masks(path) or bool(segments_of(path))


def names_in(path: Path) -> list[str]:
    """Names of the structures in a label file; none in one for which `names_itself` does not hold.

    Parameters
    ----------
    path : Path
        Label file, or a folder of masks.

    Raises
    ------
    DataError
        If it cannot be read, or two masks are of one structure.
    """
    if dicom_labels.is_label(path):
        return dicom_labels.names_in(path)
    return list(mask_files(path) if is_masks(path) else segments_of(path).values())


def fits(path: Path, names: Mapping[int, str]) -> bool:
    """Whether a label file holds a structure that is called like one of some labels.

    Parameters
    ----------
    path : Path
        Label file, or a folder of masks.
    names : mapping of int to str
        The labels.

    Raises
    ------
    DataError
        As `names_in`.
    """
    return not {plain_name(name) for name in names.values()}.isdisjoint(map(plain_name, names_in(path)))


def left_out(path: Path, names: Mapping[int, str], *, ignore: int | None = None) -> dict[int, str]:
    """Drawn segments, by their own numbers, that `read_labels` takes for background since only others are listed.

    Parameters
    ----------
    path : Path
        Any label file.
    names : mapping of int to str
        The labels that are listed.
    ignore : int, optional
        As for `read_labels`.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    segments, wanted = segments_of(path), {plain_name(name) for name in names.values()}
    lost = {value: name for value, name in segments.items() if plain_name(name) not in wanted}
    if not lost or len(lost) == len(segments):
        return {}
    drawn = read_labels(path, ignore=ignore).names
    return {value: name for value, name in lost.items() if value in drawn}


def numbered(labels: Iterable[Path], *, ignore: int | None = None) -> dict[int, str]:
    """Numbers for the names in label files that name their structures; none where there is no such file.

    They are those of the files, where all agree on them, else those of the order of names. Files that cannot be read,
    which is told elsewhere, and segmentations without a segment have no say.

    Parameters
    ----------
    labels : iterable of Path
        Label files of a data set.
    ignore : int, optional
        As for `read_labels`.

    Raises
    ------
    DataError
        If some files name their structures, and others hold numbers that these do not tell.
    """
    files = list(labels)
    spoken = [file for file in files if names_itself(file)]
    found: dict[str, str] = {}
    numbers: set[tuple[int, str]] = set()
    for file in spoken:
        with contextlib.suppress(DataError):  # told where its voxels are read
            found |= {plain_name(name): name for name in names_in(file)} | found
        numbers |= {(value, plain_name(name)) for value, name in segments_of(file).items()}
    agreed = len(numbers) == len(found) == len(dict(numbers))  # a number for each name, a name for each number
    for other in (file for file in files if spoken and file not in spoken):
        if not _values_of(other, ignore).issubset(dict(numbers) if agreed else ()):
            raise DataError(f"{spoken[0]} names its labels, {other} numbers them; say in labels.json which is which")
    if agreed:
        return {value: found[name] for value, name in sorted(numbers)}
    return dict(enumerate((found[name] for name in sorted(found)), start=1))


def _values_of(path: Path, ignore: int | None) -> set[int]:
    """Labels in a file that numbers them; none where it cannot be read."""
    try:
        return set(read_labels(path, ignore=ignore).names)
    except FewscanError:
        return set()


def _segments(path: Path) -> dict[int, str]:
    """Name of each segment by number; refuses several layers, of which each numbers its segments anew."""
    segments = segments_of(path)
    slicer = bool(segments) or path.name.lower().endswith((".seg.nrrd", ".seg.nhdr"))
    if slicer and (layers := peek(path).channels) > 1:
        raise DataError(
            f"{path}: its segments overlap and lie in {layers} layers; in 3D Slicer's Segmentations module collapse "
            "the binary labelmap layers into one, or export a label map, and save it again"
        )
    return segments


def _renumbered(
    label: NDArray[np.uint16], segments: Mapping[int, str], names: Mapping[int, str], *, path: Path
) -> NDArray[np.uint16]:
    """Numbers of segments that are called like labels as the labels have them; unchanged where none is.

    Other segments become background, unless their number is that of a label which is found nowhere: a name that is
    misspelt, or in another language, would be learnt as absent.
    """
    wanted = {plain_name(name): value for value, name in names.items()}
    known = {value: wanted[plain_name(name)] for value, name in segments.items() if plain_name(name) in wanted}
    if not known:
        return label
    if twice := [value for value in known if list(known.values()).count(known[value]) > 1]:
        raise DataError(f"{path}: two segments are called {segments[twice[0]]!r}; give each its own name")
    lost = {v: name for v, name in segments.items() if v not in known and v in names and v not in known.values()}
    if clash := [v for v in label_values(label) if v in lost] if lost else []:
        raise DataError(
            f"{path}: segment {clash[0]} is called {lost[clash[0]]!r}, and label {clash[0]} of the list "
            f"{names[clash[0]]!r}, as no segment is; give both one name, or another number in labels.json"
        )
    table = np.zeros(IGNORE + 1, np.uint16)
    table[IGNORE] = IGNORE
    table[list(known)] = list(known.values())
    taken: NDArray[np.uint16] = table[label]
    return taken


def _merged(folder: Path, names: Mapping[int, str] | None) -> Labelmap:
    """The masks of a case as one label map; where structures merely touch the smaller one wins."""
    files = mask_files(folder)
    if not files:
        raise DataError(f"{folder}: holds no masks; put a file for each structure there, such as liver.nii.gz")
    wanted = dict(enumerate(files, start=1)) if names is None else dict(names)
    values = {plain_name(name): value for value, name in wanted.items()}
    taken = {(name, values[plain_name(name)]): file for name, file in files.items() if plain_name(name) in values}
    first = next(iter((taken or files).values()))
    grid = ras_geometry(peek(first).geometry)
    masks: dict[tuple[str, int], _Mask] = {}
    for key, file in taken.items():
        mask, own = _mask(file)
        check_same(grid, own, what=f"{first} and {file.name}")
        masks[key] = _packed(mask)
    label = np.zeros(grid.shape, np.uint16)
    for key, packed in sorted(masks.items(), key=lambda pair: -pair[1].count):
        lay(label[packed.box], packed.voxels(), structure=key, among=masks, path=folder)
    return Labelmap(label, grid, wanted)


@dataclass(frozen=True, eq=False)
class _Mask:
    """A mask, a bit for each voxel of the box around it: a hundred of them are held at a time."""

    box: tuple[slice, ...]
    bits: NDArray[np.uint8]
    count: int

    def voxels(self) -> NDArray[np.bool_]:
        shape = tuple(side.stop - side.start for side in self.box)
        return np.unpackbits(self.bits, count=math.prod(shape)).reshape(shape).view(np.bool_)


def _packed(mask: NDArray[np.bool_]) -> _Mask:
    box = []
    for axis in range(mask.ndim):
        held = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(held[0]), int(held[-1]) + 1) if held.size else slice(0, 0))
    inside = mask[tuple(box)]
    return _Mask(tuple(box), np.packbits(inside), int(np.count_nonzero(inside)))


def _mask(file: Path) -> tuple[NDArray[np.bool_], Geometry]:
    """Voxels of one structure in RAS+ order, and their grid; one value beside 0, which is mostly 1."""
    data, native = read_finite(file, volumes=1)
    mask = data[0]
    if mask.dtype.kind not in "iu" or mask.min() < 0 or mask.max() > 1:
        mask = whole(mask, file, ignore=None)
        if len(held := [v for v in label_values(mask) if v]) > 1:
            raise DataError(
                f"{file}: holds labels {held[:5]}, and {file.parent.name}/ holds a mask for each structure; put a "
                "label map beside the scan, as NAME_seg.nii.gz"
            )
    ordered, own = to_ras(mask, native)
    return ordered != 0, own
