"""Files in, files out: `fewscan mesh` leaves a folder that can be shown, or one clear sentence."""

import json

import numpy as np
import pytest
from shapes import ball, oblique, two_boxes
from typer.testing import CliRunner

from fewscan import api, cli, meshing
from fewscan.data.io import write_image, write_labelmap
from fewscan.errors import ConfigError, DataError, FewscanError, GeometryError
from fewscan.space.geometry import Geometry

BED = api.Printer(wall_mm=0.1)


@pytest.fixture
def boxes(tmp_path):
    label = two_boxes()
    path = tmp_path / "Smith_John_seg.nii.gz"
    write_labelmap(label.data, path, native=label.geometry)
    (tmp_path / "labels.json").write_text(json.dumps({"1": "left femur", "2": "left/femur"}))
    return path


def test_it_leaves_its_files_and_names_no_patient(boxes, tmp_path):
    out = tmp_path / "out"
    record = api.mesh(boxes, out, printer=BED)
    assert record["printable"] is True
    assert list(record["parts"]) == ["left femur", "left/femur"]
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert names == {"certificate.json", *record["files"], *record["pictures"]}
    assert {"left_femur.stl", "left_femur_2.stl", "model.3mf", "model.glb"} == set(record["files"])
    stored = json.loads((out / meshing.RECORD).read_text())
    assert stored["parts"] == record["parts"]
    assert (stored["unit"], stored["space"], stored["use"]) == ("mm", "RAS", "research use only")
    for path in out.rglob("*"):
        assert "Smith" not in path.name
        assert not path.is_file() or b"Smith" not in path.read_bytes()
    for part in record["parts"].values():
        assert abs(part["volume_error"]) < 0.01
        assert part["deviation"]["largest_voxels"] <= 0.5


def test_a_second_run_replaces_its_own_files_and_nobody_elses(boxes, tmp_path):
    out = tmp_path / "out"
    api.mesh(boxes, out, printer=BED)
    (out / "mine.stl").write_text("precious")
    record = api.mesh(boxes, out, labels=["2"], purpose="view")
    assert record["printable"] is None
    assert {p.name for p in out.iterdir()} == {
        "mine.stl", "certificate.json", "pictures", "model.glb", "left_femur.ply"
    }  # fmt: skip
    assert not (out / "pictures" / "part_1.png").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.glb").write_text("precious")
    with pytest.raises(ConfigError, match=r"model\.glb exists and was not written by fewscan mesh"):
        api.mesh(boxes, tmp_path / "other")
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "certificate.json").write_text('{"files": ["../mine.stl", "mine.stl"]}')
    with pytest.raises(ConfigError, match="was not written by fewscan mesh"):
        api.mesh(boxes, tmp_path / "third")
    (tmp_path / "third" / "certificate.json").write_text('{"files": ["../labels.json"], "pictures": []}')
    api.mesh(boxes, tmp_path / "third", printer=BED)
    assert (tmp_path / "labels.json").is_file()
    assert (tmp_path / "other" / "model.glb").read_text() == "precious"


def test_labels_are_chosen_by_name_or_value_and_merged(boxes, tmp_path):
    one = api.mesh(boxes, tmp_path / "one", labels=["left femur"], printer=BED)
    assert list(one["parts"]) == ["left femur"]
    merged = api.mesh(boxes, tmp_path / "two", config=api.MeshConfig(merge=True), printer=BED)
    assert list(merged["parts"]) == ["merged"]
    assert merged["parts"]["merged"]["shells"] == 1
    assert merged["parts"]["merged"]["mask_ml"] == pytest.approx(2 * 7 * 8 * 8 / 1000)
    with pytest.raises(DataError, match=r"holds no label 'liver'; it holds 1 \(left femur\)"):
        api.mesh(boxes, tmp_path / "three", labels=["liver"])


def broken(tmp_path, kind):
    path = tmp_path / f"{kind}.nii.gz"
    data, grid = two_boxes().data, Geometry((20, 14, 14), np.eye(4))
    if kind == "empty":
        write_labelmap(np.zeros_like(data), path, native=grid)
    elif kind == "float":
        write_image(data.astype(np.float32), path, native=grid)
    elif kind == "half":
        write_image(data * np.float32(0.5), path, native=grid)
    elif kind == "4d":
        write_image(np.stack([data, data]), path, native=grid)
    elif kind == "mirrored":
        write_labelmap(data, path, native=Geometry(grid.shape, np.diag([-1.0, 1, 1, 1])))
    elif kind == "oblique":
        label = ball(geometry=oblique((24, 24, 10)), radius_mm=9)
        write_labelmap(label.data, path.with_suffix("").with_suffix(".nrrd"), native=label.geometry)
        return path.with_suffix("").with_suffix(".nrrd")
    return path


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("empty", r"empty\.nii\.gz: holds no label, every voxel is 0; give"),
        ("half", r"half\.nii\.gz: labels are not whole numbers; save"),
        ("4d", r"4d\.nii\.gz: holds 2 volumes, 1 expected; save"),
        ("missing", r"missing\.nii\.gz"),
    ],
)
def test_what_cannot_be_meshed_is_refused_before_anything_is_written(tmp_path, kind, sentence):
    with pytest.raises(FewscanError, match=sentence):
        api.mesh(broken(tmp_path, kind), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_or_a_dicom_file_is_refused_with_a_label_map_to_give(boxes, tmp_path, monkeypatch):
    folder = tmp_path / "predictions"
    folder.mkdir()
    for name in ("b_probabilities.nii.gz", "c.nii.gz"):
        (folder / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"predictions: is a folder; give one label map.*such as .*c\.nii\.gz$"):
        api.mesh(folder, tmp_path / "out")
    (folder / "seg.dcm").write_bytes(b"")
    monkeypatch.setattr(meshing, "is_label", lambda path: path.suffix == ".dcm")
    with pytest.raises(DataError, match=r"seg\.dcm: is a DICOM file; give one label map.*such as .*c\.nii\.gz$"):
        api.mesh(folder / "seg.dcm", tmp_path / "out")


@pytest.mark.parametrize("kind", ["float", "mirrored", "oblique"])
def test_odd_but_honest_files_are_meshed(tmp_path, kind):
    record = api.mesh(broken(tmp_path, kind), tmp_path / "out", printer=BED)
    assert record["printable"] is True
    assert all(part["manifold"] and part["oriented"] for part in record["parts"].values())


def test_probabilities_must_be_of_the_same_scan(boxes, tmp_path):
    label = two_boxes()
    probs = np.stack([label.data == v for v in range(3)]).astype(np.uint8) * 255
    write_image(probs, tmp_path / "p.nii.gz", native=label.geometry)
    record = api.mesh(boxes, tmp_path / "out", purpose="vr", probabilities=tmp_path / "p.nii.gz")
    assert "left_femur.ply" in record["files"]
    write_image(probs[:2], tmp_path / "few.nii.gz", native=label.geometry)
    with pytest.raises(DataError, match=r"holds 2 classes with the background, .*_seg\.nii\.gz is of 2 labels"):
        api.mesh(boxes, tmp_path / "out", probabilities=tmp_path / "few.nii.gz")
    shifted = Geometry(label.geometry.shape, np.diag([1.0, 1, 2, 1]))
    write_image(probs, tmp_path / "other.nii.gz", native=shifted)
    with pytest.raises(GeometryError, match="and the label map"):
        api.mesh(boxes, tmp_path / "out", probabilities=tmp_path / "other.nii.gz")


@pytest.fixture
def painted(monkeypatch):
    """What is painted on each part, by its name."""
    seen = {}
    real = meshing._write

    def write(parts, *args, **options):
        seen.update({part.name: float(np.median(part.confidence)) for part in parts})
        return real(parts, *args, **options)

    monkeypatch.setattr(meshing, "_write", write)
    return seen


def test_a_label_is_painted_with_its_own_class_whatever_its_number(tmp_path, painted):
    """Labels 2 and 3, in an order that only the record knows; the liver is sure, the spleen is not."""
    label, folder = two_boxes(), tmp_path / "predicted"
    folder.mkdir()
    liver, spleen = (label.data == v for v in (1, 2))
    sure, vague = np.uint8(255) * liver, np.uint8(130) * spleen
    rest = 255 - sure - vague
    write_image(np.stack([rest, vague, sure]), tmp_path / "p.nii.gz", native=label.geometry)
    record = {"labels": {"3": "spleen", "2": "liver"}, "predictions": [{"path": "a.nii.gz"}, {"path": "b.nii.gz"}]}
    (folder / "predictions.json").write_text(json.dumps(record))
    both = np.where(liver, 2, np.where(spleen, 3, 0)).astype(np.uint16)
    write_labelmap(both, folder / "a.nii.gz", native=label.geometry)
    write_labelmap(np.where(liver, both, 0).astype(np.uint16), folder / "b.nii.gz", native=label.geometry)
    known = {"probabilities": tmp_path / "p.nii.gz", "purpose": "vr"}
    api.mesh(folder / "b.nii.gz", tmp_path / "one", **known)
    assert painted.pop("liver") > 0.9
    api.mesh(folder / "a.nii.gz", tmp_path / "two", **known)
    assert painted.pop("liver") > 0.7 > painted.pop("spleen")
    api.mesh(folder / "a.nii.gz", tmp_path / "merged", config=meshing.MeshConfig(merge=True), **known)
    whole = painted.pop("merged")
    api.mesh(folder / "b.nii.gz", tmp_path / "all", config=meshing.MeshConfig(merge=True), labels=["liver"], **known)
    assert painted.pop("merged") > 0.9 > whole > 0.6
    (folder / "predictions.json").unlink()
    (folder / "labels.json").write_text(json.dumps({"1": "kidney", "3": "spleen"}))
    with pytest.raises(DataError, match=r"2 \(label 2\) is none of them"):
        api.mesh(folder / "a.nii.gz", tmp_path / "other", **known)


def test_the_verb_ends_with_one_when_a_part_must_not_be_printed(boxes, tmp_path):
    words = ["mesh", str(boxes), "-o", str(tmp_path / "out"), "--labels", "1, 2"]
    done = CliRunner().invoke(cli.app, [*words, "--build-mm", "5x5x5"])
    assert done.exit_code == 1, done.output
    assert "do not print" in done.stdout
    assert CliRunner().invoke(cli.app, [*words, "--wall-mm", "0.1", "--tag", "Smith"]).exit_code == 0
    assert "Smith" not in (tmp_path / "out" / "certificate.json").read_text()
    refused = CliRunner().invoke(cli.app, [*words, "--build-mm", "5x5"])
    assert isinstance(refused.exception, ConfigError)
    report = api.report(tmp_path / "out", tmp_path / "r.html").read_text()
    assert "2 parts may be printed" in report.replace("2 Parts", "2 parts")
    assert report.count("data:image/png;base64,") >= 5
    assert "Meshes" in report


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="smooth_mm must be 0 or more"):
        api.MeshConfig(smooth_mm=-1)
    with pytest.raises(ConfigError, match="faces must be 0 or more"):
        api.MeshConfig(faces=-1)
    with pytest.raises(ConfigError, match="for one of print, vr, view, got 'toy'"):
        api.mesh("x.nii.gz", "out", purpose="toy")
