"""DICOM-SEG and RTSTRUCT out: the same voxels back, bound to their study, and refused where they cannot be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless
from series import AXIAL, NAMES, PATIENT, SHAPE, anatomy, as_one_file, oblique

from fewscan import api
from fewscan.data.dicom import describe_series
from fewscan.data.dicom_labels import read_dicom_labels
from fewscan.data.io import read_labels, write_labelmap
from fewscan.deliver import dicom_seg, rtstruct
from fewscan.deliver.structures import PRIVATE, structures_of
from fewscan.errors import ConfigError, DataError, FewscanError, GeometryError
from fewscan.exporting import export
from fewscan.space.geometry import Geometry, ras_geometry, to_ras


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
@pytest.mark.parametrize(("grid", "how"), [(AXIAL, {}), (oblique(), {"order": "reversed", "syntax": RLELossless})])
def test_masks_come_back_on_the_same_grid(
    case: Callable[..., tuple[Path, Path]], tmp_path: Path, kind: str, grid: Geometry, how: dict[str, Any]
) -> None:
    folder, file = case(grid, **how)
    report = export(file, tmp_path / "out.dcm", kind=kind, source=folder)
    assert report["dice"] == dict.fromkeys(NAMES.values(), 1.0)
    back = read_dicom_labels(tmp_path / "out.dcm", source=folder, names={int(v): n for v, n in NAMES.items()})
    np.testing.assert_array_equal(back.data, anatomy())
    np.testing.assert_allclose(back.geometry.affine, ras_geometry(describe_series(folder).native).affine)


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
@pytest.mark.parametrize("seed", [None, 2])
def test_a_multi_frame_source_is_referred_to_frame_by_frame(
    case: Callable[..., tuple[Path, Path]], tmp_path: Path, kind: str, seed: int | None
) -> None:
    single, file = case(oblique())
    folder = as_one_file(single, tmp_path / "whole", seed=seed)
    report = export(file, tmp_path / "out.dcm", kind=kind, source=folder)
    assert report["dice"] == dict.fromkeys(NAMES.values(), 1.0)
    item, series = pydicom.dcmread(tmp_path / "out.dcm"), describe_series(folder)
    if kind == "rtstruct":
        contours = [c for roi in item.ROIContourSequence for c in roi.ContourSequence]
        told = [(c.ContourImageSequence[0].ReferencedFrameNumber, c.ContourData[:3]) for c in contours]
    else:
        told = [
            (
                group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber,
                group.PlanePositionSequence[0].ImagePositionPatient,
            )
            for group in item.PerFrameFunctionalGroupsSequence
        ]
    inverse = np.linalg.inv(np.diag([-1, -1, 1, 1]) @ series.native.affine)
    for frame, place in told:
        level = inverse[2, :3] @ np.array(place, float) + inverse[2, 3]
        assert series.frames[round(level)] == frame


def test_a_label_map_in_another_axis_order_is_the_same_label_map(
    case: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, file = case()
    write_labelmap(anatomy(), file, native=ras_geometry(describe_series(folder).native))
    export(file, tmp_path / "out.dcm", kind="dicom-seg", source=folder)
    np.testing.assert_array_equal(read_dicom_labels(tmp_path / "out.dcm", source=folder).data > 0, anatomy() > 0)


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_the_file_says_whose_it_is_what_it_shows_and_what_it_is_for(
    case: Callable[..., tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    folder, file = case()
    export(file, tmp_path / "out.dcm", kind=kind, source=folder)
    item, slices = pydicom.dcmread(tmp_path / "out.dcm"), [pydicom.dcmread(f) for f in folder.iterdir()]
    for tag in (
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
        "StudyDate",
        "AccessionNumber",
        "StudyID",
    ):
        assert str(item[tag].value) == PATIENT[tag], tag
    assert item.StudyInstanceUID == slices[0].StudyInstanceUID
    assert item.SeriesInstanceUID != slices[0].SeriesInstanceUID
    text = str(item)
    assert "research use only" in text
    assert "fewscan" in str(item.Manufacturer)
    marked = {s.SOPInstanceUID for s in slices}
    referred = {str(e.value) for e in item.iterall() if e.keyword == "ReferencedSOPInstanceUID"} & marked
    assert len(referred) >= np.count_nonzero(anatomy().any(axis=(0, 1)))
    codes = {(e.CodeValue, e.CodingSchemeDesignator) for e in coded(item)}
    assert {("10200004", "SCT"), ("64033007", "SCT"), ("7771000", "SCT"), ("my-own-thing", PRIVATE)} <= codes
    if kind == "dicom-seg":
        assert {s.SegmentAlgorithmName for s in item.SegmentSequence} == {"fewscan"}
        algorithm = item.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("fewscan", item.SoftwareVersions)
    else:
        assert {r.ROIGenerationAlgorithm for r in item.StructureSetROISequence} == {"AUTOMATIC"}
        assert item.ApprovalStatus == "UNAPPROVED"


def coded(item: pydicom.Dataset) -> list[pydicom.Dataset]:
    found: list[pydicom.Dataset] = []
    item.walk(lambda data, _: found.append(data) if "CodeValue" in data and data not in found else None)
    return found


def test_what_a_person_drew_is_not_said_to_be_computed(case: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    folder, file = case()
    for kind in ("dicom-seg", "rtstruct"):
        export(file, tmp_path / kind, kind=kind, source=folder, manual=True)
    assert pydicom.dcmread(tmp_path / "dicom-seg").SegmentSequence[0].SegmentAlgorithmType == "MANUAL"
    assert pydicom.dcmread(tmp_path / "rtstruct").StructureSetROISequence[0].ROIGenerationAlgorithm == "MANUAL"


def test_a_writer_that_mirrors_is_caught_and_leaves_nothing(
    case: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = case()
    for module, name, kind in ((dicom_seg, "write_seg", "dicom-seg"), (rtstruct, "write_rtstruct", "rtstruct")):
        sound = getattr(module, name)
        monkeypatch.setattr(module, name, lambda label, *rest, sound=sound, **how: sound(label[::-1], *rest, **how))
        with pytest.raises(DataError, match="came back from the written file with Dice"):
            export(file, tmp_path / "out" / "x.dcm", kind=kind, source=folder)
    assert not list((tmp_path / "out").iterdir())


def lost(folder: Path, _: Path) -> None:
    files = describe_series(folder).files
    files[4].unlink()


def shorter(folder: Path, _: Path) -> None:
    describe_series(folder).files[-1].unlink()


def unbound(folder: Path, _: Path) -> None:
    for file in folder.iterdir():
        item = pydicom.dcmread(file)
        del item.FrameOfReferenceUID
        item.save_as(file)


def unknown(folder: Path, file: Path) -> None:
    write_labelmap(np.where(anatomy() == 9, 12, anatomy()), file, native=describe_series(folder).native)


def empty(folder: Path, file: Path) -> None:
    write_labelmap(np.zeros(SHAPE, np.uint16), file, native=describe_series(folder).native)


def moved(folder: Path, file: Path) -> None:
    grid = describe_series(folder).native
    affine = grid.affine.copy()
    affine[0, 3] += 0.4
    write_labelmap(anatomy(), file, native=Geometry(grid.shape, affine))


def no_spacing(folder: Path, _: Path) -> None:
    file = next(folder.iterdir())
    item = pydicom.dcmread(file)
    del item.PixelSpacing
    item.save_as(file)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lost, DataError, r"series: 5 mm between slices 4 and 5, 2\.5 mm elsewhere.*export the whole series"),
        (shorter, GeometryError, r"p1\.nii\.gz: does not lie on the grid of the series.*\(24, 20, 8\).*\(24, 20, 9\)"),
        (moved, GeometryError, r"does not lie on the grid of the series in .*differ by up to 0\.4 mm"),
        (unbound, DataError, "a slice has no FrameOfReferenceUID, so nothing can be bound to it"),
        (unknown, DataError, r"p1\.nii\.gz: holds labels \[12\] not in the list"),
        (empty, DataError, r"p1\.nii\.gz: holds no labelled voxel"),
        (no_spacing, DataError, "a slice has no PixelSpacing"),
    ],
)
def test_what_cannot_be_bound_is_refused_and_leaves_nothing(
    case: Callable[..., tuple[Path, Path]], tmp_path: Path, spoil: Any, error: type[FewscanError], message: str
) -> None:
    folder, file = case()
    spoil(folder, file)
    with pytest.raises(error, match=message):
        export(file, tmp_path / "out" / "x.dcm", kind="rtstruct", source=folder)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_requests_that_cannot_be_meant_are_refused(
    case: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = case()
    out = tmp_path / "x.dcm"
    for message, asked in {
        "bound to a series; give its folder with --source": {"kind": "dicom-seg"},
        "is not a folder of DICOM slices": {"kind": "rtstruct", "source": tmp_path / "labels"},
        "--as must be one of dicom-seg": {"kind": "dicom"},
        "names no labels": {"kind": "dicom-seg", "source": folder, "names": folder},
        "not readable as JSON": {"kind": "dicom-seg", "source": folder, "names": file},
        r"end it in \.seg\.nrrd": {"kind": "seg-nrrd"},
        "a label map alone is no data set": {"kind": "nnunet"},
        "is not a model folder": {"kind": "onnx"},
    }.items():
        with pytest.raises(FewscanError, match=message):
            export(file, out, **asked)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ConfigError, match='needs the package highdicom; install it with: pip install "highdicom>='):
        export(file, out, kind="dicom-seg", source=folder)
    out.write_text("something else")
    with pytest.raises(ConfigError, match=r"x\.dcm exists, and nothing is overwritten"):
        export(file, out, kind="rtstruct", source=folder)
    assert out.read_text() == "something else"


def test_names_have_the_codes_of_their_anatomy() -> None:
    names = {1: "Left Kidney", 2: "kidney_r", 3: "left ventricle", 4: "vertebrae_L3", 5: "liver tumour", 6: "tumor"}
    found = structures_of(names)
    assert [s.kind.value for s in found[:4]] == ["64033007", "64033007", "87878005", found[3].kind.value]
    assert [s.side.meaning if s.side else "" for s in found] == ["Left", "Right", "", "", "", ""]
    assert found[3].kind.meaning == "L3 vertebra"
    assert (found[4].kind.scheme, found[4].category.value) == (PRIVATE, "49755003")
    assert (found[5].kind.value, found[5].category.value) == ("108369006", "49755003")
    assert len({s.colour for s in structures_of({i: str(i) for i in range(1, 60)})}) == 59
    long = structures_of({1: "a very long name of a structure", 2: "a very long name of another"})
    assert len({s.kind.value for s in long}) == 2
    assert all(len(s.kind.value) <= 16 for s in long)


# ------------------------------------------------------------------------------------------------- programs of others


def needs(program: str) -> pytest.MarkDecorator:
    reason = f"{program} is not installed: scripts/install_dicom_tools"
    return pytest.mark.skipif(shutil.which(program) is None, reason=reason)


@needs("dciodvfy")
@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_the_validator_finds_no_error(case: Callable[..., tuple[Path, Path]], tmp_path: Path, kind: str) -> None:
    folder, file = case(oblique())
    export(file, tmp_path / "out.dcm", kind=kind, source=folder)
    done = subprocess.run(["dciodvfy", str(tmp_path / "out.dcm")], capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert {"dicom-seg": "Segmentation", "rtstruct": "RTStructureSet"}[kind] in lines
    assert not [line for line in lines if line.startswith(("Error", "Abort"))]


@needs("plastimatch")
def test_plastimatch_fills_the_contours_alike(case: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    folder, file = case()
    export(file, tmp_path / "out.dcm", kind="rtstruct", source=folder)
    words = ["--input", tmp_path / "out.dcm", "--fixed", file, "--output-prefix", tmp_path / "masks"]
    command = ["plastimatch", "convert", *map(str, words), "--prefix-format", "nrrd"]
    subprocess.run(command, check=True, capture_output=True)
    for value, name in NAMES.items():
        mask = read_labels(tmp_path / "masks" / f"{name}.nrrd").data
        np.testing.assert_array_equal(mask > 0, anatomy() == int(value))


def test_highdicom_reads_the_segments_on_the_slices(case: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    import highdicom as hd

    folder, file = case(order="reversed")
    export(file, tmp_path / "out.dcm", kind="dicom-seg", source=folder)
    seg = hd.seg.segread(tmp_path / "out.dcm")
    series = describe_series(folder)
    slices = [pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID for f in series.files]
    frames = seg.get_pixels_by_source_instance(
        slices, combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
    )
    numbers = {seg.get_segment_description(n).segment_label: n for n in seg.segment_numbers}
    ordered = to_ras(frames.transpose(2, 1, 0), series.native)[0]
    for value, name in NAMES.items():
        np.testing.assert_array_equal(ordered == numbers[name], anatomy() == int(value))


@pytest.mark.parametrize(("kind", "place"), [("dicom-seg", "p1_seg.dcm"), ("rtstruct", "p1/rt.dcm")])
def test_dicom_labels_are_a_reference_too(
    case: Callable[..., tuple[Path, Path]], tmp_path: Path, kind: str, place: str
) -> None:
    folder, file = case()
    study, out = tmp_path / "study", tmp_path / "run" / "predictions"
    study.mkdir()
    folder = folder.rename(study / "p1")
    export(file, study / place, kind=kind, source=folder)
    out.mkdir(parents=True)
    wrong = np.where(anatomy() == 4, 0, anatomy())
    write_labelmap(wrong, out / "p1.nii.gz", native=describe_series(folder).native)
    with pytest.raises(DataError, match=r"nothing says which number each has .* put a labels.json beside"):
        api.evaluate(out, study)
    record = {"predictions": [{"id": "p1", "path": "p1.nii.gz"}], "labels": NAMES}
    (out / "predictions.json").write_text(json.dumps(record))
    found = api.evaluate(out, study)
    assert {n: score.dice for n, score in found.cases[0].labels.items()} == {
        "liver": 1.0,
        "kidney_left": 0.0,
        "my own thing": 1.0,
    }
    found.save(tmp_path / "run" / "evaluation.json")
    page = api.report(tmp_path / "run", tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<path class="reference' in page
    alone = study / place
    with pytest.raises(DataError, match="give the folder of series by --images"):
        api.evaluate(out / "p1.nii.gz", alone)
    assert api.evaluate(out / "p1.nii.gz", alone, images=folder).values("dice") == found.values("dice")
