"""Pictures of a registration show what is where, always the same way, and are small."""

import json
import re

import numpy as np
import pytest
import torch
from phantom import NAMES, phantom
from PIL import Image

from fewscan.deliver import warps
from fewscan.deliver.warps import FOLDED_INDEX, UNITS, Scene, volume_change, write_pictures
from fewscan.space.field import determinant, from_matrix, then
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Labelmap, Volume

SCALED = np.diag([1.5, 1.0, 0.8, 1.0])


def wave(shape, size=1.0):
    """A smooth displacement, voxels."""
    x, y, z = np.meshgrid(*[np.linspace(0, np.pi, n) for n in shape], indexing="ij")
    return (size * np.stack([np.sin(x) * np.sin(2 * y), np.sin(2 * x) * np.sin(z), np.sin(y) * np.sin(x)])).astype("f4")


def scene(u=None, matrix=None, *, shape=(20, 24, 18), spacing=(1.0, 1.0, 2.0), labels=True, same=False):
    """Two phantoms and a map between them that nobody had to look for."""
    (image, label, grid), (other, brought, _) = (
        phantom(seed, shape=shape, spacing=spacing) for seed in ((0, 0) if same else (0, 5))
    )
    matrix = np.eye(4) if matrix is None else matrix
    field = then(wave(shape) if u is None else u, matrix, fixed=grid)
    known = {
        "reference": Labelmap(label.astype("u2"), grid, NAMES),
        "labels": Labelmap(brought.astype("u2"), grid, NAMES),
    }
    fixed, moving = (Volume(data[None], grid, grid) for data in (image, other))
    warped = {"warped_labels": label.astype("u2")} if labels else {}
    return Scene(fixed=fixed, moving=moving, field=field, matrix=matrix, **(known if labels else {}), **warped)


def lines_of(folder):
    return json.loads((folder / warps.LINES).read_text())


def strokes(path):
    return [np.array([[float(v) for v in p.split()] for p in line.split("L")]) for line in path.split("M") if line]


def test_the_same_small_files_are_written_each_time_and_others_are_left_alone(tmp_path):
    (tmp_path / "mine.png").write_text("precious")
    names = write_pictures(scene(), tmp_path)
    first = {name: (tmp_path / name).read_bytes() for name in names}
    assert {path.name for path in tmp_path.iterdir()} == {*warps.FILES, "mine.png"}
    assert write_pictures(scene(), tmp_path) == names == list(warps.FILES)
    assert first == {name: (tmp_path / name).read_bytes() for name in names}
    for name in set(names) - {warps.LINES}:
        with Image.open(tmp_path / name) as picture:
            assert picture.mode == ("P" if "volume" in name else "L")
            assert max(picture.size) <= 320
        assert len(first[name]) <= warps.MOST_BYTES


def test_a_scan_registered_to_itself_looks_alike_everywhere(tmp_path):
    u = np.zeros((3, 20, 24, 18), "f4")
    write_pictures(scene(u, same=True), tmp_path)
    for plane in ("axial", "coronal", "sagittal"):
        pictures = [np.asarray(Image.open(tmp_path / f"{plane}_{kind}.png")) for kind in warps.KINDS]
        for picture in pictures[1:4]:
            np.testing.assert_array_equal(picture, pictures[0])
        assert pictures[0].std() > 10
        lines = lines_of(tmp_path)[plane]
        assert lines["fixed_labels"] == lines["before_labels"] == lines["warped_labels"] != ""


def test_before_shows_the_headers_and_warped_the_map(tmp_path):
    shift = np.eye(4)
    shift[0, 3] = 4
    write_pictures(scene(np.zeros((3, 20, 24, 18), "f4"), shift, same=True), tmp_path)
    fixed, before, warped = (np.asarray(Image.open(tmp_path / f"axial_{k}.png")) for k in ("fixed", "before", "warped"))
    np.testing.assert_array_equal(before, fixed)
    pixels = 4 * 320 // 24  # x grows to the left of the picture, so that it shows what lies further left
    inside = slice(40, 150)
    moved = np.roll(warped, -pixels, axis=1)[:, inside].astype(int)
    assert np.abs(moved - fixed[:, inside].astype(int)).mean() < 3
    assert np.abs(warped[:, inside].astype(int) - fixed[:, inside].astype(int)).mean() > 10


@pytest.mark.parametrize("index", [0, 7, 19])
def test_volumes_are_those_of_the_deformable_part_alone(index):
    u, grid = wave((20, 24, 18), 2.0), Geometry((20, 24, 18), np.diag([1.0, 1.0, 2.0, 1.0]))
    found = volume_change(then(u, SCALED, fixed=grid), SCALED, axis=0, index=index)
    np.testing.assert_allclose(found, determinant(torch.from_numpy(u)[None])[0, index].numpy(), atol=1e-4)
    plain = volume_change(from_matrix(SCALED, grid), SCALED, axis=0, index=index)
    np.testing.assert_allclose(plain, 1, atol=1e-4)


def test_a_single_slice_is_not_said_to_change_by_what_the_affine_part_does_across():
    grid = Geometry((20, 24, 1), np.diag([1.0, 1.0, 2.0, 1.0]))
    across = np.diag([1.0, 1.0, 3.0, 1.0])
    np.testing.assert_allclose(volume_change(from_matrix(across, grid), across, axis=2, index=0), 1, atol=1e-4)


def test_folded_voxels_have_a_colour_of_their_own(tmp_path):
    u = np.zeros((3, 20, 24, 18), "f4")
    write_pictures(scene(u), tmp_path)
    assert not any((np.asarray(Image.open(tmp_path / f"{p}_volume.png")) == FOLDED_INDEX).any() for p in ("axial",))
    u[0, 9:11] = [[[2.0]], [[-2.0]]]  # neighbours swap places
    write_pictures(scene(u), tmp_path)
    folded = np.asarray(Image.open(tmp_path / "axial_volume.png")) == FOLDED_INDEX
    columns = np.flatnonzero(folded.any(0))
    left = (320 - round(20 * 320 / 24)) / 2
    assert left + (20 - 12) * 320 / 24 <= columns.min() <= columns.max() <= left + (20 - 8) * 320 / 24
    assert (np.asarray(Image.open(tmp_path / "axial_volume.png").convert("RGB"))[folded] == warps.FOLDED).all()


def test_the_grid_is_straight_without_a_deformation_and_moves_with_one(tmp_path):
    turned = np.array([[0.9, -0.3, 0, 2], [0.3, 1.1, 0.1, 0], [0, 0, 1, 1], [0, 0, 0, 1.0]])
    u = np.zeros((3, 20, 24, 18), "f4")
    write_pictures(scene(u, turned), tmp_path / "a")
    for plane in ("axial", "coronal", "sagittal"):
        for stroke in strokes(lines_of(tmp_path / "a")[plane]["grid"]):
            assert np.ptp(stroke, axis=0).min() <= 1
    u[0] = 2
    write_pictures(scene(u, turned), tmp_path / "b")
    a, b = (
        {round(s[0, 0]) for s in strokes(lines_of(tmp_path / n)["axial"]["grid"]) if np.ptp(s[:, 0]) <= 1} for n in "ab"
    )
    shift = 2 * UNITS / 24  # what is read two voxels further right comes to lie two voxels further left, at the right
    assert len(b) > 8
    assert all(min(abs(x - shift - y) for y in a) <= 2 for x in b if x - shift >= min(a))


def test_outlines_lie_where_the_labels_are_and_the_cut_goes_through_them(tmp_path):
    label = np.zeros((20, 24, 18), "u2")
    label[2:6, 15:20, 4:8] = 1
    made = scene(np.zeros((3, 20, 24, 18), "f4"), spacing=(1.0, 2.0, 3.0))
    grid = made.fixed.geometry
    drawn = {"reference": Labelmap(label, grid, {1: "box"}), "warped_labels": label, "labels": None}
    write_pictures(Scene(**{**vars(made), **drawn}), tmp_path)
    points = (
        np.concatenate(strokes(lines_of(tmp_path)["axial"]["fixed_labels"])) * 48 / UNITS
    )  # the frame is 48 mm wide
    left = (48 - 20) / 2
    np.testing.assert_allclose(points.min(0), [left + 20 - 6, (24 - 20) * 2], atol=0.05)
    np.testing.assert_allclose(points.max(0), [left + 20 - 2, (24 - 15) * 2], atol=0.05)
    assert "before_labels" not in lines_of(tmp_path)["axial"]


def test_path_data_holds_nothing_but_path_data(tmp_path):
    write_pictures(scene(), tmp_path)
    texts = [text for lines in lines_of(tmp_path).values() for text in lines.values() if isinstance(text, str)]
    assert len(texts) == 12
    assert all(re.fullmatch(r"[ML\d -]+", text) for text in texts)


@pytest.mark.parametrize("shape", [(20, 24, 1), (150, 40, 9)])
def test_thin_and_long_scans_without_labels_have_pictures(tmp_path, shape):
    assert set(write_pictures(scene(shape=shape, labels=False), tmp_path)) == {p.name for p in tmp_path.iterdir()}
    lines = lines_of(tmp_path)
    assert set(lines["axial"]) == {"side_mm", "grid"}
    assert lines["axial"]["grid"]
