"""Files in, files out: registration leaves a sound folder and refuses what it cannot do."""

import json
import math
from dataclasses import replace

import fibres
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (its customary name)
from crossing import write_crossings
from phantom import phantom
from scipy import ndimage

from fewscan import api, registration
from fewscan.data import kinds, places
from fewscan.data.fields import read_field
from fewscan.data.io import read_image, read_labels, read_raw, write_image, write_labelmap
from fewscan.deliver.verdict import registered
from fewscan.errors import ConfigError, DataError
from fewscan.methods.pairwise import RegisterConfig
from fewscan.space import directions
from fewscan.space.deformable import DeformConfig
from fewscan.space.field import warp_labels
from fewscan.space.geometry import Geometry, to_ras

QUICK = RegisterConfig(deform=DeformConfig(shrink=(2, 1), steps=(15, 5)))


@pytest.fixture
def pair(tmp_path):
    """Two scans with labels; the moving one is stored left to right."""
    flipped = np.diag([-1.0, 1.0, 1.0, 1.0])
    flipped[0, 3] = 19
    paths = {}
    for name, seed in (("fixed", 0), ("moving", 5)):
        image, label, grid = phantom(seed)
        native = grid if name == "fixed" else Geometry(grid.shape, flipped)
        write_image(np.round(image * 100).astype(np.int16), tmp_path / f"{name}.nii.gz", native=native)
        write_labelmap(label, tmp_path / f"{name}_seg.nii.gz", native=native)
        paths[name], paths[name + "_labels"] = tmp_path / f"{name}.nii.gz", tmp_path / f"{name}_seg.nii.gz"
    return paths


def run(pair, out, **more):
    return api.register(
        pair["fixed"], pair["moving"], out, moving_labels=pair["moving_labels"], fixed_labels=pair["fixed_labels"],
        config=QUICK, device="cpu", **more,
    )  # fmt: skip


def test_it_leaves_its_files_on_the_fixed_grid(pair, tmp_path):
    seen = []
    report = run(pair, tmp_path / "out", observe=seen.append)
    out = tmp_path / "out"
    wanted = {*registration.FILES[:3], registration.RECORD, registration.PICTURES, places.LOCAL}
    assert {p.name for p in out.iterdir()} == wanted
    assert all((out / name).is_file() for name in report["pictures"])
    fixed, warped = read_image(pair["fixed"]), read_image(out / "warped.nii.gz")
    np.testing.assert_allclose(warped.geometry.affine, fixed.geometry.affine, atol=1e-5)
    assert warped.data.dtype == np.int16
    assert report["dice"]["mean"]["after"] >= report["dice"]["mean"]["before"]
    assert json.loads((out / registration.RECORD).read_text())["use"] == "research use only"
    assert str(tmp_path) not in (out / registration.RECORD).read_text()
    assert seen[-1].fraction <= 1
    assert json.loads((out / registration.RECORD).read_text())["folding"] == report["folding"]


def test_the_field_on_disk_warps_as_the_registration_did(pair, tmp_path):
    run(pair, tmp_path / "out")
    fixed, moving = read_image(pair["fixed"]), read_labels(pair["moving_labels"])
    field = read_field(tmp_path / "out" / "field.nii.gz", fixed=fixed.geometry)
    again = warp_labels(moving.data, moving.geometry, field=field)
    stored = read_labels(tmp_path / "out" / "warped_labels.nii.gz").data
    assert (again == stored).mean() > 0.999


def test_simpleitk_warps_with_the_field_that_was_asked_for(pair, tmp_path):
    run(pair, tmp_path / "out", itk=True)
    out = tmp_path / "out"
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(out / "field_itk.nii.gz"), sitk.sitkVectorFloat64))
    fixed, moving = (sitk.ReadImage(str(pair[name]), sitk.sitkFloat32) for name in ("fixed", "moving"))
    theirs = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, field, sitk.sitkLinear, 0.0))
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "warped.nii.gz"), sitk.sitkFloat32))
    inside = theirs > 0
    assert inside.mean() > 0.5
    assert np.abs(theirs - ours)[inside].mean() < 1.0, "of intensities in hundreds, rounded"
    run(pair, tmp_path / "out")
    assert not (out / "field_itk.nii.gz").exists(), "an earlier field is no part of this answer"


def test_a_second_run_replaces_its_own_files_and_nobody_elses(pair, tmp_path):
    run(pair, tmp_path / "out")
    mine = tmp_path / "out" / "pictures" / "mine.png"
    mine.write_text("precious")
    with_labels = (tmp_path / "out" / "pictures" / "lines.json").read_text()
    api.register(pair["fixed"], pair["moving"], tmp_path / "out", config=QUICK, device="cpu")
    assert not (tmp_path / "out" / "warped_labels.nii.gz").exists()
    assert mine.read_text() == "precious"
    assert "warped_labels" in with_labels
    assert "warped_labels" not in (tmp_path / "out" / "pictures" / "lines.json").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "warped.nii.gz").write_text("precious")
    with pytest.raises(ConfigError, match="not written by fewscan register"):
        run(pair, tmp_path / "mine")
    with pytest.raises(ConfigError, match="might be overwritten"):
        run(pair, tmp_path)
    assert (tmp_path / "mine" / "warped.nii.gz").read_text() == "precious"


@pytest.mark.parametrize("text", ["[1]", "{", '{"method": "theirs"}'])
def test_a_record_of_another_program_is_not_replaced_and_vouches_for_nothing(pair, tmp_path, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / registration.RECORD).write_text(text)
    with pytest.raises(ConfigError, match=r"registration\.json exists and was not written by .* or move it away"):
        run(pair, out)
    assert (out / registration.RECORD).read_text() == text


def test_no_registration_is_written_among_the_slices_of_a_mixed_folder(pair, tmp_path):
    (tmp_path / "scans" / "p1").mkdir(parents=True)
    with pytest.raises(ConfigError, match="might be overwritten"):
        run(pair | {"moving": tmp_path / "scans" / "p1@4"}, tmp_path / "scans" / "p1")


def test_masks_must_lie_on_the_fixed_scan(pair, tmp_path):
    grid = read_image(pair["fixed"]).geometry
    empty = tmp_path / "empty.nii.gz"
    write_labelmap(np.zeros(grid.shape, np.uint8), empty, native=grid)
    with pytest.raises(DataError, match=r"empty\.nii\.gz: the mask has no voxel"):
        run(pair, tmp_path / "out", fixed_mask=empty)
    whole = tmp_path / "whole.nii.gz"
    write_labelmap(np.ones(grid.shape, np.uint8), whole, native=grid)
    with pytest.raises(DataError, match="leave no voxel"):
        run(pair, tmp_path / "out", fixed_lesion=whole)
    assert not (tmp_path / "out").exists()


def test_a_file_of_several_volumes_is_refused_with_a_way_to_get_one_map(pair, tmp_path):
    image, _, grid = phantom(0)
    write_image(np.stack([image] * 9), tmp_path / "peaks.nii.gz", native=grid)
    with pytest.raises(DataError, match=r"peaks\.nii\.gz: holds 9 volumes, but register takes one .*DIR/fa\.nii\.gz"):
        api.register(pair["fixed"], tmp_path / "peaks.nii.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["peaks", "tensor"])
def test_directions_are_brought_along_turned(kind, tmp_path):
    c, s = math.cos(0.4), math.sin(0.4)
    turn, middle = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]), (np.array(fibres.SHAPE) - 1) / 2
    tilted = np.eye(4)
    tilted[:3, :3], tilted[:3, 3] = turn, middle - turn @ middle
    data, label = fibres.clumps(1, kind=kind)
    if kind == "tensor":
        full = np.einsum("ik,klxyz,jl->ijxyz", turn, data[np.array(directions.PLACE)], turn)
        turned = np.stack([full[i, j] for i, j in directions.ORDER])
    else:
        turned = np.einsum("ij,njxyz->nixyz", turn, data.reshape(3, 3, *fibres.SHAPE)).reshape(data.shape)
    paths = [tmp_path / "data" / f"{name}.nii.gz" for name in ("fixed", "moving")]
    for path, values, affine in zip(paths, (data, turned), (np.eye(4), tilted), strict=True):
        write_image(values.astype(np.float32), path, native=Geometry(fibres.SHAPE, affine))
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"channel_kind": kind}))
    config = RegisterConfig(transform="rigid")
    report = api.register(*paths, tmp_path / "out", config=config, device="cpu")
    np.testing.assert_allclose(np.array(report["matrix"])[:3, :3], turn, atol=0.03)  # the same anatomy, tilted
    warped, native = read_raw(tmp_path / "out" / "warped.nii.gz")
    assert kinds.kind_of_file(tmp_path / "out" / "warped.nii.gz", channels=len(warped)) == kind
    inside = ndimage.binary_erosion(label > 0, iterations=2)
    strongest = [principal(values, kind)[inside] for values in (data, to_ras(warped, native)[0], turned)]
    still, brought, unturned = (np.abs((way * strongest[0]).sum(-1)) for way in strongest)
    assert np.median(still) == pytest.approx(1, abs=1e-5)
    assert np.degrees(np.arccos(np.median(brought))) < 5  # noise is averaged, too
    assert np.degrees(np.arccos(np.median(unturned))) > 12
    page = api.report(tmp_path / "out", tmp_path / "report.html").read_text()
    assert "moving scan, registered" in page


def principal(values, kind):
    """Unit direction of the first peak, or of the largest diffusion, (X, Y, Z, 3)."""
    if kind == "tensor":
        return np.linalg.eigh(np.moveaxis(values, 0, -1)[..., np.array(directions.PLACE)])[1][..., 2]
    first = np.moveaxis(values[:3], 0, -1)
    return first / np.maximum(np.linalg.norm(first, axis=-1, keepdims=True), 1e-9)


def test_what_cannot_be_registered_together_is_said(pair, untrained, tmp_path):
    root = fibres.write_fibres(tmp_path / "peaks")
    peaks = root / "images" / "case_00.nii.gz"
    with pytest.raises(
        DataError, match=r"fixed\.nii\.gz: holds intensities in 1 .*case_00\.nii\.gz peaks of fibres in 9 .*fa"
    ):
        api.register(peaks, pair["fixed"], tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"case_00\.nii\.gz: holds peaks of fibres, and a network .*leave out --model"
    ):
        api.register(peaks, root / "images" / "case_01.nii.gz", tmp_path / "out", model=untrained)
    masks = write_crossings(tmp_path / "bundles", labelled=1) / "case_0" / "bundle_segmentations"
    for folder in (masks, masks.parent):
        with pytest.raises(
            DataError, match=r"masks that may overlap; register brings one along .*bundle_segmentations/CC\.nii"
        ):
            api.register(pair["fixed"], pair["moving"], tmp_path / "out", moving_labels=folder)
    assert not (tmp_path / "out").exists()


def test_labels_of_another_place_are_refused(pair, tmp_path):
    far = np.eye(4)
    far[:3, 3] = 5000
    label = read_labels(pair["moving_labels"]).data
    write_labelmap(label, tmp_path / "far.nii.gz", native=Geometry(label.shape, far))
    with pytest.raises(DataError, match=r"far\.nii\.gz: no label lies on its scan"):
        api.register(
            pair["fixed"], pair["moving"], tmp_path / "out", moving_labels=tmp_path / "far.nii.gz", config=QUICK,
            device="cpu",
        )  # fmt: skip
    write_labelmap(0 * label, tmp_path / "empty.nii.gz", native=read_labels(pair["moving_labels"]).geometry)
    with pytest.raises(DataError, match=r"empty\.nii\.gz: no label lies on its scan"):
        api.register(
            pair["fixed"], pair["moving"], tmp_path / "out", moving_labels=pair["moving_labels"],
            fixed_labels=tmp_path / "empty.nii.gz", config=QUICK, device="cpu",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_label_that_the_fixed_scan_does_not_reach_is_named_and_the_rest_is_kept(pair, tmp_path):
    whole, part = read_labels(pair["moving_labels"]), read_image(pair["fixed"])
    label, cut = np.zeros_like(whole.data), part.geometry.shape[0] // 2
    label[:6, :6, :6], label[-2:, -2:, -2:] = 1, 2
    write_labelmap(label, tmp_path / "corners.nii.gz", native=whole.geometry)
    half = Geometry((cut, *part.geometry.shape[1:]), part.geometry.affine)
    write_image(part.data[:, :cut], tmp_path / "half.nii.gz", native=half)
    report = api.register(
        tmp_path / "half.nii.gz", pair["moving"], tmp_path / "out", moving_labels=tmp_path / "corners.nii.gz",
        config=RegisterConfig(transform="rigid"), device="cpu",
    )  # fmt: skip
    assert report["lost_labels"] == ["label 2"]
    assert any("Not on the fixed scan" in said for said in registered(report)[1])
    assert report["settings"]["transform"] == "rigid"
    assert (read_labels(tmp_path / "out" / "warped_labels.nii.gz").data == 1).any()


def test_a_network_of_two_channels_is_refused_before_anything_is_done(pair, untrained, tmp_path):
    double = replace(untrained, plan=replace(untrained.plan, channels=("T1", "T2")))
    with pytest.raises(ConfigError, match=r"learnt from intensities in 2 channel\(s\).*leave out --model"):
        api.register(pair["fixed"], pair["moving"], tmp_path / "out", model=double)
