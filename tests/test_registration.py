"""Files in, files out: registration and drafts leave sound folders and refuse what they cannot do."""

import json

import numpy as np
import pytest
from phantom import phantom, write_dataset

from fewscan import api, drafting, registration
from fewscan.data import places
from fewscan.data.fields import read_field
from fewscan.data.io import read_image, read_labels, write_image, write_labelmap
from fewscan.errors import ConfigError, DataError
from fewscan.methods.pairwise import RegisterConfig
from fewscan.space.deformable import DeformConfig
from fewscan.space.field import warp_labels
from fewscan.space.geometry import Geometry

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
    wanted = {*registration.FILES, registration.RECORD, registration.PICTURES, places.LOCAL}
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


def test_labels_of_another_place_are_refused(pair, tmp_path):
    far = np.eye(4)
    far[:3, 3] = 5000
    label = read_labels(pair["moving_labels"]).data
    write_labelmap(label, tmp_path / "far.nii.gz", native=Geometry(label.shape, far))
    with pytest.raises(DataError, match=r"far\.nii\.gz: none of its labels reaches"):
        api.register(
            pair["fixed"], pair["moving"], tmp_path / "out", moving_labels=tmp_path / "far.nii.gz", config=QUICK,
            device="cpu",
        )  # fmt: skip


def test_drafts_come_with_leave_one_out_figures(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=2, unlabelled=1)
    record = api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert record["leave_one_out"]["n"] == 2
    assert 0.5 < record["leave_one_out"]["dice"] <= 1
    labels = list((tmp_path / "out" / "labels").iterdir())
    assert len(labels) == 1
    assert read_labels(labels[0]).data.any()
    assert "Leave-one-out Dice" in record["sentence"]
    again = api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert again["leave_one_out"]["dice"] == record["leave_one_out"]["dice"]


def test_one_atlas_drafts_without_a_figure_and_strangers_are_left_alone(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=1)
    record = api.draft(data, tmp_path / "out", config=QUICK, device="cpu")
    assert record["leave_one_out"]["dice"] is None
    assert "nothing tells how good" in record["sentence"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    with pytest.raises(ConfigError, match="not written by fewscan draft"):
        api.draft(data, tmp_path / "mine", config=QUICK, device="cpu")


def test_nothing_to_draft_is_refused(tmp_path):
    with pytest.raises(DataError, match="one labelled scan and nothing else"):
        api.draft(write_dataset(tmp_path / "data", labelled=1), tmp_path / "out", config=QUICK, device="cpu")
    assert drafting.RECORD == "draft.json"
