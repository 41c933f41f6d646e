"""Displacements: warp, compose, integrate, invert, Jacobian, reorientation of directions.

``u`` is a displacement and ``v`` a velocity, both in voxels of the grid they live on, and pull back:
``warped(x) = moving(x + u(x))``. Millimetres and the conventions of other programs occur in `data.fields` only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fewscan.errors import GeometryError
from fewscan.space import kernels
from fewscan.space.geometry import Array, Geometry, Shape

SQUARINGS = 6


@dataclass(frozen=True, eq=False)
class Field:
    """Where each voxel of the fixed grid is read from.

    Parameters
    ----------
    u : (3, X, Y, Z) float32
        Displacement in voxels of the fixed grid; an affine part is in it.
    fixed : Geometry
        Grid of ``u``.

    Raises
    ------
    GeometryError
        If the two do not fit, or the displacement is not finite.
    """

    u: NDArray[np.float32]
    fixed: Geometry

    def __post_init__(self) -> None:
        if self.u.shape != (3, *self.fixed.shape):
            raise GeometryError(f"a displacement on this grid must be (3, {self.fixed.shape}), got {self.u.shape}")
        if not np.isfinite(self.u).all():
            raise GeometryError("the displacement holds values that are not finite")

    def to_moving(self, moving: Geometry) -> NDArray[np.float32]:
        """The displacement counted in voxels of another grid, for `kernels.sample` on the moving image.

        Parameters
        ----------
        moving : Geometry
            Grid of the image that will be read.
        """
        matrix = np.linalg.inv(moving.affine) @ self.fixed.affine
        return through(matrix, self.u)

    def millimetres(self) -> NDArray[np.float32]:
        """The displacement in RAS+ mm, (3, X, Y, Z)."""
        matrix = self.fixed.affine[:3, :3].astype(np.float32)
        mm: NDArray[np.float32] = np.einsum("ij,jxyz->ixyz", matrix, self.u)
        return mm


def through(matrix: Array, u: NDArray[np.float32]) -> NDArray[np.float32]:
    """Displacement ``w`` with ``x + w(x) = matrix (x + u(x))``.

    Parameters
    ----------
    matrix : (4, 4) float
        From voxels of the field's grid to voxels of another one.
    u : (3, X, Y, Z) float32
        Displacement, voxels of its own grid.
    """
    out = np.empty_like(u)
    axes = [np.arange(n, dtype=np.float32) for n in u.shape[1:]]
    places = [u[0] + axes[0][:, None, None], u[1] + axes[1][None, :, None], u[2] + axes[2][None, None, :]]
    for i in range(3):
        row = sum(np.float32(matrix[i, j]) * places[j] for j in range(3))
        shape = [1, 1, 1]
        shape[i] = -1
        out[i] = row + np.float32(matrix[i, 3]) - axes[i].reshape(shape)
    return out


def without_affine(
    u: NDArray[np.float32], matrix: Array, *, fixed: Geometry, first: int = 0, axis: int = 0
) -> NDArray[np.float32]:
    """What is left of a displacement without its affine part: undoes `then`.

    Parameters
    ----------
    u : (3, X, Y, Z) float32
        Displacement, voxels of the fixed grid, or a slab of it.
    matrix : (4, 4) float
        The affine part, fixed to moving RAS+ mm.
    fixed : Geometry
        Grid of the whole displacement.
    first, axis : int
        Where a slab begins, and along which axis.
    """
    origin = np.eye(4)
    origin[axis, 3] = first
    back = np.linalg.inv(fixed.affine) @ np.linalg.inv(matrix) @ fixed.affine
    return through(np.linalg.inv(origin) @ back @ origin, u)


def from_matrix(matrix: Array, fixed: Geometry) -> Field:
    """The field of an affine map.

    Parameters
    ----------
    matrix : (4, 4) float
        Fixed to moving world, RAS+ mm.
    fixed : Geometry
        Grid of the field.
    """
    voxels = np.linalg.inv(fixed.affine) @ matrix @ fixed.affine
    return Field(through(voxels, np.zeros((3, *fixed.shape), np.float32)), fixed)


def then(u: NDArray[np.float32], matrix: Array, *, fixed: Geometry) -> Field:
    """Field that first moves by ``u``, then by an affine map: ``x -> matrix (x + u(x))``.

    Parameters
    ----------
    u : (3, X, Y, Z) float32
        Displacement, voxels of the fixed grid.
    matrix : (4, 4) float
        Fixed to moving world, RAS+ mm.
    fixed : Geometry
        Grid of ``u``.
    """
    return Field(through(np.linalg.inv(fixed.affine) @ matrix @ fixed.affine, u), fixed)


def warp_array(data: NDArray[Any], moving: Geometry, *, field: Field, background: float = 0.0) -> NDArray[np.float32]:
    """Bring channels of a moving image onto the fixed grid, linearly; ``background`` where there is nothing to read.

    Parameters
    ----------
    data : (C, I, J, K) number
        On the moving grid.
    moving : Geometry
        Its grid.
    field : Field
        From fixed to moving.
    background : float
        Value beyond the moving grid.
    """
    places = torch.from_numpy(field.to_moving(moving))
    outside = kernels.outside(places, moving.shape).numpy()
    out = np.empty((len(data), *field.fixed.shape), np.float32)
    for channel, target in zip(data, out, strict=True):
        image = torch.from_numpy(np.ascontiguousarray(channel, dtype=np.float32))[None, None]
        target[:] = kernels.sample(image, places[None])[0, 0].numpy()
        target[outside] = background
    return out


def warp_labels(label: NDArray[Any], moving: Geometry, *, field: Field) -> NDArray[Any]:
    """Bring a label map onto the fixed grid: each voxel takes the label with the largest share around its place.

    Parameters
    ----------
    label : (I, J, K) int
        On the moving grid.
    moving : Geometry
        Its grid.
    field : Field
        From fixed to moving.
    """
    return kernels.vote_labels(label, torch.from_numpy(field.to_moving(moving)))


def warp_nearest(label: NDArray[Any], moving: Geometry, *, field: Field) -> NDArray[Any]:
    """Bring a map of values that must not mix onto the fixed grid by its nearest voxel; 0 beyond the moving grid.

    Parameters
    ----------
    label : (I, J, K) number
        On the moving grid.
    moving : Geometry
        Its grid.
    field : Field
        From fixed to moving.
    """
    places = field.to_moving(moving)
    axes = np.meshgrid(*[np.arange(n, dtype=np.float32) for n in places.shape[1:]], indexing="ij", sparse=True)
    index = [np.rint(p + a).astype(np.int64) for p, a in zip(places, axes, strict=True)]
    inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(index, moving.shape, strict=True)])
    i, j, k = (np.clip(i, 0, n - 1) for i, n in zip(index, moving.shape, strict=True))
    return np.where(inside, label[i, j, k], 0).astype(label.dtype)


def warp(moving: Tensor, u: Tensor) -> Tensor:
    """Read ``moving`` at ``x + u(x)``, linearly; beyond the border its voxels repeat.

    Parameters
    ----------
    moving : (B, C, X, Y, Z) float
        Image, or one-hot label map, on the grid of ``u``.
    u : (B, 3, X, Y, Z) float
        Displacement, voxels.

    Raises
    ------
    GeometryError
        If the two grids differ.

    Examples
    --------
    A field of ones along the first axis reads each voxel from its next neighbour:

    >>> moving = torch.arange(4.0).reshape(1, 1, 4, 1, 1).expand(1, 1, 4, 2, 2)
    >>> u = torch.zeros(1, 3, 4, 2, 2)
    >>> u[:, 0] = 1
    >>> warp(moving, u)[0, 0, :, 0, 0].tolist()
    [1.0, 2.0, 3.0, 3.0]
    """
    wanted = (len(moving), 3, *moving.shape[2:])
    if tuple(u.shape) != wanted:
        raise GeometryError(
            f"displacement must be {wanted} to warp a moving image of {tuple(moving.shape)}, got {tuple(u.shape)}; "
            "resample it with field.resize first"
        )
    return kernels.sample(moving, u)


def compose(u: Tensor, w: Tensor) -> Tensor:
    """Displacement that moves by ``w`` first and by ``u`` from there: ``w(x) + u(x + w(x))``.

    Warping with it equals warping with ``u`` and the result with ``w``.

    Parameters
    ----------
    u, w : (B, 3, X, Y, Z) float
        Displacements, voxels.
    """
    return w + kernels.sample(u, w)


def integrate(v: Tensor, *, squarings: int = SQUARINGS) -> Tensor:
    """Flow of a stationary velocity over unit time, by scaling and squaring.

    Arsigny et al. 2006, MICCAI, doi 10.1007/11866565_113.

    Parameters
    ----------
    v : (B, 3, X, Y, Z) float
        Velocity, voxels.
    squarings : int
        Steps; the velocity is first divided by two to this power.
    """
    u: Tensor = v / 2**squarings
    for _ in range(squarings):
        u = compose(u, u)
    return u


def invert(u: Tensor, *, iterations: int = 30) -> Tensor:
    """Inverse displacement by fixed-point iteration, ``w <- -u(x + w)``; exact only where ``u`` does not fold.

    Parameters
    ----------
    u : (B, 3, X, Y, Z) float
        Displacement, voxels.
    iterations : int
        Most steps; it stops when nothing moves by more than a hundredth of a voxel.
    """
    w = -u
    for _ in range(iterations):
        following = -kernels.sample(u, w)
        moved = float((following - w).abs().max())
        w = following
        if moved < 0.01:
            break
    return w


def resize(u: Tensor, shape: Shape) -> Tensor:
    """Displacement for a grid with another number of voxels over the same block of space, edge to edge.

    Parameters
    ----------
    u : (B, 3, X, Y, Z) float
        Displacement, voxels of its grid.
    shape : (X, Y, Z) int
        Wanted shape; the answer is in its voxels.

    Examples
    --------
    >>> resize(torch.ones(1, 3, 2, 2, 2), (4, 2, 2))[0, :, 0, 0, 0].tolist()
    [2.0, 1.0, 1.0]
    """
    if tuple(u.shape[2:]) == tuple(shape):
        return u
    scale = [n / m for n, m in zip(shape, u.shape[2:], strict=True)]
    out = F.interpolate(u, size=shape, mode="trilinear", align_corners=False)
    return out * torch.tensor(scale, dtype=u.dtype, device=u.device).view(1, 3, 1, 1, 1)


def jacobian(u: Tensor) -> Tensor:
    """Jacobian matrices of ``x + u(x)``, (B, 3, 3, X, Y, Z): entry (i, j) is the change of i along axis j.

    Central differences, one-sided at the border.

    Parameters
    ----------
    u : (B, 3, X, Y, Z) float
        Displacement, voxels.
    """
    rows = []
    for axis in range(3):
        n = u.shape[2 + axis]
        if n == 1:
            rows.append(torch.zeros_like(u))
            continue
        rows.append(torch.gradient(u, dim=2 + axis)[0])
    matrix = torch.stack(rows, 2)
    eye = torch.eye(3, dtype=u.dtype, device=u.device).view(1, 3, 3, 1, 1, 1)
    return matrix + eye


def determinant(u: Tensor) -> Tensor:
    """Determinant of the Jacobian of ``x + u(x)``, (B, X, Y, Z): the local change of volume.

    Parameters
    ----------
    u : (B, 3, X, Y, Z) float
        Displacement, voxels.
    """
    j = jacobian(u)
    return (
        j[:, 0, 0] * (j[:, 1, 1] * j[:, 2, 2] - j[:, 1, 2] * j[:, 2, 1])
        - j[:, 0, 1] * (j[:, 1, 0] * j[:, 2, 2] - j[:, 1, 2] * j[:, 2, 0])
        + j[:, 0, 2] * (j[:, 1, 0] * j[:, 2, 1] - j[:, 1, 1] * j[:, 2, 0])
    )


def folding(u: Tensor) -> float:
    """Share of voxels whose Jacobian determinant is not positive.

    Parameters
    ----------
    u : (B, 3, X, Y, Z) float
        Displacement, voxels.
    """
    return float((determinant(u) <= 0).float().mean())


def reorient(vectors: Tensor, u: Tensor, *, world: Tensor | None = None) -> Tensor:
    """Turn warped directions along with the anatomy: multiply by the inverse Jacobian, keep each one's length.

    Directions of fibres follow the push forward of the map from moving to fixed space, which is the inverse of the
    Jacobian of the pull-back (Alexander et al. 2001, IEEE TMI 20(11), doi 10.1109/42.963816, "preservation of
    principal direction").

    Parameters
    ----------
    vectors : (B, 3 n, X, Y, Z) float
        Already sampled at ``x + u(x)``: n vectors of three components along the axes of ``world``.
    u : (B, 3, X, Y, Z) float
        Displacement that warped them, voxels.
    world : (3, 3) float, optional
        Voxel axes to the axes of the vectors, mm; the identity when the vectors are along voxel axes.
    """
    matrix = jacobian(u).permute(0, 3, 4, 5, 1, 2)  # (B, X, Y, Z, 3, 3)
    if world is not None:
        m = world.to(matrix)
        matrix = m @ matrix @ torch.linalg.inv(m)
    b, channels, *shape = vectors.shape
    parts = vectors.reshape(b, channels // 3, 3, *shape).permute(0, 3, 4, 5, 2, 1)  # (B, X, Y, Z, 3, n)
    eye = torch.eye(3, dtype=matrix.dtype, device=matrix.device)
    bad = torch.linalg.det(matrix).abs() < 1e-4
    turned: Tensor = torch.linalg.solve(torch.where(bad[..., None, None], eye, matrix), parts)
    length = parts.square().sum(-2, keepdim=True).sqrt()
    turned = turned * length / turned.square().sum(-2, keepdim=True).sqrt().clamp(min=1e-12)
    return turned.permute(0, 5, 4, 1, 2, 3).reshape(vectors.shape)
