"""Rigid and affine maps between worlds: fit by moments, then by optimisation, coarse to fine.

A transform is a ``matrix`` (4, 4) from fixed to moving RAS+ millimetres, so that it pulls back like a field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewscan.errors import GeometryError
from fewscan.space import field, kernels, similarity
from fewscan.space.geometry import Array, Geometry, with_at_most, with_spacing
from fewscan.space.orientation import rotations
from fewscan.space.similarity import Similarity
from fewscan.space.volume import resample

LEVELS = ((16_000, 80), (120_000, 60))  # voxels of the working grid, and steps
TRIAL = 25  # steps from each start, of which the best goes on
TURNED_VOXELS = 4_000  # of the grid on which turns are looked at
TILTS = (30.0, 60.0)  # degrees, about each axis and either way, at which a scan may lie turned
MOST_SCALE = 3.0  # ratio of volumes beyond which an affine map is not believed
LEAST_OVERLAP = 0.1  # of the smaller block of space; with less the images do not count as overlapping


def centre_mm(image: Tensor, geometry: Geometry) -> Array:
    """Centre of mass of an image above its lowest value, RAS+ mm.

    Parameters
    ----------
    image : (1, X, Y, Z) float
        Intensities.
    geometry : Geometry
        Its grid.
    """
    mass = (image[0] - image.min()).double()
    whole = float(mass.sum())
    if whole <= 0:
        middle = (np.array(geometry.shape) - 1) / 2
    else:
        sums = [mass.sum(tuple(a for a in range(3) if a != axis)) for axis in range(3)]
        middle = np.array([float((s * torch.arange(len(s))).sum()) / whole for s in sums])
    answer: Array = geometry.affine[:3, :3] @ middle + geometry.affine[:3, 3]
    return answer


def build(parameters: Tensor, centre: Tensor) -> Tensor:
    """Matrix (4, 4) of rotation, scaling, shear and translation about a point.

    Parameters
    ----------
    parameters : (12,) float
        Three angles in rad, three logarithms of scale, three shears, three translations in mm.
    centre : (3,) float
        What stays in place but for the translation, RAS+ mm.
    """
    a, s, h, t = parameters[:3], parameters[3:6].exp(), parameters[6:9], parameters[9:]
    c, d = a.cos(), a.sin()
    o, z = torch.ones_like(c[0]), torch.zeros_like(c[0])
    x = torch.stack([o, z, z, z, c[0], -d[0], z, d[0], c[0]]).view(3, 3)
    y = torch.stack([c[1], z, d[1], z, o, z, -d[1], z, c[1]]).view(3, 3)
    w = torch.stack([c[2], -d[2], z, d[2], c[2], z, z, z, o]).view(3, 3)
    shear = torch.stack([o, h[0], h[1], z, o, h[2], z, z, o]).view(3, 3)
    linear = x @ y @ w @ shear * s
    top = torch.cat([linear, (t + centre - linear @ centre)[:, None]], 1)
    return torch.cat([top, top.new_tensor([[0.0, 0.0, 0.0, 1.0]])])


def onto(image: Tensor, own: Geometry, *, grid: Geometry, matrix: Array) -> Tensor:
    """An image on another grid through an affine map, low-passed first where that grid is coarser.

    Parameters
    ----------
    image : (C, X, Y, Z) float
        To be read; beyond its border its voxels repeat.
    own : Geometry
        Its grid.
    grid : Geometry
        Wanted.
    matrix : (4, 4) float
        From the world of the wanted grid to that of the image, mm.
    """
    scale = np.array(grid.spacing) / np.array(own.spacing)
    if (scale > 1.5).any():
        x, y, z = np.maximum(grid.spacing, own.spacing)
        coarse = with_spacing(own, (float(x), float(y), float(z)))
        image, own = resample(image, coarse.shape), coarse
    places = torch.from_numpy(field.from_matrix(matrix, grid).to_moving(own))
    return kernels.sample(image[None], places[None])[0]


def plausible(matrix: Array) -> bool:
    """Whether an affine map changes volumes no more than two people of one kind differ: by `MOST_SCALE` at most.

    Parameters
    ----------
    matrix : (4, 4) float
        From one world to another.

    Examples
    --------
    >>> plausible(np.eye(4)), plausible(np.diag([10, 10, 10, 1]))
    (True, False)
    """
    return bool(1 / MOST_SCALE <= float(np.linalg.det(matrix[:3, :3])) <= MOST_SCALE)


def within(own: Geometry, *, grid: Geometry, matrix: Array) -> Tensor:
    """Voxels of a grid that lie within an image brought onto it by `onto`: 1 there, 0 beyond, (1, X, Y, Z) float.

    Parameters
    ----------
    own : Geometry
        Grid of the image.
    grid : Geometry
        Wanted.
    matrix : (4, 4) float
        From the world of the wanted grid to that of the image, mm.
    """
    places = torch.from_numpy(field.from_matrix(matrix, grid).to_moving(own))
    return (~kernels.outside(places, own.shape))[None].float()


def fit(
    fixed: Tensor,
    moving: Tensor,
    *,
    grids: tuple[Geometry, Geometry],
    rigid: bool = False,
    turned: bool = False,
    measure: Similarity = similarity.ncc,
    weight: Tensor | None = None,
    levels: Sequence[tuple[int, int]] = LEVELS,
) -> Array:
    """Matrix from fixed to moving world that makes two images most alike.

    It starts from the headers, from the centres of the two grids or from the centres of mass, whichever is most alike
    after a coarse fit, and optimises angles, translations and, unless rigid, scales and shears with Adam.

    Parameters
    ----------
    fixed, moving : (1, X, Y, Z) float
        One channel each, with a standard deviation near 1.
    grids : (Geometry, Geometry)
        Of the fixed and the moving image.
    rigid : bool
        Rotation and translation only.
    turned : bool
        Start from tilts and other sides about the centre of mass, too. Small scans can be more alike turned than as
        they lie, so that headers are believed unless somebody doubts them.
    measure : callable
        Similarity of (1, 1, X, Y, Z) images, the larger the better.
    weight : (1, X, Y, Z) float, optional
        On the fixed grid: where to look.
    levels : sequence of (int, int)
        Voxels of the working grid and steps, coarsest first.

    Raises
    ------
    GeometryError
        If no start brings the two images to an overlap.
    """
    middle = [g.affine[:3, :3] @ ((np.array(g.shape) - 1) / 2) + g.affine[:3, 3] for g in grids]
    mass = [centre_mm(image, grid) for image, grid in zip((fixed, moving), grids, strict=True)]
    starts = [np.zeros(3), middle[1] - middle[0], mass[1] - mass[0]]
    apart = [s for i, s in enumerate(starts) if all(np.linalg.norm(s - t) > 2 for t in starts[:i])]
    pair, about = _Pair(fixed, moving, grids, weight), torch.from_numpy(mass[0])
    shrunk = [pair.shrunk(voxels) for voxels, _ in levels]
    tried = []
    for start in apart:
        parameters = torch.zeros(12, dtype=torch.float64)
        parameters[9:] = torch.from_numpy(start)
        tried.append(_optimise(shrunk[0], parameters, about=about, steps=TRIAL, rigid=rigid, measure=measure))
    value, parameters = max(tried, key=lambda found: found[0])
    if turned:
        best = _most_alike(pair.shrunk(TURNED_VOXELS), _turned(mass[1] - mass[0]), about=about, measure=measure)
        tried.append(_optimise(shrunk[0], best, about=about, steps=TRIAL, rigid=rigid, measure=measure))
        value, parameters = max(tried, key=lambda found: found[0])
    if not np.isfinite(value):
        raise GeometryError("the two images do not overlap, neither by their headers nor by their centres")
    for level, (_, steps) in zip(shrunk, levels, strict=True):
        _, parameters = _optimise(level, parameters, about=about, steps=steps, rigid=rigid, measure=measure)
    return build(parameters, about).numpy()


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two images, (1, X, Y, Z) each, their grids, and where to look on the first."""

    fixed: Tensor
    moving: Tensor
    grids: tuple[Geometry, Geometry]
    weight: Tensor | None

    def laid(self, matrix: Tensor) -> Tensor:
        """Displacement (1, 3, X, Y, Z), in voxels, of a map (4, 4) between the worlds."""
        grid, other = self.grids
        to_moving = torch.from_numpy(np.linalg.inv(other.affine))
        return _affine_field(to_moving @ matrix @ torch.from_numpy(np.array(grid.affine)), grid)

    def shrunk(self, voxels: int) -> _Pair:
        """On grids of at most about so many voxels."""
        fixed, grid = _shrink(self.fixed, self.grids[0], voxels)
        moving, other = _shrink(self.moving, self.grids[1], voxels)
        weight = None if self.weight is None else resample(self.weight, grid.shape)
        return _Pair(fixed, moving, (grid, other), weight)


def _turned(shift: Array) -> list[Tensor]:
    """Parameters of tilts about each axis, and of the 23 other ways in which a block can lie, with this translation."""
    tilts = [[sign * np.deg2rad(tilt) if i == axis else 0.0 for i in range(3)]
             for axis in range(3) for tilt in TILTS for sign in (-1, 1)]  # fmt: skip
    lying = [_angles(way) for way in rotations() if not np.array_equal(way, np.eye(3))]
    return [torch.from_numpy(np.concatenate([turn, np.zeros(6), shift])) for turn in (*tilts, *lying)]


def _angles(rotation: Array) -> list[float]:
    """The three angles, rad, from which `build` makes a rotation."""
    b = math.asin(float(np.clip(rotation[0, 2], -1, 1)))
    if abs(rotation[0, 2]) > 1 - 1e-9:  # the first and the last axis are one: only what they turn together is known
        return [0.0, b, math.atan2(rotation[1, 0], rotation[1, 1])]
    return [math.atan2(-rotation[1, 2], rotation[2, 2]), b, math.atan2(-rotation[0, 1], rotation[0, 0])]


def _most_alike(pair: _Pair, starts: Sequence[Tensor], *, about: Tensor, measure: Similarity) -> Tensor:
    """The best of these parameters as they are."""
    with torch.no_grad():
        found = [_likeness(pair, pair.laid(build(start, about)), measure) for start in starts]
    values = [-np.inf if value is None else float(value) for value in found]
    return starts[int(np.argmax(values))]


def _optimise(
    pair: _Pair, parameters: Tensor, *, about: Tensor, steps: int, rigid: bool, measure: Similarity
) -> tuple[float, Tensor]:
    """One level: best value (-inf without overlap) and its parameters."""
    grid, _ = pair.grids
    extent = float(np.linalg.norm(np.array(grid.shape) * grid.spacing)) / 2
    unit = torch.tensor([1.0] * 9 + [extent] * 3, dtype=torch.float64)  # a rad moves the rim by the extent
    free = torch.tensor([1.0] * 3 + [0.0 if rigid else 1.0] * 6 + [1.0] * 3, dtype=torch.float64)
    change = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([change], lr=1.0, betas=(0.9, 0.99))
    top = 1.5 * float(np.mean(grid.spacing)) / extent
    best = -np.inf, parameters
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = top * (1 - step / steps)
        now = parameters + change * unit * free
        value = _likeness(pair, pair.laid(build(now, about)), measure)
        if value is None:
            break
        if float(value.detach()) > best[0]:
            best = float(value.detach()), now.detach()
        optimiser.zero_grad()
        (-value).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return best


def _likeness(pair: _Pair, u: Tensor, measure: Similarity) -> Tensor | None:
    """Similarity where the moving image has voxels; None where it has hardly any."""
    with torch.no_grad():
        axes = [torch.arange(n, dtype=u.dtype) for n in u.shape[2:]]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij")) + u[0]
        size = torch.tensor(pair.moving.shape[1:], dtype=u.dtype).view(3, 1, 1, 1)
        seen = ((places > -0.5) & (places < size - 0.5)).all(0).to(u.dtype)[None, None]
        whole, other = (np.prod(grid.shape) * grid.voxel_mm3 for grid in pair.grids)
        if float(seen.mean()) * whole < LEAST_OVERLAP * min(whole, other):
            return None
        seen = seen if pair.weight is None else seen * pair.weight[None]
    return measure(pair.fixed[None], kernels.sample(pair.moving[None], u), weight=seen)


def _affine_field(matrix: Tensor, grid: Geometry) -> Tensor:
    """Displacement (1, 3, X, Y, Z) of a voxel-to-voxel matrix; the gradient flows to the matrix."""
    axes = [torch.arange(n, dtype=torch.float32) for n in grid.shape]
    m = matrix.float() - torch.eye(4)
    rows = [
        m[i, 0] * axes[0][:, None, None] + m[i, 1] * axes[1][None, :, None] + m[i, 2] * axes[2][None, None, :] + m[i, 3]
        for i in range(3)
    ]
    return torch.stack(rows)[None]


def _shrink(image: Tensor, grid: Geometry, voxels: int) -> tuple[Tensor, Geometry]:
    """Image on a coarser grid of at most about so many voxels, as isotropic as that allows."""
    if np.prod(grid.shape) <= voxels:
        return image, grid
    coarse = with_at_most(grid, voxels)
    return resample(image, coarse.shape), coarse
