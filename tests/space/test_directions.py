"""Directions turn with what holds them: tubes drawn turned are tubes turned, and nothing depends on a sign."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewscan.space import directions, field, kernels
from fewscan.space.directions import congruent, follow, matrices, mirrored, raw_sizes, reorient, sizes
from fewscan.space.geometry import Array, Geometry
from fewscan.space.volume import Kind

SHAPE = (15, 16, 17)
STRAIGHT = np.eye(3)
VECTORS: tuple[Kind, ...] = ("peaks", "tensor")


def turn(angles: tuple[float, float, float]) -> Array:
    """Rotation about the three axes, rad."""
    (a, b, c), eye = angles, np.eye(3)
    for i, j, angle in ((0, 1, a), (0, 2, b), (1, 2, c)):
        one = np.eye(3)
        one[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        eye = eye @ one
    return np.asarray(eye)


def offsets(spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Array:
    """Places (3, X, Y, Z) from the middle, mm."""
    middle = (np.array(SHAPE) - 1) / 2
    return (np.indices(SHAPE) - middle.reshape(3, 1, 1, 1)) * np.array(spacing).reshape(3, 1, 1, 1)


def tube(direction: Array, kind: Kind, *, places: Array | None = None, seed: int = 0) -> Tensor:
    """A soft tube through the middle as a file holds it: peaks of random sign, or a prolate tensor in a round one."""
    places = offsets() if places is None else places
    d = direction / np.linalg.norm(direction)
    away = places - d.reshape(3, 1, 1, 1) * np.einsum("i,ixyz->xyz", d, places)
    inside = np.exp(-(away**2).sum(0) / (2 * 2.5**2))
    if kind == "peaks":
        sign = np.random.default_rng(seed).choice([-1, 1], inside.shape)
        return torch.from_numpy((d.reshape(3, 1, 1, 1) * inside * sign).astype(np.float32))
    full = np.eye(3)[:, :, None, None, None] * 0.7 + np.einsum("i,j,xyz->ijxyz", d, d, inside)
    return torch.from_numpy(np.stack([full[i, j] for i, j in directions.ORDER]).astype(np.float32))


def drawn(direction: Array, kind: Kind, **how: Array) -> Tensor:
    return matrices(tube(direction, kind, **how), kind, axes=STRAIGHT)[None]  # type: ignore[arg-type]


def affine_displacement(linear: Array) -> Tensor:
    """About the middle, voxels of 1 mm."""
    places = offsets()
    return torch.from_numpy((np.einsum("ij,jxyz->ixyz", linear, places) - places).astype(np.float32))[None]


def wavy(seed: int, reach: float = 1.5) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    control = torch.randn(1, 3, 4, 4, 4, generator=rng) * reach
    return torch.nn.functional.interpolate(control, size=SHAPE, mode="trilinear", align_corners=True)


def eigenvalues(data: Tensor) -> Tensor:
    """(N, 3), ascending."""
    full = data.unflatten(-4, (-1, 6))[..., [0, 1, 2, 1, 3, 4, 2, 4, 5], :, :, :]
    return torch.linalg.eigvalsh(full.movedim(-4, -1).unflatten(-1, (3, 3)).reshape(-1, 3, 3).double())


@pytest.mark.parametrize("kind", VECTORS)
@settings(deadline=None, max_examples=25)
@given(angles=st.tuples(*[st.floats(-1.2, 1.2)] * 3), way=st.sampled_from([(1, 0, 0), (0, 1, 1), (1, -2, 0.5)]))
def test_a_turned_tube_is_the_tube_drawn_turned(
    kind: Kind, angles: tuple[float, float, float], way: tuple[float, float, float]
) -> None:
    rotation, direction = turn(angles), np.array(way)
    u = affine_displacement(rotation)
    moved = reorient(kernels.sample(drawn(direction, kind), u), u, kind=kind, spacing=(1, 1, 1))
    wanted = drawn(rotation.T @ direction, kind)
    box = (slice(None), slice(None), *[slice(4, -4)] * 3)  # what is read from beyond the grid is repeated
    torch.testing.assert_close(moved[box], wanted[box], atol=0.06, rtol=0)


def test_without_the_turn_a_turned_tube_is_wrong() -> None:
    direction, rotation = np.array([1.0, 0.0, 0.0]), turn((0.8, 0.0, 0.0))
    u = affine_displacement(rotation)
    for kind in VECTORS:
        wanted = drawn(rotation.T @ direction, kind)
        assert float((kernels.sample(drawn(direction, kind), u) - wanted).abs().max()) > 0.4


@pytest.mark.parametrize("kind", VECTORS)
def test_a_tube_on_thick_slices_turns_in_millimetres(kind: Kind) -> None:
    spacing, rotation, direction = (1.0, 1.0, 2.0), turn((0.0, 0.5, 0.3)), np.array([1.0, 0.0, 0.0])
    mm = np.array(spacing)
    voxels = np.linalg.inv(np.diag(mm)) @ rotation @ np.diag(mm)
    u = affine_displacement(voxels)
    source = drawn(direction, kind, places=offsets(spacing))
    moved = reorient(kernels.sample(source, u), u, kind=kind, spacing=spacing)
    wanted = drawn(rotation.T @ direction, kind, places=offsets(spacing))
    box = (slice(None), slice(None), *[slice(4, -4)] * 3)
    torch.testing.assert_close(moved[box], wanted[box], atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", VECTORS)
def test_a_mirrored_tube_is_the_tube_drawn_mirrored(kind: Kind) -> None:
    direction = np.array([1.0, 2.0, -1.0])
    u = affine_displacement(np.diag([-1.0, 1.0, 1.0]))
    wanted = drawn(np.array([-1.0, 2.0, -1.0]), kind)
    moved = reorient(kernels.sample(drawn(direction, kind), u), u, kind=kind, spacing=(1, 1, 1))
    torch.testing.assert_close(moved, wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(mirrored(drawn(direction, kind).flip(2)), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_peaks_stay_along_the_fibres_of_any_deformation(seed: int) -> None:
    """Fibres along d are where two linear functions are constant; so they are after the warp."""
    direction, across = np.array([1.0, 1.0, 0.0]), np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
    u = wavy(seed)
    peaks = torch.tensor(direction, dtype=torch.float32).view(3, 1, 1, 1).expand(3, *SHAPE)
    moved = reorient(matrices(peaks, "peaks", axes=STRAIGHT)[None], u, kind="peaks", spacing=(1, 1, 1))[0]
    places = torch.from_numpy(offsets()).float() + u[0]
    for normal in across:
        height = torch.einsum("i,ixyz->xyz", torch.from_numpy(normal).float(), places)
        slope = torch.stack(torch.gradient(height))
        along = torch.stack([sum(moved[directions.PLACE[i][j]] * slope[j] for j in range(3)) for i in range(3)])
        assert float(along.abs().max()) < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_matrices_of_peaks_turn_as_vectors_do(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    vectors, u = torch.randn(1, 9, *SHAPE, generator=rng), wavy(seed)
    spacing = (1.0, 1.5, 2.0)
    ours = reorient(matrices(vectors[0], "peaks", axes=STRAIGHT)[None], u, kind="peaks", spacing=spacing)
    theirs = field.reorient(vectors, u, world=torch.diag(torch.tensor(spacing)))
    torch.testing.assert_close(ours[0], matrices(theirs[0], "peaks", axes=STRAIGHT), atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", VECTORS)
def test_two_turns_are_their_product(kind: Kind) -> None:
    first, second = turn((0.3, -0.2, 0.5)), turn((-0.6, 0.4, 0.1))
    field_of = [torch.from_numpy(m).float().view(1, 3, 3, 1, 1, 1) for m in (first, second, first @ second)]
    data = drawn(np.array([1.0, 2.0, 3.0]), kind)
    twice = follow(follow(data, field_of[0], kind=kind), field_of[1], kind=kind)
    torch.testing.assert_close(twice, follow(data, field_of[2], kind=kind), atol=1e-5, rtol=0)


def test_peaks_compose_through_stretches_too() -> None:
    first, second = (torch.randn(1, 3, 3, 1, 1, 1, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    data = drawn(np.array([1.0, 2.0, 3.0]), "peaks")
    twice = follow(follow(data, first, kind="peaks"), second, kind="peaks")
    product = torch.einsum("bikxyz,bkjxyz->bijxyz", first, second)
    torch.testing.assert_close(twice, follow(data, product, kind="peaks"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_two_warps_in_a_row_are_their_composition(seed: int) -> None:
    first, second = wavy(seed, 0.5), wavy(seed + 10, 0.5)
    way = torch.tensor([1.0, -1.0, 2.0]).view(3, 1, 1, 1).expand(3, *SHAPE)
    data = matrices(way, "peaks", axes=STRAIGHT)[None]
    once = reorient(data, first, kind="peaks", spacing=(1, 1, 1))
    twice = reorient(kernels.sample(once, second), second, kind="peaks", spacing=(1, 1, 1))
    both = reorient(data, field.compose(first, second), kind="peaks", spacing=(1, 1, 1))
    box = (slice(None), slice(None), *[slice(4, -4)] * 3)
    assert float((twice - both)[box].abs().max()) < 0.2 * float((both - data)[box].abs().max())


@pytest.mark.parametrize("seed", range(3))
def test_lengths_and_eigenvalues_outlive_any_deformation(seed: int) -> None:
    rng, u = torch.Generator().manual_seed(seed), wavy(seed)
    peaks = matrices(torch.randn(9, *SHAPE, generator=rng), "peaks", axes=STRAIGHT)[None]
    torch.testing.assert_close(sizes(reorient(peaks, u, kind="peaks", spacing=(1, 1, 2))), sizes(peaks))
    tensor = torch.randn(1, 6, *SHAPE, generator=rng)
    moved = reorient(tensor, u, kind="tensor", spacing=(1, 1, 2))
    torch.testing.assert_close(eigenvalues(moved), eigenvalues(tensor), atol=1e-4, rtol=0)
    assert float((moved - tensor).abs().max()) > 0.1


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 3.0)])
def test_a_displacement_tells_by_how_much_it_turns(spacing: tuple[float, float, float]) -> None:
    angle = np.radians(20)
    about_x = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    places = np.stack(np.meshgrid(*[np.arange(8.0)] * 3, indexing="ij"))
    mm = places * np.array(spacing).reshape(3, 1, 1, 1)
    moved = np.einsum("ij,jxyz->ixyz", 1.3 * about_x, mm) / np.array(spacing).reshape(3, 1, 1, 1)  # grown as well
    turned = directions.turned_deg(torch.from_numpy(moved - places)[None], spacing=spacing)
    torch.testing.assert_close(turned, torch.full_like(turned, 20.0), atol=1e-4, rtol=0)
    collapsed = directions.turned_deg(torch.from_numpy(-places)[None], spacing=spacing)
    assert float(collapsed.abs().max()) < 1e-4


def test_a_turn_is_finite_where_the_map_collapses() -> None:
    flat = torch.diag(torch.tensor([1.0, 0.0, 1.0])).view(1, 3, 3, 1, 1, 1)
    for kind in VECTORS:
        data = drawn(np.array([1.0, 2.0, 3.0]), kind)
        torch.testing.assert_close(follow(data, flat, kind=kind), data)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000))
def test_signs_say_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    peaks = rng.normal(size=(9, 3, 4, 2)).astype(np.float32)
    sign = np.repeat(rng.choice([-1, 1], (3, 3, 4, 2)), 3, 0).astype(np.float32)
    one, other = (matrices(torch.from_numpy(p), "peaks", axes=STRAIGHT) for p in (peaks, peaks * sign))
    assert torch.equal(one.abs(), other.abs())
    torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_neighbours_of_opposite_sign_do_not_cancel() -> None:
    peaks = torch.zeros(3, 2, 1, 1)
    peaks[1, 0], peaks[1, 1] = 1, -1
    u = torch.full((1, 3, 1, 1, 1), 0.0)
    u[:, 0] = 0.5
    between = kernels.sample(matrices(peaks, "peaks", axes=STRAIGHT)[None], u)
    assert between.flatten().tolist() == [0, 0, 0, 1, 0, 0]
    assert float(kernels.sample(peaks[None], u).abs().max()) == 0  # what the vectors themselves would give


@pytest.mark.parametrize("kind", VECTORS)
def test_world_directions_come_to_lie_along_the_axes_of_an_oblique_grid(kind: Kind) -> None:
    """The same tube on a straight and on a tilted grid: what a network sees differs by nothing."""
    rotation = turn((0.4, -0.3, 0.2))
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([1.0, 2.0, 1.5])
    axes = directions.axes_of(Geometry(SHAPE, affine))
    np.testing.assert_allclose(axes, rotation, atol=1e-12)
    own = np.array([1.0, 2.0, 3.0])  # along the voxel axes
    world = tube(rotation @ own, kind, places=np.einsum("ij,jxyz->ixyz", rotation, offsets()))
    torch.testing.assert_close(matrices(world, kind, axes=axes)[None], drawn(own, kind), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", VECTORS)
def test_sizes_are_those_of_the_file(kind: Kind) -> None:
    data = tube(np.array([1.0, 2.0, 0.0]), kind)
    raw = raw_sizes(data.numpy(), kind)
    np.testing.assert_allclose(sizes(matrices(data, kind, axes=turn((1, 2, 3)))).numpy(), raw, atol=1e-5)
    assert directions.usual_size(data.numpy() * 40, kind) == pytest.approx(
        40 * directions.usual_size(data.numpy(), kind), rel=1e-5
    )
    assert directions.usual_size(np.zeros((6, 2, 2, 2)), kind) == 1


def test_small_rotations_are_rotations_of_the_wanted_angle() -> None:
    vectors = torch.zeros(1, 3, 2, 1, 1)
    vectors[0, 2, 0] = 0.1
    found = directions.small_rotations(vectors)
    wanted = torch.from_numpy(turn((0.1, 0.0, 0.0))).float()
    torch.testing.assert_close(found[0, :, :, 0, 0, 0], wanted, atol=1e-3, rtol=0)
    assert torch.equal(found[0, :, :, 1, 0, 0], torch.eye(3))
    tensor = torch.randn(1, 6, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(eigenvalues(congruent(tensor, found)), eigenvalues(tensor), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", VECTORS)
def test_matrices_along_the_world_turn_as_those_along_the_voxels_of_an_oblique_grid(kind: Kind) -> None:
    grid = Geometry(SHAPE, np.block([[turn((0.4, -0.3, 0.7)) * (1.0, 1.5, 2.0), np.zeros((3, 1))], [0, 0, 0, 1]]))
    u, axes = wavy(3), directions.axes_of(grid)
    world = drawn(np.array([1.0, 0.5, -0.8]), kind)
    inward = torch.from_numpy(axes.T.copy()).float().view(1, 3, 3, 1, 1, 1)
    along = reorient(congruent(world, inward), u, kind=kind, spacing=grid.spacing)
    wanted = congruent(along, inward.transpose(1, 2))
    torch.testing.assert_close(directions.reorient_world(world, u, kind=kind, grid=grid), wanted, atol=1e-4, rtol=1e-4)
    assert float((wanted - world).abs().max()) > 0.05


@given(seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_peaks_come_back_from_their_matrices_longest_first(seed: int) -> None:
    rng = np.random.default_rng(seed)
    peaks = rng.normal(size=(3, 3, 2, 3, 4)).astype(np.float32)
    peaks[2, :, 0] = 0
    found = directions.peaks_of(matrices(torch.from_numpy(peaks.reshape(9, 2, 3, 4)), "peaks", axes=STRAIGHT)).numpy()
    order = np.argsort(-np.linalg.norm(peaks, axis=1), axis=0)
    wanted, vectors = np.take_along_axis(peaks, order[:, None], axis=0), found.reshape(peaks.shape)
    sign = np.where((wanted * vectors).sum(1, keepdims=True) < 0, -1, 1)
    np.testing.assert_allclose(vectors * sign, wanted, atol=1e-5)
