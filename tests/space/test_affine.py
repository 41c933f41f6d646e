"""Rigid and affine maps between worlds: recovered on any spacing, contrast and offset."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from blobs import blobs, grid, unit, world

from fewscan.errors import GeometryError
from fewscan.space import affine, similarity
from fewscan.space.geometry import Array, Geometry
from fewscan.space.orientation import rotations

FIXED = grid((26, 28, 24), (2.0, 2.0, 2.0))
MOVING = grid((36, 32, 18), (1.5, 1.8, 2.8), tilt=0.1)


def rigid_map() -> Array:
    parameters = torch.tensor([0.15, -0.1, 0.2, 0, 0, 0, 0, 0, 0, 3.0, -2.0, 2.5], dtype=torch.float64)
    return affine.build(parameters, torch.zeros(3, dtype=torch.float64)).numpy()


def affine_map() -> Array:
    parameters = torch.tensor([0.1, 0.12, -0.1, 0.1, -0.12, 0.05, 0.1, 0, -0.06, 2.0, 3.0, -2.0], dtype=torch.float64)
    return affine.build(parameters, torch.zeros(3, dtype=torch.float64)).numpy()


def moved(geometry: Geometry, matrix: Array) -> Array:
    """The blobs after ``matrix`` has moved them, so that it is the map from fixed to moving."""
    back = np.linalg.inv(matrix)
    return blobs(np.einsum("ij,jxyz->ixyz", back[:3, :3], world(geometry)) + back[:3, 3, None, None, None])


def miss_mm(found: Array, wanted: Array) -> float:
    """Largest distance between two maps inside the head."""
    places = world(FIXED)[:, 5:-5, 5:-5, 5:-5].reshape(3, -1)
    gap = (found - wanted)[:3, :3] @ places + (found - wanted)[:3, 3:]
    return float(np.linalg.norm(gap, axis=0).max())


@pytest.mark.parametrize("rigid", [True, False])
@pytest.mark.parametrize("other", [FIXED, MOVING], ids=["same grid", "other grid"])
def test_a_known_map_is_recovered_within_half_a_voxel(rigid: bool, other: Geometry) -> None:
    wanted = rigid_map() if rigid else affine_map()
    found = affine.fit(unit(blobs(world(FIXED))), unit(moved(other, wanted)), grids=(FIXED, other), rigid=rigid)
    assert miss_mm(np.eye(4), wanted) > 4
    assert miss_mm(found, wanted) < 1.0
    if rigid:
        np.testing.assert_allclose(np.linalg.svd(found[:3, :3])[1], 1, atol=1e-6)
        assert np.linalg.det(found[:3, :3]) > 0


def test_the_starts_are_tilts_and_each_way_in_which_a_cube_can_lie() -> None:
    middle, shift = torch.zeros(3, dtype=torch.float64), np.array([3.0, -2.0, 1.0])
    starts = [affine.build(start, middle).numpy() for start in affine._turned(shift)]
    assert all(np.array_equal(start[:3, 3], shift) for start in starts)
    lying = {tuple(start[:3, :3].round().astype(int).ravel()) for start in starts[12:]}
    assert lying == {tuple(way.astype(int).ravel()) for way in rotations()} - {tuple(np.eye(3, dtype=int).ravel())}
    for start in starts[12:]:
        np.testing.assert_allclose(start[:3, :3], start[:3, :3].round(), atol=1e-12)
        assert np.linalg.det(start[:3, :3]) == pytest.approx(1)
    tilted = [math.degrees(math.acos((np.trace(start[:3, :3]) - 1) / 2)) for start in starts[:12]]
    assert sorted(round(angle) for angle in tilted) == [30] * 6 + [60] * 6


def test_inverted_contrast_is_matched_by_mutual_information() -> None:
    wanted = rigid_map()
    other = np.exp(-2 * moved(MOVING, wanted))  # bright becomes dark, and not in proportion
    found = affine.fit(unit(blobs(world(FIXED))), unit(other), grids=(FIXED, MOVING), rigid=True, measure=similarity.mi)
    assert miss_mm(found, wanted) < 1.0


def shifted_by(offset: list[float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = offset
    return matrix


def test_scans_that_lie_far_apart_are_started_from_their_centres() -> None:
    far = shifted_by([300.0, -200.0, 500.0])
    distant = Geometry(MOVING.shape, far @ MOVING.affine)
    wanted = far @ rigid_map()
    image = unit(moved(MOVING, rigid_map()))
    found = affine.fit(unit(blobs(world(FIXED))), image, grids=(FIXED, distant), rigid=True)
    assert miss_mm(found, wanted) < 1.0


def test_a_scan_of_a_small_part_of_the_other_is_no_lack_of_overlap() -> None:
    small = grid((10, 10, 10), (2.0, 2.0, 2.0))  # a twentieth of the fixed block
    found = affine.fit(unit(blobs(world(FIXED))), unit(blobs(world(small))), grids=(FIXED, small), rigid=True)
    assert miss_mm(found, np.eye(4)) < 2.0


@pytest.mark.parametrize("degrees", [(0.0, 0.0, 50.0), (70.0, 0.0, 0.0), (90.0, 0.0, 90.0), (180.0, 10.0, 0.0)])
def test_a_scan_that_lies_turned_is_turned_back(degrees: tuple[float, float, float]) -> None:
    angles = [math.radians(angle) for angle in degrees]
    parameters = torch.tensor([*angles, *[0.0] * 6, 2.0, -3.0, 1.0], dtype=torch.float64)
    middle = torch.tensor(affine.centre_mm(unit(blobs(world(FIXED))), FIXED))
    wanted = affine.build(parameters, middle).numpy()
    cube = grid((36, 36, 36), (2.0, 2.0, 2.0))
    found = affine.fit(
        unit(blobs(world(FIXED))), unit(moved(cube, wanted)), grids=(FIXED, cube), rigid=True, turned=True
    )
    assert miss_mm(found, wanted) < 1.0


def test_only_what_has_weight_is_matched() -> None:
    wanted = shifted_by([3.0, 0.0, 0.0])
    still, other = blobs(world(FIXED)), moved(FIXED, wanted)
    near = (slice(None), slice(None, 9), slice(None))
    still[near] += 6 * blobs(world(FIXED), seed=5)[near]  # stays where it was, and is brighter than all else
    other[near] += 6 * blobs(world(FIXED), seed=5)[near]
    weight = torch.ones(1, *FIXED.shape)
    weight[:, :, :11] = 0
    found = [affine.fit(unit(still), unit(other), grids=(FIXED, FIXED), rigid=True, weight=w) for w in (None, weight)]
    assert miss_mm(found[1], wanted) < 1.0 < miss_mm(found[0], wanted)


def test_nothing_to_overlap_is_refused() -> None:
    with pytest.raises(GeometryError, match="do not overlap, neither by their headers nor by their centres"):
        affine.fit(unit(blobs(world(FIXED))), unit(blobs(world(FIXED))), grids=(FIXED, FIXED), measure=_never_finite)


def _never_finite(fixed: torch.Tensor, warped: torch.Tensor, *, weight: torch.Tensor | None = None) -> torch.Tensor:
    return warped.sum() * float("nan")


def test_the_parts_of_a_matrix_by_hand() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    quarter = torch.tensor([0, 0, math.pi / 2, 0, 0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    about = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    np.testing.assert_allclose(
        affine.build(quarter, about) @ torch.tensor([2.0, 0, 0, 1]).double(), [1, 1, 0, 1], atol=1e-9
    )
    scale = torch.tensor([0, 0, 0, math.log(2), 0, 0, 0, 0, 0, 0, 5.0, 0], dtype=torch.float64)
    np.testing.assert_allclose(
        affine.build(scale, zero) @ torch.tensor([1.0, 1, 1, 1]).double(), [2, 6, 1, 1], atol=1e-9
    )


def test_the_centre_of_one_bright_voxel_is_its_place() -> None:
    image = torch.full((1, *MOVING.shape), -3.0)
    image[0, 4, 20, 7] = 2.0
    np.testing.assert_allclose(affine.centre_mm(image, MOVING), world(MOVING)[:, 4, 20, 7], atol=1e-6)
    np.testing.assert_allclose(affine.centre_mm(torch.ones(1, *MOVING.shape), MOVING), 0, atol=1e-6)
