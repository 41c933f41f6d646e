"""Label maps become closed surfaces: volume, distance, walls, every awkward contact of voxels, every grid."""

import itertools

import numpy as np
import pytest
from shapes import ball, labelmap, oblique, two_boxes

from fewscan.deliver.mesh import surfaces
from fewscan.deliver.printable import as_written, deviation, topology
from fewscan.deliver.surface import crossing_faces
from fewscan.errors import DataError
from fewscan.space.geometry import Geometry
from fewscan.space.volume import IGNORE


def sound(mesh):
    """Closed, manifold, oriented and free of crossings, as a slicer reads it."""
    mesh = as_written(mesh)
    found = topology(mesh)
    faults = (found.open_edges, found.crowded_edges, found.split_vertices, found.turned_edges, found.inverted)
    return faults == (0,) * 5 and not crossing_faces(mesh).any() and mesh.volume_mm3 > 0


def roughness(mesh, centre):
    """Mean angle between faces and those of a perfect ball, degrees, by area."""
    out = mesh.points[mesh.faces].mean(1) - centre
    vectors = mesh.area_vectors
    area = np.linalg.norm(vectors, axis=1)
    cosine = np.einsum("ij,ij->i", vectors, out) / (area * np.linalg.norm(out, axis=1))
    return float(np.average(np.degrees(np.arccos(np.clip(cosine, -1, 1))), weights=area))


def test_a_ball_keeps_its_volume_and_becomes_round():
    label = ball()
    smooth, rough = (surfaces(label, smooth_mm=mm)[0] for mm in (None, 0.0))
    assert sound(smooth.mesh)
    assert smooth.mesh.volume_mm3 == pytest.approx(label.data.sum(), rel=1e-3)
    assert smooth.mesh.volume_mm3 == pytest.approx(4 / 3 * np.pi * 11**3, rel=0.01)
    assert roughness(smooth.mesh, [15.5] * 3) < roughness(rough.mesh, [15.5] * 3) / 3


@pytest.mark.parametrize("mirrored", [False, True])
def test_oblique_thick_slices_lie_where_they_are_in_the_world_and_lose_their_stairs(mirrored):
    grid = oblique((32, 32, 14))
    if mirrored:
        grid = Geometry(grid.shape, grid.affine @ np.diag([-1.0, 1, 1, 1]))
    label = ball(geometry=grid, radius_mm=12)
    smooth, rough = (surfaces(label, smooth_mm=mm)[0].mesh for mm in (None, 0.0))
    assert sound(smooth)
    assert smooth.volume_mm3 == pytest.approx(label.data.sum() * 3, rel=0.01)
    middle = grid.affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2) + grid.affine[:3, 3]
    np.testing.assert_allclose((smooth.points.min(0) + smooth.points.max(0)) / 2, middle, atol=0.5)
    assert roughness(smooth, middle) < roughness(rough, middle) / 2
    far = deviation(smooth, label, value=1)
    assert 0 < far["mean_mm"] < far["largest_mm"] <= 1.5
    assert far["largest_voxels"] <= 0.5


def test_a_sheared_grid_works_like_any_other():
    affine = np.array([[1.0, 0.3, 0, 5], [0, 1, 0.2, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    label = ball(geometry=Geometry((28, 28, 16), affine), radius_mm=9)
    found = surfaces(label)[0]
    assert sound(found.mesh)
    assert found.mesh.volume_mm3 == pytest.approx(found.voxel_mm3, rel=0.01)
    assert deviation(found.mesh, label, value=1)["largest_voxels"] <= 0.5


def test_boxes_that_touch_share_their_wall_to_the_bit():
    one, two = (s.mesh for s in surfaces(two_boxes()))
    assert sound(one)
    assert sound(two)
    shared = {tuple(p) for p in one.points.tolist()} & {tuple(p) for p in two.points.tolist()}
    walls = [
        {frozenset(map(tuple, mesh.points[face].tolist())) for face in mesh.faces if on_wall(mesh, face, shared)}
        for mesh in (one, two)
    ]
    assert walls[0] == walls[1]
    assert len(walls[0]) >= 2 * 8 * 8
    assert one.volume_mm3 == pytest.approx(two.volume_mm3, rel=0.01) == pytest.approx(7 * 8 * 8, rel=0.01)


def on_wall(mesh, face, shared):
    return all(tuple(p) in shared for p in mesh.points[face].tolist())


def test_every_contact_of_eight_voxels_is_manifold():
    """All 256 fillings of a cube of 2 x 2 x 2 voxels, one label each, on one map."""
    data = np.zeros((16 * 5, 16 * 5, 6), np.uint16)
    for number, filling in enumerate(itertools.product((False, True), repeat=8)):
        x, y = divmod(number, 16)
        block = data[5 * x + 1 : 5 * x + 3, 5 * y + 1 : 5 * y + 3, 2:4]
        block[np.array(filling).reshape(2, 2, 2)] = number + 1
    for smooth_mm in (0.0, None):
        found = surfaces(labelmap(data), smooth_mm=smooth_mm)
        assert len(found) == 255
        assert [s.name for s in found if not sound(s.mesh)] == []


def test_noise_of_three_labels_is_manifold_and_keeps_its_volumes():
    data = np.random.default_rng(0).integers(0, 4, (12, 12, 12))
    for found in surfaces(labelmap(data)):
        assert sound(found.mesh)
        assert found.mesh.volume_mm3 == pytest.approx(found.voxel_mm3, rel=0.1)


def test_an_edge_shared_twice_by_one_sheet_gets_vertices_of_its_own():
    """Two voxels that touch by an edge and are joined around both of its ends."""
    data = np.zeros((8, 8, 7), np.uint16)
    data[2, 2, 3] = data[3, 3, 3] = 1
    data[2:4, 2:4, 2] = data[2:4, 2:4, 4] = 1
    for smooth_mm in (0.0, None):
        assert sound(surfaces(labelmap(data), smooth_mm=smooth_mm)[0].mesh)


def test_one_voxel_the_border_and_two_hundred_labels_end_in_sound_meshes():
    data = np.zeros((5, 5, 5), np.uint16)
    data[2, 2, 2] = 1
    assert sound(surfaces(labelmap(data))[0].mesh)
    whole = surfaces(labelmap(np.ones((4, 5, 6))))[0]
    assert sound(whole.mesh)
    assert whole.mesh.volume_mm3 == pytest.approx(120, rel=0.01)
    many = np.kron(np.arange(1, 201).reshape(10, 10, 2), np.ones((3, 3, 3), int))
    found = surfaces(labelmap(many))
    assert len(found) == 200
    assert all(sound(s.mesh) for s in found)


def test_nothing_to_mesh_is_refused_and_ignored_voxels_are_background():
    with pytest.raises(DataError, match="holds no label"):
        surfaces(labelmap(np.zeros((4, 4, 4))))
    data = np.full((6, 6, 6), IGNORE)
    data[2:4, 2:4, 2:4] = 1
    assert [s.value for s in surfaces(labelmap(data, names={1: "one"}))] == [1]


def test_names_of_labels_and_their_order_change_nothing():
    label = two_boxes()
    swapped = labelmap(np.where(label.data == 1, 2, np.where(label.data == 2, 1, 0)))
    a, b = surfaces(label), surfaces(swapped)
    np.testing.assert_allclose(np.sort(a[0].mesh.points, 0), np.sort(b[1].mesh.points, 0), atol=1e-5)
