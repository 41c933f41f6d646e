"""Displacements: composition, flows, inverses, Jacobians, worlds, warped images and turned directions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from torch import Tensor

from fewscan.errors import GeometryError
from fewscan.space import field as fields
from fewscan.space.field import Field
from fewscan.space.geometry import Array, Geometry, with_spacing

GRID = (16, 14, 12)
FINE = (32, 28, 24)


def turn(axis: int, degrees: float) -> Array:
    """Rotation of world directions about one axis, (3, 3)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = [a for a in range(3) if a != axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def oblique(shape: tuple[int, int, int], spacing: tuple[float, float, float], at: tuple[float, ...]) -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = turn(0, 20) @ turn(2, -15) @ np.diag(spacing)
    affine[:3, 3] = at
    return Geometry(shape, affine)


FIXED = oblique((7, 6, 5), (1.0, 1.5, 3.0), (-5.0, 4.0, 11.0))
MOVING = oblique((9, 5, 8), (0.9, 2.0, 1.2), (-6.0, 3.0, 10.0))


def smooth(seed: int = 0, *, size: float = 1.0, shape: tuple[int, ...] = GRID) -> Tensor:
    """Gentle waves, still at the border, (1, 3, X, Y, Z)."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(0, math.pi, n) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    bump = np.sin(x) ** 2 * np.sin(y) ** 2 * np.sin(z) ** 2
    return torch.from_numpy(np.stack([bump * w for w in size * rng.uniform(-1, 1, 3)])[None])


def inner(u: Tensor, margin: int = 3) -> Tensor:
    return u[..., margin:-margin, margin:-margin, margin:-margin]


def voxels(geometry: Geometry) -> Array:
    """Indices in homogeneous coordinates, (4, X, Y, Z)."""
    return np.concatenate([np.indices(geometry.shape).astype(float), np.ones((1, *geometry.shape))])


def to_world(geometry: Geometry, places: Array) -> Array:
    return np.einsum("ij,jxyz->ixyz", geometry.affine, places)


def scaling(factors: tuple[float, float, float], shape: tuple[int, int, int] = (5, 6, 7)) -> Tensor:
    index = torch.from_numpy(np.indices(shape).astype(float))
    return ((torch.tensor(factors).view(3, 1, 1, 1) - 1) * index)[None]


# ------------------------------------------------------------------------------------------------ maps on one grid


def test_a_zero_displacement_changes_nothing() -> None:
    image, zero, u = torch.rand(2, 3, *GRID), torch.zeros(2, 3, *GRID), smooth().float().expand(2, -1, -1, -1, -1)
    torch.testing.assert_close(fields.warp(image, zero), image)
    torch.testing.assert_close(fields.compose(zero, u), u)
    torch.testing.assert_close(fields.compose(u, zero), u)
    torch.testing.assert_close(fields.integrate(zero), zero)
    torch.testing.assert_close(fields.invert(zero), zero)
    assert bool((fields.determinant(zero) == 1).all())


@given(a=st.lists(st.floats(-3, 3), min_size=3, max_size=3), b=st.lists(st.floats(-3, 3), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_translations_compose_by_addition(a: list[float], b: list[float]) -> None:
    u, w = (torch.tensor(t).view(1, 3, 1, 1, 1).expand(1, 3, 5, 4, 3) for t in (a, b))
    torch.testing.assert_close(fields.compose(u, w), u + w, atol=1e-5, rtol=1e-5)


def test_warping_by_a_composition_is_warping_twice() -> None:
    index = torch.from_numpy(np.indices(GRID).astype(float))[None]  # linear, so that interpolation is exact
    u, w = smooth(1), smooth(2)
    torch.testing.assert_close(
        inner(fields.warp(index, fields.compose(u, w))), inner(fields.warp(fields.warp(index, u), w)), atol=1e-9, rtol=0
    )


def test_warp_refuses_a_field_on_another_grid() -> None:
    with pytest.raises(GeometryError, match=r"must be \(1, 3, 6, 6, 6\).*got \(1, 3, 3, 3, 3\).*field\.resize"):
        fields.warp(torch.zeros(1, 1, 6, 6, 6), torch.zeros(1, 3, 3, 3, 3))


def test_flows_forth_and_back_cancel_away_from_the_border() -> None:
    v = smooth(3, size=1.5, shape=FINE)
    there, back = fields.integrate(v), fields.integrate(-v)
    assert float(there.abs().max()) > 0.5
    assert float(inner(fields.compose(there, back)).abs().max()) < 0.03
    assert fields.folding(there) == 0


def test_the_flow_of_a_constant_velocity_is_that_velocity() -> None:
    v = torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1, 1).expand(1, 3, 6, 6, 6)
    torch.testing.assert_close(fields.integrate(v), v)


@pytest.mark.parametrize("squarings", [4, 8])
def test_a_linear_flow_is_the_exponential(squarings: int) -> None:
    v = torch.zeros(1, 3, 40, 1, 1, dtype=torch.float64)
    v[0, 0, :, 0, 0] = -0.5 * torch.arange(40)  # x' = -x / 2, so that x(1) = x / sqrt(e), always on the grid
    x = torch.arange(40) + fields.integrate(v, squarings=squarings)[0, 0, :, 0, 0]
    torch.testing.assert_close(x, math.exp(-0.5) * torch.arange(40).double(), atol=0.5 * 40 / 2**squarings, rtol=0)


def test_an_inverse_undoes_its_displacement() -> None:
    u = smooth(4, size=1.5, shape=FINE)
    w = fields.invert(u)
    assert float(fields.compose(u, w).abs().max()) < 0.01  # what the iteration stops at
    assert float(inner(fields.compose(w, u)).abs().max()) < 0.05


# --------------------------------------------------------------------------------------------------------- Jacobian


def test_the_determinant_of_a_scaling_is_its_volume() -> None:
    det = fields.determinant(scaling((2.0, 0.5, 3.0)))
    torch.testing.assert_close(det, torch.full((1, 5, 6, 7), 3.0, dtype=det.dtype))


def test_entry_i_j_of_the_jacobian_is_the_change_of_i_along_j() -> None:
    u = torch.zeros(1, 3, 4, 4, 4)
    u[0, 0] = 0.25 * torch.arange(4.0).view(1, 1, 4)  # the first component grows along the last axis
    expected = torch.eye(3)
    expected[0, 2] = 0.25
    torch.testing.assert_close(fields.jacobian(u)[0, :, :, 1, 2, 3], expected)


def test_folding_is_the_share_of_turned_over_voxels() -> None:
    assert fields.folding(scaling((-1.0, 1.0, 1.0))) == 1  # mirrored everywhere
    u = torch.zeros(1, 3, 10, 4, 4)
    u[0, 0, 5:] = -3 * torch.arange(5.0).view(5, 1, 1)  # from x = 5 on: 5, 3, 1, -1, -3
    assert fields.folding(u) == pytest.approx(0.5, abs=0.11)
    assert fields.folding(torch.zeros(1, 3, 10, 4, 4)) == 0


def test_axes_of_one_voxel_have_a_jacobian() -> None:
    assert fields.determinant(torch.rand(1, 3, 4, 1, 5) * 0.1).shape == (1, 4, 1, 5)


# ----------------------------------------------------------------------------------------------------------- resize


def test_resizing_keeps_the_displacement_in_millimetres() -> None:
    u = torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1, 1).expand(1, 3, *FIXED.shape)
    finer = with_spacing(FIXED, (0.5, 1.5, 1.5))
    other = fields.resize(u, finer.shape)
    before, after = (
        Field(w[0].numpy(), g).millimetres()[:, 2, 2, 2] for w, g in ((u.contiguous(), FIXED), (other, finer))
    )
    np.testing.assert_allclose(before, after, atol=1e-5)


def test_resizing_there_and_back_keeps_a_smooth_field() -> None:
    u = smooth(5)
    torch.testing.assert_close(fields.resize(fields.resize(u, FINE), GRID), u, atol=0.05, rtol=0)
    assert fields.resize(u, GRID) is u


# ----------------------------------------------------------------------------------------------------------- worlds


def test_a_field_checks_itself() -> None:
    with pytest.raises(GeometryError, match=r"must be \(3, \(7, 6, 5\)\), got \(3, 5, 6, 7\)"):
        Field(np.zeros((3, 5, 6, 7), np.float32), FIXED)
    for bad in (np.nan, np.inf):
        u = np.zeros((3, *FIXED.shape), np.float32)
        u[1, 2, 3, 4] = bad
        with pytest.raises(GeometryError, match="not finite"):
            Field(u, FIXED)


def world_map() -> Array:
    matrix = np.eye(4)
    matrix[:3, :3] = turn(1, 12) @ np.diag([1.1, 0.9, 1.0])
    matrix[:3, 3] = 2.0, -1.0, 0.5
    return matrix


def test_the_field_of_an_affine_map_reaches_the_mapped_world_point() -> None:
    found = fields.from_matrix(world_map(), FIXED)
    index = voxels(FIXED)
    wanted = np.einsum("ij,jxyz->ixyz", world_map(), to_world(FIXED, index))
    np.testing.assert_allclose(found.millimetres(), (wanted - to_world(FIXED, index))[:3], atol=1e-4)
    reached = index.copy()
    reached[:3] += found.to_moving(MOVING)
    np.testing.assert_allclose(to_world(MOVING, reached), wanted, atol=1e-4)


def test_then_moves_by_the_field_first_and_by_the_matrix_second() -> None:
    u = np.random.default_rng(0).normal(0, 1, (3, *FIXED.shape)).astype(np.float32)
    found = fields.then(u, world_map(), fixed=FIXED)
    moved = voxels(FIXED)
    moved[:3] += u
    wanted = np.einsum("ij,jxyz->ixyz", world_map(), to_world(FIXED, moved))
    reached = voxels(FIXED)
    reached[:3] += found.u
    np.testing.assert_allclose(to_world(FIXED, reached), wanted, atol=1e-4)


def test_millimetres_of_one_voxel_by_hand() -> None:
    affine = np.array([[0.0, 2, 0, 0], [3, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]])  # the axes go to A, R and S
    u = np.array([1.0, 10.0, 100.0], np.float32).reshape(3, 1, 1, 1)
    assert Field(u, Geometry((1, 1, 1), affine)).millimetres().ravel().tolist() == [20.0, 3.0, 400.0]


# ----------------------------------------------------------------------------------------------------------- images


def places(field: Field, moving: Geometry) -> Array:
    """Where each fixed voxel is read, in voxels of the moving grid; by way of the world."""
    index = voxels(field.fixed)
    index[:3] += field.u
    return np.einsum("ij,jxyz->ixyz", np.linalg.inv(moving.affine), to_world(field.fixed, index))[:3]


def beyond(at: Array, shape: tuple[int, ...]) -> np.ndarray:
    size = np.array(shape).reshape(3, 1, 1, 1)
    return ((at < -0.5) | (at > size - 0.5)).any(0)


def test_a_warped_array_is_read_through_the_world() -> None:
    data = np.random.default_rng(1).integers(0, 200, (2, *MOVING.shape)).astype(np.int16)
    field = fields.from_matrix(world_map(), FIXED)
    at = places(field, MOVING)
    out = fields.warp_array(data, MOVING, field=field, background=-7.0)
    outside = beyond(at, MOVING.shape)
    assert 0 < outside.mean() < 1
    assert (out[:, outside] == -7).all()
    for channel, warped in zip(data, out, strict=True):
        wanted = map_coordinates(channel.astype(float), at, order=1, mode="nearest")
        np.testing.assert_allclose(warped[~outside], wanted[~outside], atol=0.05)


def test_warped_labels_are_the_largest_share_and_keep_their_type() -> None:
    label = np.random.default_rng(2).choice([0, 3, 65535], MOVING.shape).astype(np.uint16)
    field = fields.from_matrix(world_map(), FIXED)
    at, out = places(field, MOVING), fields.warp_labels(label, MOVING, field=field)
    shares = np.stack([map_coordinates((label == v).astype(float), at, order=1, mode="nearest") for v in (0, 3, 65535)])
    clear = np.sort(shares, 0)[-1] - np.sort(shares, 0)[-2] > 1e-3
    wanted = np.where(beyond(at, MOVING.shape), 0, np.array([0, 3, 65535])[shares.argmax(0)])
    assert out.dtype == np.uint16
    np.testing.assert_array_equal(out[clear], wanted[clear])


def test_the_nearest_voxel_is_taken_and_zero_beyond() -> None:
    values = np.random.default_rng(3).normal(0, 1, MOVING.shape).astype(np.float32)
    field = fields.from_matrix(world_map(), FIXED)
    at = places(field, MOVING)
    out = fields.warp_nearest(values, MOVING, field=field)
    index = np.rint(at).astype(int)
    inside = ((index >= 0) & (index < np.array(MOVING.shape).reshape(3, 1, 1, 1))).all(0)
    clear = (np.abs(at - np.floor(at) - 0.5) > 1e-3).all(0)
    assert 0 < inside.mean() < 1
    np.testing.assert_array_equal(out[inside & clear], values[tuple(index[:, inside & clear])])
    assert (out[~inside & clear] == 0).all()


def test_nothing_moves_on_its_own_grid() -> None:
    still = fields.from_matrix(np.eye(4), FIXED)
    image = np.random.default_rng(4).normal(0, 1, (1, *FIXED.shape)).astype(np.float32)
    label = (image[0] > 0).astype(np.uint16)
    np.testing.assert_allclose(fields.warp_array(image, FIXED, field=still), image, atol=1e-4)
    np.testing.assert_array_equal(fields.warp_labels(label, FIXED, field=still), label)
    np.testing.assert_array_equal(fields.warp_nearest(label, FIXED, field=still), label)


# ------------------------------------------------------------------------------------------------------- directions


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 2.0, 3.5)])
def test_turning_image_and_directions_together_leaves_the_world_as_it_was(
    axis: int, spacing: tuple[float, float, float]
) -> None:
    fixed = oblique((5, 6, 4), spacing, (1.0, 2.0, 3.0))
    matrix = np.eye(4)
    matrix[:3, :3] = turn(axis, 25)
    u = torch.from_numpy(fields.from_matrix(matrix, fixed).u)[None].double()
    ours = np.array([[0.6, 0.8, 0.0], [0.0, -3.0, 4.0]])  # two directions per voxel, of length 1 and 5
    theirs = ours @ matrix[:3, :3].T  # as the turned moving image holds them
    sampled = torch.from_numpy(theirs).reshape(1, 6, 1, 1, 1).expand(1, 6, *fixed.shape)
    turned = fields.reorient(sampled, u, world=torch.from_numpy(fixed.affine[:3, :3].copy()))
    wanted = torch.from_numpy(ours).reshape(1, 6, 1, 1, 1).expand_as(turned)
    torch.testing.assert_close(turned, wanted, atol=1e-4, rtol=0)


def test_directions_follow_a_stretch_and_keep_their_length() -> None:
    u = scaling((2.0, 1.0, 1.0))  # the fixed image is half as long: a fibre at 45 degrees gets steeper there
    sampled = torch.tensor([1.0, 1.0, 0.0]).double().view(1, 3, 1, 1, 1).expand(1, 3, 5, 6, 7)
    turned = fields.reorient(sampled, u)[0, :, 2, 2, 2]
    torch.testing.assert_close(turned, math.sqrt(2) * torch.tensor([0.5, 1.0, 0.0]).double() / math.sqrt(1.25))


def test_no_direction_stays_no_direction_even_where_the_field_collapses() -> None:
    sampled = torch.zeros(1, 3, 5, 6, 7, dtype=torch.float64)
    assert bool((fields.reorient(sampled, scaling((0.0, 1.0, 1.0))) == 0).all())
    sampled[:, 1] = 1
    assert bool(fields.reorient(sampled, scaling((0.0, 1.0, 1.0))).isfinite().all())
