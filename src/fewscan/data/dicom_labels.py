"""Labels in DICOM: segmentation objects (SEG) and structure sets (RTSTRUCT), on the grid of the series they belong to.

Both are read with pydicom alone, bit by bit and contour by contour, so that what another program wrote is judged by
the standard and not by the library that writes ours. A voxel belongs to a contour when its centre lies inside it, and
contours of one structure on one slice are combined by the even-odd rule (PS3.3 C.8.8.6.3: holes, by keyhole or as
contours of their own).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid

from fewscan.data.dicom import Series, describe_series, is_series
from fewscan.data.dicom_slices import LABEL_CLASSES, quiet, sop_class
from fewscan.data.headers import LPS_TO_RAS, suffix_of
from fewscan.data.painting import paint, plain_name
from fewscan.errors import DataError, FewscanError, GeometryError
from fewscan.space.geometry import Array, to_ras
from fewscan.space.volume import Labelmap

BESIDE = 0.1  # voxels that a pixel of a SEG may lie beside a voxel of its series
BETWEEN = 0.3  # slices that a contour may lie beside a slice
DEFERRED = 1 << 16  # bytes above which a value, such as pixels that nobody asks for, stays on disk
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def is_label(path: Path) -> bool:
    """Whether a file is a DICOM SEG or RTSTRUCT.

    Parameters
    ----------
    path : Path
        Any path.
    """
    try:
        return suffix_of(path) is None and path.is_file() and sop_class(path) in LABEL_CLASSES
    except OSError:
        return False


def names_in(path: Path) -> list[str]:
    """Names of the structures in a SEG or RTSTRUCT, in its order.

    Parameters
    ----------
    path : Path
        For which `is_label` holds.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    with _opened(path) as item:
        return [name for name, _ in _structures(item)]


def series_of(path: Path) -> frozenset[str]:
    """UIDs of the series that a SEG or RTSTRUCT refers to.

    Parameters
    ----------
    path : Path
        For which `is_label` holds.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    with _opened(path) as item:
        series = list(item.get("ReferencedSeriesSequence") or ())
        for frame in item.get("ReferencedFrameOfReferenceSequence") or ():
            for study in frame.get("RTReferencedStudySequence") or ():
                series += list(study.get("RTReferencedSeriesSequence") or ())
        return frozenset(str(s.get("SeriesInstanceUID", "")) for s in series) - {""}


def belonging(series: Iterable[Path], files: Sequence[Path]) -> dict[Path, Path]:
    """Which SEG or RTSTRUCT belongs to which series, by the series that it refers to.

    Parameters
    ----------
    series : iterable of Path
        Folders.
    files : sequence of Path
        For which `is_label` holds.

    Returns
    -------
    dict of Path to Path
        Folder to label file; a SEG goes before an RTSTRUCT, since it says what each voxel is.

    Raises
    ------
    DataError
        If two of one kind refer to the same series.
    """
    referring = {file: series_of(file) for file in files}
    found: dict[Path, Path] = {}
    for folder in series if files else ():
        try:
            own = describe_series(folder).uid
        except FewscanError:  # told where the image is read
            continue
        mine = [file for file in files if own in referring[file]]
        segs = [file for file in mine if sop_class(file) != uid.RTStructureSetStorage]
        chosen = segs or mine
        if len(chosen) > 1:
            raise DataError(f"{chosen[0]} and {chosen[1]} both label the series in {folder}; keep one of the two")
        if chosen:
            found[folder] = chosen[0]
    return found


def read_dicom_labels(path: Path, *, source: Path | None, names: Mapping[int, str] | None = None) -> Labelmap:
    """Read a SEG or RTSTRUCT on the grid of its series, voxel axes in RAS+ order.

    Parameters
    ----------
    path : Path
        For which `is_label` holds.
    source : Path, optional
        Folder of the series; without it there is no grid to read on, which is refused.
    names : mapping of int to str, optional
        Structures wanted, found by name whatever their case, order of words or separators; None takes all and numbers
        them in the order of the file.

    Raises
    ------
    DataError
        If the file is damaged, two structures share most of one, or the series is missing.
    GeometryError
        If it does not lie on the slices of the series.
    """
    if source is None or not is_series(source):
        raise DataError(f"{path}: DICOM labels lie on the slices of a series; give them as labels of that series")
    series = describe_series(source)
    with _opened(path) as item:
        frame = _frame(item)
        if frame and series.frame_of_reference and frame != series.frame_of_reference:
            raise GeometryError(
                f"{path}: was drawn in another frame of reference than the series in {source}; find the series it is of"
            )
        structures = _structures(item)
        wanted = names if names is not None else {i: name for i, (name, _) in enumerate(structures, start=1)}
        values = {plain_name(name): value for value, name in wanted.items()}
        taken = [(name, number) for name, number in structures if plain_name(name) in values]
        spoken = [plain_name(name) for name, _ in taken]
        twice = sorted({name for name in spoken if spoken.count(name) > 1})
        if twice:
            raise DataError(f"{path}: two structures are called {twice[0]!r}; give each its own name")
        reader = _contours if sop_class(path) == uid.RTStructureSetStorage else _frames
        voxels = reader(item, [number for _, number in taken], series, path)
    found = {(name, values[plain_name(name)]): voxels[n] for name, n in taken}
    painted = paint(found, series.native.shape, path=path)
    data, geometry = to_ras(painted, series.native)
    return Labelmap(np.ascontiguousarray(data, dtype=np.uint16), geometry, dict(wanted))


@contextmanager
def _opened(path: Path) -> Iterator[pydicom.Dataset]:
    """The file; whatever pydicom and its decoders raise becomes one sentence, since their own may quote the header."""
    try:
        with quiet():
            yield pydicom.dcmread(path, defer_size=DEFERRED)
    except FewscanError:
        raise
    except Exception as error:
        raise DataError(f"{path}: is damaged ({type(error).__name__}); export it again") from None


def _structures(item: pydicom.Dataset) -> list[tuple[str, int]]:
    """Name and number of each segment, or of each structure with closed contours."""
    if "SegmentSequence" in item:
        segments = [s for s in item.SegmentSequence if int(s.SegmentNumber) != 0]  # 0: background of a label map
        return [(str(s.get("SegmentLabel") or f"segment {s.SegmentNumber}"), int(s.SegmentNumber)) for s in segments]
    drawn = {
        int(roi.ReferencedROINumber)
        for roi in item.get("ROIContourSequence") or ()
        if any(c.get("ContourGeometricType") in CLOSED for c in roi.get("ContourSequence") or ())
    }
    rois = [r for r in item.get("StructureSetROISequence") or () if int(r.ROINumber) in drawn]
    return [(str(r.get("ROIName") or f"structure {r.ROINumber}"), int(r.ROINumber)) for r in rois]


def _frame(item: pydicom.Dataset) -> str:
    """Frame of reference; empty where there is none, or more than one."""
    listed = {str(f.get("FrameOfReferenceUID") or "") for f in item.get("ReferencedFrameOfReferenceSequence") or ()}
    own = str(item.get("FrameOfReferenceUID") or "")
    return own or (listed.pop() if len(listed) == 1 else "")


def _to_voxels(series: Series) -> tuple[Array, Array]:
    """Matrix and offset from LPS mm to voxel indices of the series."""
    inverse = np.linalg.inv(series.native.affine).astype(np.float64)
    return inverse[:3, :3] @ LPS_TO_RAS, inverse[:3, 3]


# ------------------------------------------------------------------------------------------------------------ SEG


def _frames(
    item: pydicom.Dataset, numbers: Sequence[int], series: Series, path: Path
) -> dict[int, list[NDArray[np.int64]]]:
    """Voxels of each segment, as flat indices of the series' grid, frame by frame."""
    shared = (item.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    half = 1.0
    if item.get("SegmentationType") == "FRACTIONAL":
        half = float(item.MaximumFractionalValue) / 2
    voxels: dict[int, list[NDArray[np.int64]]] = {n: [] for n in numbers}
    groups = item.PerFrameFunctionalGroupsSequence
    for group, pixels in zip(groups, pydicom.pixels.iter_pixels(item), strict=True):
        number = None
        if item.get("SegmentationType") != "LABELMAP":
            segment = _group("SegmentIdentificationSequence", group, shared)
            number = int(segment.ReferencedSegmentNumber)
            if number not in voxels or not pixels.any():
                continue
        rows, columns = np.nonzero(pixels >= half)
        where = _place(group, shared, series, path)
        places = where[0] + columns[:, None] * where[1] + rows[:, None] * where[2]
        if places.size and (places.min() < 0 or (places >= np.array(series.native.shape)).any()):
            raise GeometryError(f"{path}: labels voxels outside the series in {series.folder}; give the whole series")
        flat = np.ravel_multi_index(tuple(places.T), series.native.shape)
        if number is not None:
            voxels[number].append(flat)
        else:
            shown = pixels[rows, columns]
            for n in numbers:
                voxels[n].append(flat[shown == n])
    return voxels


def _group(name: str, frame: pydicom.Dataset, shared: pydicom.Dataset) -> pydicom.Dataset:
    """A functional group of a frame, from where all frames share it if need be."""
    item: pydicom.Dataset = (frame if name in frame else shared)[name].value[0]
    return item


def _place(
    frame: pydicom.Dataset, shared: pydicom.Dataset, series: Series, path: Path
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Voxel of a frame's first pixel, and the steps to the next column and the next row."""
    corner = np.array(_group("PlanePositionSequence", frame, shared).ImagePositionPatient, float)
    along = np.array(_group("PlaneOrientationSequence", frame, shared).ImageOrientationPatient, float).reshape(2, 3)
    spacing = np.array(_group("PixelMeasuresSequence", frame, shared).PixelSpacing, float)
    matrix, offset = _to_voxels(series)
    first = matrix @ corner + offset
    steps = matrix @ along[0] * spacing[1], matrix @ along[1] * spacing[0]
    size = max(series.native.shape)
    if max(np.abs(v - np.round(v)).max() * n for v, n in ((first, 1), (steps[0], size), (steps[1], size))) > BESIDE:
        raise GeometryError(
            f"{path}: its pixels do not lie on those of the series in {series.folder}; find the series it is of"
        )
    first, column, row = (np.round(v).astype(np.int64) for v in (first, *steps))
    return first, column, row


# -------------------------------------------------------------------------------------------------------- RTSTRUCT


def _contours(
    item: pydicom.Dataset, numbers: Sequence[int], series: Series, path: Path
) -> dict[int, list[NDArray[np.int64]]]:
    """Voxels of each structure, as flat indices of the series' grid, slice by slice."""
    matrix, offset = _to_voxels(series)
    columns, rows, slices = series.native.shape
    voxels: dict[int, list[NDArray[np.int64]]] = {n: [] for n in numbers}
    for roi in item.ROIContourSequence:
        number = int(roi.ReferencedROINumber)
        if number not in voxels:
            continue
        drawn: dict[int, list[Array]] = {}
        for contour in roi.get("ContourSequence") or ():
            if contour.get("ContourGeometricType") not in CLOSED:
                continue
            places = np.array(contour.ContourData, float).reshape(-1, 3) @ matrix.T + offset
            level = round(float(places[:, 2].mean()))
            if np.abs(places[:, 2] - level).max() > BETWEEN:
                raise GeometryError(
                    f"{path}: a contour lies between the slices of the series in {series.folder}; "
                    "find the series it was drawn on"
                )
            if not 0 <= level < slices:
                raise GeometryError(f"{path}: a contour lies outside {series.folder}; give the whole series")
            drawn.setdefault(level, []).append(places[:, :2])
        for level, polygons in drawn.items():
            x, y = np.nonzero(fill(polygons, (columns, rows)))
            voxels[number].append(np.ravel_multi_index((x, y, np.full_like(x, level)), series.native.shape))
    return voxels


def fill(polygons: Sequence[Array], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels whose centres lie inside an odd number of polygons.

    Parameters
    ----------
    polygons : sequence of (N, 2) float
        Corners in pixels, closed from the last to the first.
    shape : (X, Y) int
        Of the picture.

    Examples
    --------
    >>> fill([np.array([[0.5, 0.5], [2.5, 0.5], [2.5, 2.5], [0.5, 2.5]])], (4, 4)).astype(int).tolist()
    [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    start = np.concatenate([np.empty((0, 2)), *polygons])
    end = np.concatenate([np.empty((0, 2)), *(np.roll(polygon, -1, axis=0) for polygon in polygons)])
    lower = (start[:, 1] < end[:, 1])[:, None]  # one direction, so that a keyhole's two edges cross at equal places
    start, end = np.where(lower, start, end), np.where(lower, end, start)
    lines = np.ceil([start[:, 1], end[:, 1]]).clip(0, shape[1]).astype(np.int64)
    count = lines[1] - lines[0]  # of pixel centres' lines that an edge crosses
    edge = np.repeat(np.arange(len(start)), count)
    line = lines[0][edge] + np.arange(edge.size) - np.repeat(count.cumsum() - count, count)
    (x, y), (dx, dy) = start[edge].T, (end - start)[edge].T
    first = np.ceil(x + (line - y) * dx / dy).clip(0, shape[0]).astype(np.int64)
    turned = np.zeros((shape[0] + 1, shape[1]), np.int64)
    np.add.at(turned, (first, line), 1)  # every centre beyond the edge changes sides
    inside: NDArray[np.bool_] = turned.cumsum(0)[:-1] % 2 == 1
    return inside
