"""Studies as a hospital's archive exports them: what lies beside the scans is passed over, or left out and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    BasicTextSRStorage,
    ExplicitVRLittleEndian,
    GrayscaleSoftcopyPresentationStateStorage,
    KeyObjectSelectionDocumentStorage,
    RTDoseStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    XRayRadiationDoseSRStorage,
    generate_uid,
)

from fewscan.data import studies
from fewscan.data.dataset import find
from fewscan.data.dicom import is_series, read_series
from fewscan.data.doctor import examine
from fewscan.data.studies import flaw
from fewscan.errors import DataError
from fewscan.learn.config import Settings
from fewscan.learn.hardware import pick
from fewscan.learn.inputs import find_scans
from fewscan.learn.request import Request
from fewscan.space.geometry import Geometry
from fewscan.training import checked

Slices = Callable[..., Path]


def thing(file: Path, kind: Any, **values: Any) -> None:
    """A DICOM object that is no slice."""
    file.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = kind, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    item = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    item.SOPClassUID, item.SOPInstanceUID, item.SeriesInstanceUID = kind, meta.MediaStorageSOPInstanceUID, "1.2.3"
    for name, value in values.items():
        setattr(item, name, value)
    item.save_as(file)


def capture(file: Path) -> None:
    """A page of a dose report, in colour."""
    thing(
        file, SecondaryCaptureImageStorage, Rows=2, Columns=2, SamplesPerPixel=3, PhotometricInterpretation="RGB",
        PlanarConfiguration=0, BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0, PixelData=b"\0" * 12,
    )  # fmt: skip


def localiser(items: list[Any]) -> None:
    for item in items:
        item.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def planes(items: list[Any]) -> None:
    """Views of three directions, as MR scanners begin with; no header calls them a localiser."""
    for index, item in enumerate(items):
        item.ImageOrientationPatient = [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]][index % 3]


@pytest.mark.parametrize(
    "kind",
    [
        BasicTextSRStorage,
        XRayRadiationDoseSRStorage,
        KeyObjectSelectionDocumentStorage,
        GrayscaleSoftcopyPresentationStateStorage,
        RTDoseStorage,
    ],
)
def test_what_is_no_image_of_a_scan_makes_no_series(slices: Slices, tmp_path: Path, kind: Any) -> None:
    slices("study/ct")
    pixels = {"Rows": 2, "Columns": 2} if kind == RTDoseStorage else {}
    thing(tmp_path / "study/other/1.dcm", kind, **pixels)
    thing(tmp_path / "study/1.dcm", kind, **pixels)
    assert not is_series(tmp_path / "study/other")
    found = examine(find(tmp_path / "study"))
    assert [case.id for case in found.dataset.cases] == ["ct"]
    assert found.usable
    assert [scan.id for scan in find_scans([tmp_path / "study"], channels=["image"])] == ["ct"]


def test_captured_screens_among_the_slices_are_passed_over(slices: Slices) -> None:
    folder = slices()
    capture(folder / "000.dcm")
    assert read_series(folder).data.shape == (1, 4, 5, 6)


@pytest.mark.parametrize("study", ["p1", "patients/p1/study"], ids=["one study", "patients"])
def test_what_is_no_volume_is_left_out_and_named(slices: Slices, tmp_path: Path, study: str) -> None:
    slices(f"{study}/4_ct")
    slices(f"{study}/1_scout", count=1, edit=localiser)
    slices(f"{study}/2_planes", count=9, edit=planes)
    slices(f"{study}/3_test", count=2)
    capture(tmp_path / study / "5_dose" / "1.dcm")
    root = tmp_path / Path(study).parts[0]
    found = examine(find(root))
    [case] = found.dataset.cases
    assert case.images[0].name == "4_ct"
    told = {Path(f.path).name: f.message for f in found.findings if f.code == "series-left-out"}
    assert told == {
        "1_scout": "is left out: the series is a localiser",
        "2_planes": "is left out: the series holds slices of several directions, as localisers do",
        "3_test": "is left out: the series holds 2 slices, too few for a volume",
        "5_dose": "is left out: the series holds images that do not say where they lie, such as captured screens",
    }
    assert {f.severity for f in found.findings} == {"warning"}
    said: list[str] = []
    assert [scan.images for scan in find_scans([root], channels=["image"], say=said.append)] == [case.images]
    assert len(said) == 4
    assert f"warning: {tmp_path / study / '1_scout'} is left out: the series is a localiser; give its folder" in said[0]


def test_a_series_that_is_asked_for_itself_is_not_left_out(slices: Slices, tmp_path: Path) -> None:
    folder = slices("study/planes", count=9, edit=planes)
    slices("study/ct")
    assert [scan.images for scan in find_scans([folder], channels=["image"])] == [(folder,)]
    with pytest.raises(DataError, match="slices differ in direction"):
        read_series(find(folder).cases[0].images[0])
    capture(tmp_path / "dose" / "1.dcm")
    with pytest.raises(DataError, match="colour DICOM is not understood"):
        read_series(tmp_path / "dose")


def test_nothing_is_left_out_where_nothing_else_is_there_or_somebody_labelled_it(slices: Slices, scans: Any) -> None:
    for name in ("a", "b"):
        slices(f"thin/{name}", count=2)
    assert [case.id for case in find(scans.root / "thin").cases] == ["a", "b"]
    slices("one/p1")
    slices("one/p2", count=2)
    assert [case.id for case in find(scans.root / "one").cases] == ["p1"]
    scans.write_label("one/p2_seg.nii.gz")
    assert [case.id for case in find(scans.root / "one").cases] == ["p1", "p2"]


def test_two_series_in_one_folder_are_told_by_their_numbers_and_not_left_out(slices: Slices, tmp_path: Path) -> None:
    slices("study/ct")
    for index, name in enumerate(("study/mixed", "more")):
        slices(name, edit=lambda items, n=index: [setattr(item, "SeriesNumber", n + 1) for item in items])
    for file in (tmp_path / "more").iterdir():
        item = pydicom.dcmread(file)
        item.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        item.save_as(tmp_path / "study/mixed" / f"more-{file.name}")
    data = find(tmp_path / "study")
    assert [case.id for case in data.cases] == ["ct", "mixed"]
    with pytest.raises(DataError, match=r"holds 2 series.*choose one"):
        read_series(data.cases[1].images[0])


def test_a_single_view_of_a_labelled_grid_stays_on_its_own(slices: Slices, scans: Any) -> None:
    folder = slices("p1", count=1, edit=lambda items: [setattr(item, "SliceThickness", 2) for item in items])
    assert read_series(folder).geometry.shape == (4, 5, 1)
    assert isinstance(read_series(folder).native, Geometry)


def refer(file: Path, series: Path) -> None:
    """A segmentation that says no more than which series it is of."""
    item = pydicom.Dataset()
    item.SeriesInstanceUID = pydicom.dcmread(next(series.iterdir())).SeriesInstanceUID
    thing(file, SegmentationStorage, ReferencedSeriesSequence=[item])


@pytest.mark.parametrize("place", ["{}", "{}/study/s1"])
def test_a_thin_series_that_somebody_labelled_is_kept(slices: Slices, tmp_path: Path, place: str) -> None:
    for name in ("p1", "p2", "p4"):
        slices(place.format(name), count=1, edit=lambda items: [setattr(item, "SliceThickness", 2) for item in items])
    slices(place.format("p3"))
    refer(tmp_path / "drawn/any.dcm", tmp_path / place.format("p1"))
    refer(tmp_path / "p2.dcm", tmp_path / place.format("p3"))  # by name; of p3 too, which it refers to
    data = find(tmp_path)
    assert [case.id for case in data.labelled][:2] == ["p1", "p2"]
    assert [case.id for case in data.cases] == ["p1", "p2", "p3"]
    assert data.unused == (tmp_path / place.format("p4"),)
    said: list[str] = []
    assert [scan.id for scan in find_scans([tmp_path], channels=["image"], say=said.append)] == ["p1", "p2", "p3"]
    assert len(said) == 1, "nothing is said of scans that are predicted"
    assert f"warning: {data.unused[0]} is left out" in said[0]


def test_what_is_left_out_is_named_beside_label_maps_too(slices: Slices, scans: Any) -> None:
    slices("study/ct")
    slices("study/scout", count=1, edit=localiser)
    scans.write_label("study/ct_seg.nii.gz")
    said: list[str] = []
    assert [scan.id for scan in find_scans([scans.root / "study"], channels=["image"], say=said.append)] == ["ct"]
    assert [line.partition(";")[0] for line in said] == [
        f"warning: {scans.root / 'study/scout'} is left out: the series is a localiser"
    ]


def test_training_says_which_series_it_leaves_out(slices: Slices, tmp_path: Path) -> None:
    slices("study/ct")
    slices("study/scout", count=1, edit=localiser)
    said: list[Any] = []
    request = Request(
        dataset=find(tmp_path / "study"),
        out=tmp_path / "model",
        method="segment",
        settings=Settings(),
        hardware=pick("cpu"),
        observe=said.append,
    )
    assert len(checked(request)[0].dataset.cases) == 1
    told = [line for line in said if isinstance(line, str)]
    assert told == [f"warning: {tmp_path / 'study/scout'}: is left out: the series is a localiser"]


def test_a_long_series_is_not_judged_by_what_lies_first_in_its_folder(
    slices: Slices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "FEW", 4)
    capture(slices("page") / "+page.dcm")
    assert flaw(tmp_path / "page") == ""
    mixed = slices("mixed")
    for file in slices("scout", count=2, edit=localiser).iterdir():
        file.rename(mixed / f"+{file.name}")
    assert flaw(mixed) == ""
    assert flaw(slices("long", edit=localiser)) == "is a localiser"
