"""Export to other programs, and where the patient must not appear."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from series import AXIAL, NAMES, TRACES, anatomy, oblique, write_series
from typer.testing import CliRunner

from fewscan import api, cli
from fewscan.data import dataset as datasets
from fewscan.data.bundles import SEGMENTATIONS, write_bundles
from fewscan.data.dicom import describe_series
from fewscan.data.io import read_labels, write_labelmap
from fewscan.exporting import export


def test_slicer_gets_names_colours_and_the_grid(case: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    import SimpleITK as sitk  # noqa: N813

    _, file = case(oblique())
    out = tmp_path / "p1.seg.nrrd"
    export(file, out, kind="seg-nrrd")
    image, original = sitk.ReadImage(str(out)), sitk.ReadImage(str(file))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(original))
    for theirs, ours in ((image.GetOrigin(), original.GetOrigin()), (image.GetDirection(), original.GetDirection())):
        np.testing.assert_allclose(theirs, ours, atol=1e-5)
    segments = {image.GetMetaData(f"Segment{i}_Name"): image.GetMetaData(f"Segment{i}_LabelValue") for i in range(3)}
    assert segments == {name: value for value, name in NAMES.items()}
    assert len({image.GetMetaData(f"Segment{i}_Color") for i in range(3)}) == 3
    assert "SCT^10200004^Liver" in image.GetMetaData("Segment0_Tags")
    assert image.GetMetaData("Segment2_Extent") == " ".join(map(str, voxel_of(image, 9)))
    np.testing.assert_array_equal(read_labels(out).data, anatomy())


def voxel_of(image: Any, value: int) -> list[int]:
    import SimpleITK as sitk  # noqa: N813

    z, y, x = (int(axis[0]) for axis in np.nonzero(sitk.GetArrayFromImage(image) == value))
    return [x, x, y, y, z, z]


def test_nnunet_gets_consecutive_labels_and_an_ignore_value(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    for name in ("a", "b", "c"):
        label = anatomy()
        write_labelmap((label * 10).astype(np.uint16), root / "images" / f"{name}.nii.gz", native=AXIAL)
        if name != "c":
            label[:, :, 0] = 200
            write_labelmap(label, root / "labels" / f"{name}.nii.gz", native=AXIAL)
    (root / "labels.json").write_text(json.dumps({**NAMES, "200": "ignore"}))
    export(root, tmp_path / "Dataset007_Thing", kind="nnunet")
    out = tmp_path / "Dataset007_Thing"
    listed = json.loads((out / "dataset.json").read_text())
    assert listed["labels"] == {"background": 0, "liver": 1, "kidney_left": 2, "my own thing": 3, "ignore": 4}
    assert (listed["numTraining"], listed["channel_names"], listed["file_ending"]) == (2, {"0": "image"}, ".nii.gz")
    assert sorted(p.name for p in out.rglob("*.nii.gz")) == [
        "a.nii.gz",
        "a_0000.nii.gz",
        "b.nii.gz",
        "b_0000.nii.gz",
        "c_0000.nii.gz",
    ]
    values = np.asanyarray(nib.load(out / "labelsTr" / "a.nii.gz").dataobj)
    assert sorted(np.unique(values)) == [0, 1, 2, 3, 4]
    first, again = datasets.find(root), datasets.find(out)
    ours, theirs = (datasets.load(found.labelled[0], found) for found in (first, again))
    assert ours.label is not None
    assert theirs.label is not None
    np.testing.assert_array_equal(ours.image.data, theirs.image.data)
    spoken = [np.vectorize({0: "", 65535: "?"}.__or__(dict(c.label.names)).get)(c.label.data) for c in (ours, theirs)]
    np.testing.assert_array_equal(*spoken)


def test_one_case_becomes_an_nnunet_data_set(case: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    folder, file = case()
    export(file, tmp_path / "out", kind="nnunet", source=folder)
    found = datasets.find(tmp_path / "out")
    assert found.names == {1: "liver", 2: "kidney_left", 3: "my own thing"}
    assert [c.id for c in found.labelled] == ["p1"]


def test_bids_derivatives_are_found_as_labels_again(tmp_path: Path) -> None:
    root, masks = tmp_path / "bids", tmp_path / "predictions"
    for name in ("sub-01", "sub-02_ses-1"):
        folder = root / name.split("_")[0] / "anat"
        write_labelmap((anatomy() * 3).astype(np.uint16), folder / f"{name}_T1w.nii.gz", native=AXIAL)
        write_labelmap(anatomy(), masks / f"{name}_T1w.nii.gz", native=AXIAL)
    (masks / "labels.json").write_text(json.dumps(NAMES))
    export(masks, root / "derivatives" / "fewscan", kind="bids")
    out = root / "derivatives" / "fewscan"
    described = json.loads((out / "dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative"
    assert described["GeneratedBy"][0]["Name"] == "fewscan"
    found = datasets.find(root)
    assert found.layout == "BIDS"
    assert dict(found.names) == {int(v): n for v, n in NAMES.items()}
    assert [c.id for c in found.labelled] == ["sub-01", "sub-02_ses-1"]
    label = datasets.load(found.cases[1], found).label
    assert label is not None
    np.testing.assert_array_equal(label.data, anatomy())


def test_names_come_from_where_the_label_map_does(untrained: Any, tmp_path: Path) -> None:
    file = tmp_path / "out" / "p1.nii.gz"
    write_labelmap(np.where(anatomy() == 4, 5, anatomy() == 1), file, native=AXIAL)
    (tmp_path / "names.txt").write_text(json.dumps({"1": "one", "5": "five"}))

    def labels(name: str, **how: Any) -> list[str]:
        found: list[str] = export(file, tmp_path / f"{name}.seg.nrrd", kind="seg-nrrd", **how)["labels"]
        return found

    assert labels("nobody") == ["label 1", "label 5"]
    assert labels("model", names=untrained.path) == ["ball", "rod"]
    assert labels("file", names=tmp_path / "names.txt") == ["one", "five"]
    record = {"labels": {"1": "first", "5": "fifth"}, "predictions": [{"path": file.name}]}
    (file.parent / "predictions.json").write_text(json.dumps(record))
    assert labels("prediction") == ["first", "fifth"]
    assert labels("told", names=untrained.path) == ["ball", "rod"]


def test_a_mask_of_a_bundle_is_called_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"AF_left": 1, "CST_left": 2}}))
    write_bundles({"CST_left": anatomy() == 1, "UF_left": anatomy() == 2}, tmp_path / "p1", native=AXIAL)
    file = tmp_path / "p1" / SEGMENTATIONS / "CST_left.nii.gz"
    assert export(file, tmp_path / "a.seg.nrrd", kind="seg-nrrd")["labels"] == ["CST_left"]
    (tmp_path / "names.json").write_text(json.dumps({"1": "pyramidal tract"}))
    told = export(file, tmp_path / "b.seg.nrrd", kind="seg-nrrd", names=tmp_path / "names.json")
    assert told["labels"] == ["pyramidal tract"]


def test_the_verb_hands_over_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def stand_in(*words: Any, **how: Any) -> dict[str, Any]:
        made.update(how, words=words)
        return {"labels": ["liver"], "dice": {"liver": 0.995}, "notes": ["a note"]}

    monkeypatch.setitem(sys.modules, "fewscan.api", SimpleNamespace(export=stand_in))
    monkeypatch.setattr("fewscan.api", SimpleNamespace(export=stand_in), raising=False)
    words = ["export", "m.nii.gz", "--as", "rtstruct", "--source", "ct", "-o", "o.dcm", "--names", "l.json", "--manual"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert made == {
        "words": (Path("m.nii.gz"), Path("o.dcm")),
        "kind": "rtstruct",
        "source": Path("ct"),
        "names": Path("l.json"),
        "manual": True,
    }
    assert "0.995" in done.stdout
    assert "a note" in done.stdout


# -------------------------------------------------------------------------------------------------------- the patient


def test_the_patient_is_found_in_dicom_files_and_nowhere_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    scans, run = tmp_path / "scans", tmp_path / "run"
    for index in range(2):
        label = np.roll(anatomy(), index, axis=0)
        folder = write_series(scans / f"case{index}", np.where(label > 0, 70, -60), AXIAL)
        native = describe_series(folder).native
        write_labelmap(label, tmp_path / "l.nii.gz", native=native)
        (tmp_path / "labels.json").write_text(json.dumps(NAMES))
        export(tmp_path / "l.nii.gz", scans / f"case{index}.dcm", kind="dicom-seg", source=folder)
    (tmp_path / "labels.json").unlink()
    said: list[str] = []
    small = {"network.widths": "4,8", "train.warmup_steps": "1"}
    model = api.train(
        scans, run / "model", steps=3, device="cpu", settings=small, observe=lambda s: said.append(str(s))
    )
    mask = api.predict(
        model, scans / "case0", run / "predictions", device="cpu", observe=lambda s: said.append(str(s))
    )[0]
    said.append(json.dumps(api.check(scans).to_json()))
    api.report(run, run / "report.html")
    export(scans, run / "nnunet", kind="nnunet")
    export(scans / "case0.dcm", run / "again.seg.nrrd", kind="seg-nrrd", source=scans / "case0")
    export(run / "model", run / "bundle", kind="monai")
    label = np.where(read_labels(mask.path).data == 0, 1, read_labels(mask.path).data)  # so that there is something
    write_labelmap(label, mask.path, native=describe_series(scans / "case0").native)
    export(mask.path, run / "bids", kind="bids")
    for kind in ("dicom-seg", "rtstruct"):
        report = export(mask.path, run / f"{kind}.dcm", kind=kind, source=scans / "case0")
        said.append(json.dumps(report))
        assert b"Quastenflosser" in (run / f"{kind}.dcm").read_bytes()
    seen, logged = capfd.readouterr(), caplog.text
    texts = {"what was said": " ".join([*said, seen.out, seen.err, logged]).encode()}
    files = [p for p in run.rglob("*") if p.is_file() and p.suffix != ".dcm"]
    for file in files:
        raw = file.read_bytes()
        texts[file.name] = nib.openers.Opener(file).read() if file.suffix == ".gz" else raw
        texts[f"name of {file.name}"] = str(file.relative_to(run)).encode()
    assert len(files) > 15
    assert not [(name, trace) for name, text in texts.items() for trace in TRACES if trace.encode() in text.lower()]
