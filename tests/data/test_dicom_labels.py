"""DICOM SEG and RTSTRUCT in: which voxels, which names, which series; and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydicom.uid import RTStructureSetStorage, generate_uid
from series import TRACES, write_series

from fewscan.data import dataset as datasets
from fewscan.data import doctor, repair
from fewscan.data.dicom import describe_series, is_series, read_series
from fewscan.data.dicom_labels import fill, is_label, names_in, read_dicom_labels
from fewscan.data.io import read_labels, write_labelmap
from fewscan.deliver.rtstruct import outlines
from fewscan.errors import DataError, FewscanError, GeometryError
from fewscan.exporting import export
from fewscan.space.geometry import Geometry, ras_geometry

SHAPE = (14, 12, 6)
GRID = Geometry(SHAPE, np.array([[-0.8, 0, 0, 20], [0, -0.8, 0, 30], [0, 0, 2.5, -40], [0, 0, 0, 1]]))
NAMES = {1: "liver", 2: "Left Kidney"}


def labels() -> np.ndarray:
    """Two boxes, in the order of `GRID`."""
    label = np.zeros(SHAPE, np.uint16)
    label[2:6, 3:9, 1:5] = 1
    label[8:12, 2:5, 2:4] = 2
    return label


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_series(tmp_path / "scan", np.arange(np.prod(SHAPE)).reshape(SHAPE) % 300, GRID)


def drawn(scan: Path, out: Path, *, kind: str, names: dict[int, str] = NAMES, label: Any = None) -> Path:
    """A SEG or RTSTRUCT of the boxes."""
    native = describe_series(scan).native
    ordered = labels() if label is None else label
    file = out.with_suffix(".nii.gz")
    (out.parent / "labels.json").write_text(json.dumps({str(v): n for v, n in names.items()}))
    write_labelmap(ordered[::-1, ::-1], file, native=native)  # RAS order of this grid
    export(file, out, kind=kind, source=scan)
    file.unlink()
    (out.parent / "labels.json").unlink()
    return out


def edited(file: Path, edit: Callable[[Any], None]) -> Path:
    item = pydicom.dcmread(file)
    edit(item)
    item.save_as(file)
    return file


# ------------------------------------------------------------------------------------------------------------ contours


def naive(polygon: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Is the centre inside? Count the edges to its left, one pixel and one edge at a time; and is it off all edges?"""
    inside, clear = np.zeros(shape, bool), np.ones(shape, bool)
    for x in range(shape[0]):
        for y in range(shape[1]):
            for (a, b), (c, d) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
                if (b <= y) != (d <= y):
                    edge = a + (y - b) / (d - b) * (c - a)
                    inside[x, y] ^= edge < x
                    clear[x, y] &= abs(edge - x) > 1e-6
    return inside, clear


@given(corners=st.lists(st.tuples(st.floats(-2, 9), st.floats(-2, 9)), min_size=3, max_size=9))
@settings(max_examples=40, deadline=None)
def test_a_polygon_is_filled_where_centres_lie_inside(corners: list[tuple[float, float]]) -> None:
    polygon = np.array(corners) + 0.01  # no corner exactly on a centre
    inside, clear = naive(polygon, (8, 7))
    np.testing.assert_array_equal(fill([polygon], (8, 7))[clear], inside[clear])


@given(mask=arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
@settings(max_examples=150, deadline=None)
def test_outlines_filled_are_the_mask_again(mask: np.ndarray) -> None:
    polygons = [np.round(polygon, 4) for polygon in outlines(mask)]
    np.testing.assert_array_equal(fill(polygons, mask.shape), mask)  # type: ignore[arg-type]


def test_a_hole_is_joined_to_its_surroundings_by_a_keyhole() -> None:
    ring = np.ones((7, 7), bool)
    ring[2:5, 2:5] = False
    ring[3, 3] = True
    polygons = outlines(ring)
    assert len(polygons) == 2  # the ring with its hole in one, and the island
    united = fill(polygons[:1], (7, 7)) | fill(polygons[1:], (7, 7))  # a reader that knows no even-odd rule
    np.testing.assert_array_equal(united, ring)


# ---------------------------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_structures_are_found_by_name_whatever_their_number(scan: Path, tmp_path: Path, kind: str) -> None:
    file = drawn(scan, tmp_path / "labels.dcm", kind=kind)
    assert is_label(file)
    assert names_in(file) == ["liver", "Left Kidney"]
    back = read_dicom_labels(file, source=scan, names={40: "kidney_left", 7: "spleen"})
    assert back.geometry.axis_codes == "RAS"
    np.testing.assert_array_equal(back.data, 40 * (labels() == 2)[::-1, ::-1])
    assert read_dicom_labels(file, source=scan).names == {1: "liver", 2: "Left Kidney"}


@pytest.mark.parametrize("kind", ["LABELMAP", "FRACTIONAL"])
def test_other_kinds_of_segmentation_are_read(scan: Path, tmp_path: Path, kind: str) -> None:
    import highdicom as hd

    series = describe_series(scan)
    code = hd.sr.CodedConcept("10200004", "SCT", "Liver")
    segments = [
        hd.seg.SegmentDescription(n, name, code, code, "MANUAL") for n, name in ((1, "liver"), (2, "Left Kidney"))
    ]
    frames = labels().transpose(2, 1, 0).astype(np.uint8)
    if kind == "FRACTIONAL":
        frames = np.stack([frames == 1, frames == 2], axis=-1) * np.float32(0.8)
        frames[0] = 0.2  # too unlikely to count
    headers = [pydicom.dcmread(f, stop_before_pixels=True) for f in series.files]
    item = hd.seg.Segmentation(
        headers, frames, kind, segments, generate_uid(), 1, generate_uid(), 1, "m", "m", "1", "1"
    )  # fmt: skip
    item.save_as(tmp_path / "other.dcm")
    back = read_dicom_labels(tmp_path / "other.dcm", source=scan)
    np.testing.assert_array_equal(back.data, labels()[::-1, ::-1])


def test_frames_in_another_direction_land_on_the_same_voxels(scan: Path, tmp_path: Path) -> None:
    def turn(item: Any) -> None:
        """Rows from bottom to top: the same places, told otherwise."""
        frames = item.pixel_array[:, ::-1].astype(np.uint8)
        shared = item.SharedFunctionalGroupsSequence[0]
        along = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = [*along[:3], *(-along[3:])]
        for frame in item.PerFrameFunctionalGroupsSequence:
            place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
            frame.PlanePositionSequence[0].ImagePositionPatient = [*(place + along[3:] * 0.8 * (SHAPE[1] - 1))]
        item.PixelData = pydicom.pixels.pack_bits(frames)

    file = edited(drawn(scan, tmp_path / "labels.dcm", kind="dicom-seg"), turn)
    np.testing.assert_array_equal(read_dicom_labels(file, source=scan).data, labels()[::-1, ::-1])


def overlap(share: int) -> Callable[[Any], None]:
    """Move the second structure's contours by whole pixels into the first."""

    def edit(item: Any) -> None:
        for contour in item.ROIContourSequence[1].ContourSequence:
            places = np.array(contour.ContourData, float).reshape(-1, 3) + np.array([0.8 * share, 0, 0])
            contour.ContourData = [f"{v:.4f}" for v in places.ravel()]

    return edit


def test_nested_structures_are_refused_unless_one_is_chosen(scan: Path, tmp_path: Path) -> None:
    file = edited(drawn(scan, tmp_path / "labels.dcm", kind="rtstruct"), overlap(-5))
    with pytest.raises(DataError, match=r"'Left Kidney' lies in 'liver' with \d+ of 24 voxels.*list the wanted"):
        read_dicom_labels(file, source=scan)
    assert read_dicom_labels(file, source=scan, names={3: "LEFT_KIDNEY"}).data.max() == 3


@pytest.mark.parametrize(
    ("kind", "edit", "error", "message"),
    [
        ("dicom-seg", lambda i: setattr(i, "FrameOfReferenceUID", "1.2.3"), GeometryError, "another frame"),
        ("rtstruct", lambda i: setattr(i, "FrameOfReferenceUID", "1.2.3"), GeometryError, "another frame"),
        ("rtstruct", lambda i: shift(i, 1.25), GeometryError, "a contour lies between the slices"),
        ("rtstruct", lambda i: shift(i, 25), GeometryError, "a contour lies outside"),
        ("rtstruct", lambda i: i.StructureSetROISequence[1].__setattr__("ROIName", "LIVER"), DataError, "two struct"),
        ("dicom-seg", lambda i: delattr(i, "PerFrameFunctionalGroupsSequence"), DataError, r"is damaged \(Attribute"),
        ("dicom-seg", lambda i: setattr(i, "PixelData", b"\0\0"), DataError, "is damaged"),
        ("dicom-seg", lambda i: spread(i), GeometryError, "do not lie on those of the series"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_their_series_are_refused(
    scan: Path, tmp_path: Path, kind: str, edit: Any, error: type[FewscanError], message: str
) -> None:
    file = edited(drawn(scan, tmp_path / "labels.dcm", kind=kind), edit)
    with pytest.raises(error, match=message):
        read_dicom_labels(file, source=scan)


def shift(item: Any, mm: float) -> None:
    contour = item.ROIContourSequence[0].ContourSequence[0]
    places = np.array(contour.ContourData, float).reshape(-1, 3) + np.array([0, 0, mm])
    contour.ContourData = [f"{v:.4f}" for v in places.ravel()]


def spread(item: Any) -> None:
    item.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [0.81, 0.81]


def test_labels_need_their_series(scan: Path, tmp_path: Path) -> None:
    file = drawn(scan, tmp_path / "labels.dcm", kind="dicom-seg")
    with pytest.raises(DataError, match=r"labels\.dcm: DICOM labels lie on the slices of a series"):
        read_labels(file)


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_damaged_labels_are_refused_without_a_word_about_the_patient(
    scan: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = drawn(scan, tmp_path / "labels.dcm", kind=kind)
    sound, dice, said = file.read_bytes(), random.Random(1), ""
    for _ in range(60):
        raw = bytearray(sound)
        for _ in range(dice.randint(1, 6)):
            raw[dice.randrange(132, len(raw))] = dice.randrange(256)
        file.write_bytes(raw[: dice.choice([len(raw), dice.randrange(140, len(raw))])])
        try:
            if is_label(file):
                names_in(file)
                read_dicom_labels(file, source=scan)
        except FewscanError as error:
            said += str(error).lower()
    assert said
    assert not [trace for trace in TRACES if trace in said + caplog.text.lower()]


# --------------------------------------------------------------------------------------------------------- data sets


def test_labels_in_the_folder_of_the_slices_are_found_and_no_slices(scan: Path, tmp_path: Path) -> None:
    drawn(scan, tmp_path / "labels.dcm", kind="rtstruct").rename(scan / "AAA")
    assert read_series(scan).data.shape == (1, *SHAPE)
    found = datasets.find(scan)
    assert found.names == {1: "Left Kidney", 2: "liver"}
    case = datasets.load(found.cases[0], found)
    assert case.label is not None
    np.testing.assert_array_equal(case.label.data == 2, (labels() == 1)[::-1, ::-1])
    assert case.label.geometry.shape == ras_geometry(case.image.native).shape


def test_cases_number_the_same_names_alike(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    root.mkdir()
    for name, kind, names in (("p1", "dicom-seg", NAMES), ("p2", "rtstruct", {1: "LIVER", 2: "left-kidney"})):
        folder = write_series(root / name, labels() * 100, GRID)
        drawn(folder, root / f"{name}_seg.dcm", kind=kind, names=names)
    swapped = np.where(labels() > 0, 3 - labels(), 0).astype(np.uint16)
    write_series(root / "p3", labels() * 100, GRID)
    drawn(root / "p3", root / "p3.dcm", kind="dicom-seg", names={1: "Left Kidney", 2: "liver"}, label=swapped)
    found = datasets.find(root)
    assert [case.id for case in found.labelled] == ["p1", "p2", "p3"]
    first, second, third = (datasets.load(case, found).label for case in found.labelled)
    assert first is not None
    assert second is not None
    assert third is not None
    np.testing.assert_array_equal(first.data, second.data)
    np.testing.assert_array_equal(first.data, third.data)
    assert doctor.examine(found).usable


def test_labels_elsewhere_are_found_by_the_series_they_refer_to(tmp_path: Path) -> None:
    root = tmp_path / "archive"
    for patient in ("anna", "bert"):
        folder = write_series(root / patient / "study" / "ct", labels() * 100, GRID)
        (root / patient / "study" / "objects").mkdir()
        drawn(folder, root / patient / "study" / "objects" / f"{patient}.dcm", kind="rtstruct")
        drawn(folder, root / patient / "study" / "objects" / "seg.dcm", kind="dicom-seg")
    assert not is_series(root / "anna" / "study" / "objects")
    found = datasets.find(root)
    assert [case.id for case in found.labelled] == ["anna", "bert"]
    objects = [root / patient / "study" / "objects" for patient in ("anna", "bert")]
    assert [case.label for case in found.cases] == [folder / "seg.dcm" for folder in objects]
    twin = root / "anna" / "study" / "objects" / "twin.dcm"
    twin.write_bytes((twin.parent / "seg.dcm").read_bytes())
    with pytest.raises(DataError, match=r"seg\.dcm and .*twin\.dcm both label the series.*keep one of the two"):
        datasets.find(root)


def test_names_and_numbers_side_by_side_need_a_list(scan: Path, tmp_path: Path) -> None:
    drawn(scan, tmp_path / "scan.dcm", kind="dicom-seg")
    other = write_series(tmp_path / "other", labels() * 100, GRID)
    write_labelmap(labels()[::-1, ::-1], tmp_path / "other_seg.nii.gz", native=describe_series(other).native)
    with pytest.raises(DataError, match=r"scan\.dcm names its labels, .*numbers them; say in labels\.json"):
        datasets.find(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({"1": "liver", "2": "kidney left"}))
    found = datasets.find(tmp_path)
    one, two = (datasets.load(case, found).label for case in found.labelled)
    assert one is not None
    assert two is not None
    np.testing.assert_array_equal(one.data, two.data)


def test_a_repaired_copy_holds_dicom_labels_as_nifti(scan: Path, tmp_path: Path) -> None:
    root = tmp_path / "scans"
    root.mkdir()
    drawn(scan, root / "scan.dcm", kind="rtstruct")
    scan.rename(root / "scan")
    found = datasets.find(root)
    repair.fix(found, doctor.examine(found), out=tmp_path / "copy")
    again = datasets.find(tmp_path / "copy")
    label = datasets.load(again.labelled[0], again).label
    assert label is not None
    np.testing.assert_array_equal(label.data == 2, (labels() == 1)[::-1, ::-1])


def test_a_structure_set_without_contours_labels_nothing(scan: Path, tmp_path: Path) -> None:
    file = drawn(scan, tmp_path / "labels.dcm", kind="rtstruct")
    edited(file, lambda item: [roi.__delattr__("ContourSequence") for roi in item.ROIContourSequence] and None)
    assert pydicom.dcmread(file).SOPClassUID == RTStructureSetStorage
    assert names_in(file) == []
    assert not read_dicom_labels(file, source=scan).data.any()
