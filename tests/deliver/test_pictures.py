import json
import re

import numpy as np
import pytest
from PIL import Image

from fewscan.deliver.charts import axis_for
from fewscan.deliver.pictures import curve_png, read_history, three_planes
from fewscan.errors import DataError
from fewscan.space.combinations import combine
from fewscan.space.geometry import Geometry
from fewscan.space.volume import IGNORE, Labelmap


def drawn(label, other=None, *, image=None, spacing=(1.0, 1.0, 1.0)):
    """The three cuts of label maps given as arrays."""
    geometry = Geometry(label.shape, np.diag([*spacing, 1.0]))
    maps = [
        Labelmap(part.astype(np.uint16), geometry, {1: "ball"}) for part in (label, label if other is None else other)
    ]
    return three_planes(*maps, image=image)


def corner_points(svg, kind):
    path = re.search(rf'class="{kind}" d="([^"]*)"', svg).group(1)
    return np.array([[float(v) for v in p.split()] for p in re.split("[ML]", path) if p])


def test_outline_lies_where_the_label_is_in_millimetres_and_radiological_order():
    label = np.zeros((20, 24, 10), int)
    label[2:6, 15:20, 4:8] = 1  # low x is the patient's left, shown at the right; high y is the front, shown at the top
    axial = drawn(label, spacing=(1.0, 2.0, 3.0))[0]
    points = corner_points(axial.svg, "reference")
    assert points[:, 0].min() == pytest.approx(20 - 6)
    assert points[:, 0].max() == pytest.approx(20 - 2)
    assert points[:, 1].min() == pytest.approx((24 - 20) * 2)
    assert points[:, 1].max() == pytest.approx((24 - 15) * 2)
    assert (axial.left, axial.top) == ("R", "A")


def test_image_and_outline_share_one_frame():
    label = np.zeros((12, 12, 12), int)
    label[4:8, 4:8, 4:8] = 1
    noise = np.random.default_rng(0).normal(size=label.shape)
    svg = drawn(label, image=noise)[0].svg
    x, y, w, h = (float(re.search(rf'<image.* {k}="([^"]+)"', svg).group(1)) for k in ("x", "y", "width", "height"))
    points = corner_points(svg, "reference")
    assert (points.min(0) == [4, 4]).all()
    assert (points.max(0) == [8, 8]).all()
    assert x <= 4
    assert y <= 4
    assert x + w >= 8
    assert y + h >= 8


def test_the_cut_goes_through_the_structure_and_not_through_its_hollow():
    label = np.zeros((9, 9, 9), int)
    label[:, :, 0] = label[:, :, 8] = 1
    assert corner_points(drawn(label)[0].svg, "reference").size


def test_a_cut_is_shown_where_there_is_most_of_what_is_looked_for():
    label = np.zeros((12, 12, 20), int)
    label[2:10, 2:10, 3:18] = 1
    grown = label.copy()
    grown[10:12, 2:10, 15] = 1  # far from the middle, which is cut 10
    geometry = Geometry(label.shape, np.eye(4))
    one, other = (Labelmap(part.astype(np.uint16), geometry, {1: "ball"}) for part in (label, grown))
    plain, there = (three_planes(one, other, most_of=voxels)[0].svg for voxels in (None, label != grown))
    assert np.ptp(corner_points(plain, "prediction"), axis=0).tolist() == [8, 8]
    assert np.ptp(corner_points(there, "prediction"), axis=0).tolist() == [10, 8]
    assert three_planes(one, one, most_of=label != label) == three_planes(one, one)


def test_ignored_voxels_and_empty_maps_draw_nothing():
    label = np.full((6, 6, 6), IGNORE)
    for plane in drawn(label, np.zeros_like(label)):
        assert 'class="reference" d=""' in plane.svg


def test_labels_that_overlap_are_outlined_whole():
    rods = np.zeros((2, 20, 20, 20), bool)
    rods[0, 8:12, 8:12] = True
    rods[1, :, 8:12, 8:12] = True
    codes, table = combine(rods, (20, 20, 20))
    both = Labelmap(codes, Geometry((20, 20, 20), np.eye(4)), {1: "upright", 2: "across"}, table)
    coronal = next(plane for plane in three_planes(both, both) if plane.name == "coronal")
    paths = re.search(r'class="reference" d="([^"]*)"', coronal.svg).group(1).split("M")[1:]
    points = [np.array([[float(v) for v in p.split()] for p in path.split("L")]) for path in paths]
    assert [tuple(np.ptp(one, 0)) for one in points] == [(4, 20), (20, 4)]


def test_pictures_of_a_large_noisy_scan_stay_small():
    label = np.zeros((300, 300, 4), int)
    label[5:295, 5:295] = 1
    noise = np.random.default_rng(0).normal(size=label.shape)
    for plane in drawn(label, image=noise, spacing=(0.7, 0.7, 5.0)):
        assert len(re.search(r"base64,([^\"]+)", plane.svg).group(1)) < 60_000


def test_history_forgives_only_a_cut_last_line(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [h["step"] for h in read_history(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_history(path)


def test_curve_picture_is_written_for_any_history(tmp_path):
    history = tmp_path / "history.jsonl"
    for lines in ([], [{"step": 1, "seconds": 0.1, "loss": 1.0}], [{"step": 1, "seconds": 0.1, "loss": float("nan")}]):
        history.write_text("".join(json.dumps(line) + "\n" for line in lines))
        curve_png(history, tmp_path / "curve.png")
        with Image.open(tmp_path / "curve.png") as picture:
            assert picture.size[0] > 800


@pytest.mark.parametrize("values", [[], [0.5], [0.0, 0.0], [0.62, 0.9], [3.0, 1e6], [float("nan"), 2.0]])
def test_axis_holds_its_values_and_has_a_few_marks(values):
    axis = axis_for(values)
    assert 2 <= len(axis.marks) <= 7
    assert all(axis.low <= v <= axis.high for v in values if v == v)
