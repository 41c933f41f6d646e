"""What goes into a page: thinned honestly, packed without a word about the patient, bounded in size."""

import base64
import gzip
import hashlib
import json
import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from shapes import ball

from fewscan import api
from fewscan.data import io, places
from fewscan.deliver import viewer, warps
from fewscan.deliver.embedding import HU_STEP, Limits, packed, thinned, windows
from fewscan.deliver.mesh_files import Item, painted, read_glb, write_glb
from fewscan.deliver.report import read_run, write_report
from fewscan.deliver.scans import LOST
from fewscan.deliver.scenes import Content, Layer, Scene, scenes
from fewscan.deliver.surface import Mesh
from fewscan.errors import ConfigError, DataError
from fewscan.space.field import from_matrix
from fewscan.space.geometry import Geometry

GRID = Geometry((40, 36, 20), np.array([[1.0, 0, 0, -17], [0, 1, 0, 5], [0, 0, 2, 3], [0, 0, 0, 1]]))
WHO = "Doe_Jane_19700101"


def labels(grid=GRID):
    data = np.zeros(grid.shape, np.uint16)
    data[10:20, 10:20, 6:12], data[20:26, 10:20, 6:12] = 3, 300
    return data


def content(*, ct=False):
    noise = np.random.default_rng(0).normal(0, 300 if ct else 50, GRID.shape) + (-200 if ct else 400)
    scan = Layer(name="scan", kind="scan", data=noise.astype(np.int16), ct=ct)
    return Content(
        geometry=GRID, layers=[scan, Layer(name="prediction", kind="labels", data=labels())], names={3: "a", 300: "b"}
    )


def opened(file):
    return nib.Nifti1Image.from_bytes(gzip.decompress(file.content))


@pytest.fixture
def run(tmp_path):
    """Two predicted scans; folders and headers of the originals name a patient."""
    scans, out = tmp_path / WHO, tmp_path / "out"
    rows = []
    for i in range(2):
        image = nib.Nifti1Image(np.random.default_rng(i).normal(100, 20, GRID.shape).astype(np.float32), GRID.affine)
        image.header["descrip"] = WHO.encode()
        scans.mkdir(exist_ok=True)
        nib.save(image, scans / f"case_{i}.nii.gz")
        io.write_labelmap(labels() % 255, out / f"case_{i}.nii.gz", native=GRID)
        rows.append({"id": f"case_{i}", "path": f"case_{i}.nii.gz", "seconds": 1.0, "volumes_ml": {}})
    probs = np.stack([np.full(GRID.shape, v, np.uint8) for v in (55, 150, 50)])
    io.write_image(probs, out / "case_0_probabilities.nii.gz", native=GRID)
    record = {"labels": {"3": "front", "45": "back"}, "predictions": rows}
    (out / "predictions.json").write_text(json.dumps(record))
    places.remember(out / "predictions.json", {f"case_{i}": {"image": scans / f"case_{i}.nii.gz"} for i in range(2)})
    return out


def embedded(page):
    found = re.findall(r'<script type="application/json" class="scene">(.*?)</script>', page, re.S)
    return [json.loads(text) for text in found]


def test_a_page_holds_scan_mask_and_uncertainty_on_one_grid(run):
    first, second = embedded(write_report(run, run / "r.html").read_text())
    assert [layer["name"] for layer in first["layers"]] == ["scan", "prediction", "uncertainty"]
    assert [layer["name"] for layer in second["layers"]] == ["scan", "prediction"]
    images = [nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(x["data"]))) for x in first["layers"]]
    assert all(np.allclose(image.affine, GRID.affine) for image in images)
    scan = nib.load(run.parent / WHO / "case_0.nii.gz").get_fdata()
    assert np.abs(images[0].get_fdata() - np.clip(scan, *np.percentile(scan, (0.1, 99.9)))).max() < 0.5
    assert set(np.unique(np.asarray(images[2].dataobj))) == {255 - 150}
    assert [row["name"] for row in first["layers"][1]["labels"]] == ["front", "back"]


def test_no_page_names_the_patient_or_a_folder(run):
    for extent in ("thin", "full"):
        page = write_report(run, run / "r.html", extent=extent).read_text()
        unpacked = b"".join(gzip.decompress(base64.b64decode(x["data"])) for s in embedded(page) for x in s["layers"])
        assert WHO not in page
        assert str(run.parent) not in page
        assert WHO.encode() not in unpacked


def test_what_is_thinned_is_said_and_the_whole_is_there_when_asked_for(run):
    thin, full = (write_report(run, run / "r.html", extent=extent).read_text() for extent in ("thin", "full"))
    assert "256 grey levels" in thin
    assert "--viewer full" in thin
    assert "256 grey levels" not in full
    whole = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(embedded(full)[0]["layers"][0]["data"])))
    np.testing.assert_array_equal(whole.get_fdata(), nib.load(run.parent / WHO / "case_0.nii.gz").get_fdata())


def test_a_viewer_that_is_not_wanted_leaves_the_page_as_it_was(run):
    page = write_report(run, run / "r.html", extent="none").read_text()
    assert "viewer" not in page
    with pytest.raises(ConfigError, match="one of full, thin, none, got 'half'"):
        write_report(run, run / "r.html", extent="half")


def test_scans_that_moved_are_found_where_the_caller_says_and_missed_aloud(run):
    moved = (run.parent / WHO).rename(run.parent / "elsewhere")
    first, _ = embedded(write_report(run, run / "r.html").read_text())
    assert first["remarks"] == [LOST]
    assert [layer["name"] for layer in first["layers"]] == ["prediction", "uncertainty"]
    first, _ = embedded(write_report(run, run / "r.html", images=[moved]).read_text())
    assert first["layers"][0]["name"] == "scan"
    with pytest.raises(DataError, match="nowhere"):
        write_report(run, run / "r.html", images=[run / "nowhere"])


def test_records_cannot_lead_out_of_their_folder(run):
    record = json.loads((run / "predictions.json").read_text())
    record["predictions"][0]["path"] = "../secret.nii.gz"
    (run / "predictions.json").write_text(json.dumps(record))
    assert [scene.title for scene in scenes(read_run(run))] == ["case_1 · predicted"]


def test_scenes_that_do_not_fit_are_left_out_and_counted(run):
    both = scenes(read_run(run))
    size = len(viewer.embedded(both, extent="thin"))
    tight = viewer.embedded(both, extent="thin", room=size - 20_000)
    assert len(embedded(tight)) == 1
    assert "1 more did not fit" in tight
    assert len(tight) < size - 20_000


def test_a_damaged_scene_costs_only_itself(run):
    def broken():
        raise DataError("/a/b/x.nii.gz: truncated")

    page = viewer.embedded([Scene(title="bad", load=broken), *scenes(read_run(run))], extent="thin")
    assert len(embedded(page)) == 2
    assert "bad: x.nii.gz: truncated" in page


def test_large_scans_are_cropped_to_the_labels_then_coarsened_and_stay_in_place():
    thin, said = thinned(content(), Limits(voxels=4000))
    assert np.prod(thin.geometry.shape) < 6000
    assert "instead of 40 x 36 x 20 voxels" in said[0]
    for value in (3, 300):
        before, after = np.argwhere(labels() == value).mean(0), np.argwhere(thin.layers[1].data == value).mean(0)
        places_mm = [g.affine[:3, :3] @ c + g.affine[:3, 3] for g, c in ((GRID, before), (thin.geometry, after))]
        assert np.linalg.norm(places_mm[0] - places_mm[1]) < max(thin.geometry.spacing) / 2
    scan = opened(packed(thin)[0])
    assert abs(float(scan.get_fdata().mean()) - 400) < 5


def test_ct_keeps_its_units_and_gets_its_windows():
    thin, said = thinned(content(ct=True), Limits())
    assert said == [f"steps of {HU_STEP} HU"]
    kept = opened(packed(thin)[0]).get_fdata()
    original = content(ct=True).layers[0].data.clip(-1024, 3071)
    assert np.abs(kept - original).max() <= HU_STEP / 2
    assert {row["name"] for row in windows(thin.layers[0])} == {"soft tissue", "lung", "bone"}
    assert len(windows(content().layers[0])) == 4


def test_headers_say_type_shape_and_place_only_and_labels_are_numbered_without_gaps():
    scan, mask = packed(thinned(content(), Limits())[0])
    for file in (scan, mask):
        header = opened(file).header
        assert not any(bytes(header[name]).strip(b"\0") for name in ("descrip", "db_name", "aux_file", "intent_name"))
    assert set(np.unique(np.asarray(opened(mask).dataobj))) == {0, 1, 2}
    assert [row["name"] for row in mask.about["labels"]] == ["a", "b"]


def test_lines_and_surfaces_come_in_the_formats_the_viewer_reads():
    line = np.arange(12, dtype=np.float32).reshape(4, 3)
    mesh = Mesh(np.eye(3, dtype=np.float64), np.array([[0, 1, 2]]))
    item = Item(name="part", mesh=mesh, colour=(9, 8, 7))
    drawn = packed(Content(names={}, lines=[line, line], step_mm=3.0, items=[item]))
    tck, mz3 = (gzip.decompress(file.content) for file in drawn)
    assert tck.startswith(b"mrtrix tracks\n")
    points = np.frombuffer(tck[int(re.search(rb"file: \. (\d+)", tck)[1]) :], "<f4").reshape(-1, 3)
    np.testing.assert_array_equal(points[:4], line)
    assert np.isnan(points[[4, 9]]).all()
    assert np.isinf(points[-1]).all()
    assert mz3[:4] == b"MZ\x03\x00"
    np.testing.assert_array_equal(np.frombuffer(mz3[28:], "<f4").reshape(-1, 3), mesh.points)


def test_a_grid_that_nothing_deformed_is_straight():
    matrix = np.array([[0.9, 0.1, 0, 4], [-0.1, 0.9, 0, 0], [0, 0, 1.1, 2], [0, 0, 0, 1.0]])
    lines, step = warps.lattice(from_matrix(matrix, GRID), matrix)
    assert step == pytest.approx(40 / warps.LATTICE)
    assert max(np.ptp(np.delete(line, np.ptp(line, axis=0).argmax(), 1), axis=0).max() for line in lines) < 0.05


def test_a_model_comes_back_from_glb_in_millimetres(tmp_path):
    surface = ball(radius_mm=9)
    from fewscan.deliver.mesh import surfaces

    item = Item(name="ball", mesh=surfaces(surface)[0].mesh, colour=(230, 69, 69))
    write_glb([item], tmp_path / "model.glb")
    (back,) = read_glb(tmp_path / "model.glb")
    assert (back.name, back.colour) == ("ball", (230, 69, 69))
    np.testing.assert_allclose(back.mesh.points, item.mesh.points, atol=1e-4)
    (tmp_path / "model.glb").write_bytes(b"glTF" + bytes(40))
    with pytest.raises(DataError, match=r"model\.glb: not a model"):
        read_glb(tmp_path / "model.glb")


def test_confidence_comes_back_from_glb_and_reaches_the_viewer_as_colour(tmp_path):
    from fewscan.deliver.mesh import surfaces

    mesh = surfaces(ball(radius_mm=12))[0].mesh
    sure = np.random.default_rng(0).random(len(mesh.points))
    write_glb([Item(name="ball", mesh=mesh, colour=(1, 2, 3), confidence=sure)], tmp_path / "model.glb")
    (back,) = read_glb(tmp_path / "model.glb")
    np.testing.assert_allclose(back.confidence, sure, atol=1e-5)
    (file,) = packed(Content(names={}, items=[back]))
    mz3 = gzip.decompress(file.content)
    assert (mz3[2], file.about["colour"]) == (7, None)
    np.testing.assert_array_equal(
        np.frombuffer(mz3[-4 * len(sure) :], np.uint8).reshape(-1, 4)[:, :3], painted(sure).round()
    )
    high = replace(back, confidence=(mesh.points[:, 2] > np.median(mesh.points[:, 2])).astype(float))
    (few,) = thinned(Content(names={}, items=[high]), Limits(faces=300))[0].items
    assert len(few.confidence) == len(few.mesh.points)
    assert np.corrcoef(few.confidence, few.mesh.points[:, 2])[0, 1] > 0.7


def test_meshes_lie_over_their_scan_where_one_is_given(run, tmp_path):
    image = next(run.rglob("case_0.nii.gz"))
    api.mesh(image, tmp_path / "mesh", purpose="vr")
    alone = scenes(read_run(tmp_path / "mesh"))[0].load()
    assert (alone.layers, alone.remarks) == ((), ["Give its scan with --images to see it too."])
    (scan,) = list(tmp_path.rglob(f"{WHO}/case_0.nii.gz"))
    over = scenes(read_run(tmp_path / "mesh", [scan]))[0].load()
    assert [layer.name for layer in over.layers] == ["scan"]
    assert over.items
    both = scenes(read_run(tmp_path / "mesh", [scan.parent]))[0].load()
    assert both.layers == ()
    assert "Several scans were given" in both.remarks[0]


def test_surfaces_are_thinned_to_the_limit_and_it_is_said():
    from fewscan.deliver.mesh import surfaces

    item = Item(name="ball", mesh=surfaces(ball(radius_mm=12))[0].mesh, colour=(1, 2, 3))
    thin, said = thinned(Content(names={}, items=[item]), Limits(faces=800))
    assert len(thin.items[0].mesh.faces) <= 800
    assert "triangles instead of" in said[0]
    assert thin.items[0].mesh.volume_mm3 == pytest.approx(item.mesh.volume_mm3, rel=0.05)


def test_the_vendored_viewer_is_the_one_written_down():
    raw = viewer._vendored(viewer.NIIVUE)
    assert hashlib.sha256(raw).hexdigest() == viewer.NIIVUE_SHA256
    assert viewer.NIIVUE_SHA256 in viewer._vendored("README.md").decode()
    assert b"BSD 2-Clause" in viewer._vendored(viewer.LICENCES)
    assert b"new Worker" not in raw


def test_a_registration_shows_both_scans_before_and_after(tmp_path):
    out, moved = tmp_path / "out", np.roll(labels(), 2, 0)
    for name, data in (("fixed", labels()), ("moving", moved), ("out/warped", labels())):
        io.write_image((data * 2 + 100).astype(np.int16), tmp_path / f"{name}.nii.gz", native=GRID)
    io.write_labelmap(moved, tmp_path / "moving_seg.nii.gz", native=GRID)
    io.write_labelmap(labels(), out / "warped_labels.nii.gz", native=GRID)
    (out / "registration.json").write_text(json.dumps({"fixed": "fixed.nii.gz", "transform": "rigid"}))
    files = {"fixed": "fixed.nii.gz", "moving": "moving.nii.gz", "moving_labels": "moving_seg.nii.gz"}
    places.remember(out / "registration.json", {"pair": {role: tmp_path / name for role, name in files.items()}})
    (scene,) = scenes(read_run(out))
    found = scene.load()
    assert [(layer.name, layer.state) for layer in found.layers] == [
        ("fixed scan", ""), ("moving scan, before", ""), ("moving scan, registered", ""),
        ("moving labels, registered", "moving scan, registered"), ("moving labels", "moving scan, before"),
    ]  # fmt: skip
    np.testing.assert_array_equal(found.layers[1].data, moved * 2 + 100)
    np.testing.assert_array_equal(found.layers[4].data, moved)
    assert found.remarks == []
