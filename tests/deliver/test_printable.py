"""The certificate catches what it must, measures what is known, and mends what it says."""

import numpy as np
import pytest
from shapes import ball, box

from fewscan.deliver.mesh import surfaces
from fewscan.deliver.printable import Printer, as_written, deviation, figures, judged, repaired, topology, walls
from fewscan.deliver.surface import Mesh, crossing_faces, together
from fewscan.errors import ConfigError


def turned(mesh):
    return Mesh(mesh.points, np.ascontiguousarray(mesh.faces[:, ::-1]))


def test_a_box_is_sound_and_fits():
    found = figures(box(), Printer())
    assert found["watertight"]
    assert found["manifold"]
    assert found["oriented"]
    assert (found["crossing_faces"], found["shells"], found["volume_ml"]) == (0, 1, 1.0)
    assert found["material_g"] == pytest.approx(1.24)
    assert judged(found, Printer()) == ([], [])


def test_two_boxes_that_overlap_cross_and_are_united():
    mesh = together([box(), box(at=(5.3, 5.2, 5.1))])
    assert crossing_faces(mesh).sum() >= 6
    mended, changed = repaired(mesh)
    assert not crossing_faces(mended).any()
    assert changed == ["2 shells that overlapped were united"]
    assert mended.volume_mm3 == pytest.approx(2000 - 4.7 * 4.8 * 4.9, rel=1e-6)


def test_a_box_inside_another_crosses_nothing():
    cavity = together([box(), turned(box((4, 4, 4), at=(3, 3, 3)))])
    assert not crossing_faces(cavity).any()
    assert topology(cavity).inverted == 0
    assert repaired(cavity)[1] == []


@pytest.mark.parametrize(
    ("move", "crosses"),
    [((0, 0, 11.0), False), ((0, 0, 9.99), True), ((10.0, 0, 0), True), ((3, 3, 10.0), True), ((10.01, 0, 0), False)],
)
def test_faces_that_touch_in_one_plane_count_as_overlap(move, crosses):
    assert crossing_faces(together([box(), box(at=move)])).any() == crosses


def test_a_vertex_pushed_through_the_opposite_wall_is_caught():
    mesh = surfaces(ball(radius_mm=6, side=18))[0].mesh
    assert not crossing_faces(mesh).any()
    points = mesh.points.copy()
    points[points[:, 0].argmax(), 0] -= 20
    pierced = Mesh(points, mesh.faces)
    assert topology(pierced).open_edges == 0
    assert crossing_faces(pierced).any()
    assert "cross or overlap" in judged(figures(pierced, Printer()), Printer())[0][0]


def test_a_folded_face_and_a_face_written_twice_are_caught():
    points = np.array([[0.0, 0, 0], [4, 0, 0], [2, 3, 0], [2, 1, 0]])
    folded = Mesh(points, np.array([[0, 1, 2], [1, 0, 3]], np.int32))
    flat = Mesh(points * [1, 1, -1], np.array([[0, 1, 2], [0, 1, 3]], np.int32))
    assert crossing_faces(folded).all()
    assert crossing_faces(flat).all()
    double = Mesh(box().points, np.concatenate([box().faces, box().faces[:1]]))
    assert crossing_faces(double).any()
    mended, changed = repaired(double)
    assert len(mended.faces) == 12
    assert changed == ["1 faces without area or written twice were dropped"]


def test_open_crowded_and_turned_faces_are_caught():
    whole = box()
    opened = figures(Mesh(whole.points, whole.faces[1:]), Printer())
    assert not opened["watertight"]
    assert not opened["manifold"]
    faces = whole.faces.copy()
    faces[0] = faces[0, ::-1]
    assert topology(Mesh(whole.points, faces)).turned_edges == 3
    assert not figures(turned(whole), Printer())["oriented"]
    mended, changed = repaired(turned(whole))
    assert mended.volume_mm3 == pytest.approx(1000)
    assert "inside out" in changed[0]


def test_boxes_that_meet_at_a_corner_or_an_edge_are_no_manifold_once_written():
    corner = as_written(together([box(), box(at=(10, 10, 10))]))
    edge = as_written(together([box(), box(at=(10, 10, 0))]))
    assert topology(corner).split_vertices == 1
    assert topology(edge).crowded_edges == 1


@pytest.mark.parametrize("thick", [0.5, 2.0])
def test_walls_and_gaps_are_measured_in_mm(thick):
    found = walls(box((30, 30, thick)), limit_mm=0.8)
    assert found["smallest_mm"] == pytest.approx(thick, abs=0.01)
    assert (found["share_below"] > 0.5) == (thick < 0.8)
    pair = together([box((30, 30, 5)), box((30, 30, 5), at=(0, 0, 5 + thick))])
    assert walls(pair, limit_mm=0.8, outwards=True)["smallest_mm"] == pytest.approx(thick, abs=0.01)
    assert walls(box(), limit_mm=0.8, outwards=True)["smallest_mm"] is None


def test_thin_and_large_parts_are_refused_with_a_remedy():
    faults, _ = judged(figures(box((30, 30, 0.5)), Printer()), Printer())
    assert "thinner than 0.8 mm" in faults[0]
    faults, _ = judged(figures(box((300, 30, 30)), Printer()), Printer())
    assert "300 x 30 x 30 mm do not fit into 250 x 210 x 210 mm" in faults[0]
    assert judged(figures(box((200, 230, 30)), Printer()), Printer())[0] == []  # turned by a right angle it fits


def test_volume_and_deviation_have_their_limits():
    good = figures(box(), Printer())
    assert "volume is off" in judged(good | {"volume_error": -0.02}, Printer())[0][0]
    assert "0.70 voxels" in judged(good | {"deviation": {"largest_voxels": 0.7}}, Printer())[0][0]


def test_deviation_is_the_distance_to_the_faces_of_voxels():
    label = ball(radius_mm=6, side=18)
    exact = surfaces(label, smooth_mm=0.0)[0].mesh
    assert deviation(exact, label, value=1)["largest_mm"] == pytest.approx(0, abs=1e-6)
    moved = Mesh(exact.points + np.array([3.0, 0, 0]), exact.faces)
    assert 2.5 <= deviation(moved, label, value=1)["largest_mm"] <= 3.01


def test_impossible_printers_are_refused():
    with pytest.raises(ConfigError, match="wall_mm must be above 0, got 0"):
        Printer(wall_mm=0.0)
    with pytest.raises(ConfigError, match="axis 1 must be above 0"):
        Printer(build_mm=(100.0, -1.0, 100.0))
