"""Channels that hold directions: peaks and tensors, as symmetric matrices that turn with the grid they lie on.

A peak ``v`` and ``-v`` mean the same, and neighbouring voxels may hold one and the other: their mean would be nothing.
The matrix ``v v^T / |v|`` is the same for both, and its trace is the length. So every linear resampling of images, with
low pass or without, is right for it; to align signs instead would take a resampler of its own for each place that
resamples. A diffusion tensor is such a matrix already.

Matrices are six channels each, in the order of `ORDER`, along the axes of the voxels, mm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.space import field
from fewscan.space.geometry import Array, Geometry
from fewscan.space.volume import Kind

ORDER = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
PLACE = ((0, 1, 2), (1, 3, 4), (2, 4, 5))  # of entry (i, j) among the six
SINGULAR = 1e-4  # determinant below which a map tells no rotation
POLAR_STEPS = 8
USUAL = 95  # percentile of the lengths that becomes length 1
SEEN = 500_000  # voxels that lengths are taken from


def axes_of(geometry: Geometry) -> Array:
    """Directions of the voxel axes in the world, (3, 3), one a column; the nearest rotation where they are sheared.

    Parameters
    ----------
    geometry : Geometry
        Grid.
    """
    left, _, right = np.linalg.svd(geometry.affine[:3, :3] / np.array(geometry.spacing))
    axes: Array = left @ right
    return axes


def matrices(data: Tensor, kind: Kind, *, axes: Array) -> Tensor:
    """Symmetric matrices (6 n, X, Y, Z) along the voxel axes, n = 1 for a tensor.

    Parameters
    ----------
    data : (3 n, X, Y, Z) or (6, X, Y, Z) float
        Peaks, or the entries of a tensor in the order of `ORDER`, in the RAS+ world.
    kind : {"peaks", "tensor"}
        Which of them.
    axes : (3, 3) float
        From `axes_of`.

    Examples
    --------
    >>> peak = torch.tensor([0.0, -2.0, 0.0]).view(3, 1, 1, 1)
    >>> matrices(peak, "peaks", axes=np.eye(3)).flatten().tolist()
    [0.0, -0.0, 0.0, 2.0, -0.0, 0.0]
    """
    inward = torch.from_numpy(np.ascontiguousarray(axes.T)).to(data)
    if kind == "tensor":
        return congruent(data[None], inward.view(1, 3, 3, 1, 1, 1))[0]
    v = torch.einsum("ij,njxyz->nixyz", inward, data.reshape(-1, 3, *data.shape[1:]))
    length = v.square().sum(1).sqrt().clamp(min=1e-12)
    return torch.stack([v[:, i] * v[:, j] / length for i, j in ORDER], 1).flatten(0, 1)


def peaks_of(data: Tensor) -> Tensor:
    """Peaks (3 n, X, Y, Z) for matrices, longest first: each the main direction of one, as long as that is strong.

    Undoes `matrices` of peaks, but for signs. Of peaks that were mixed it keeps what they had in common.

    Parameters
    ----------
    data : (6 n, X, Y, Z) float
        Matrices; peaks come along the axes that these are along.

    Examples
    --------
    >>> peak = torch.tensor([0.0, 0.0, 2.0]).view(3, 1, 1, 1)
    >>> peaks_of(matrices(peak, "peaks", axes=np.eye(3))).abs().flatten().tolist()
    [0.0, 0.0, 2.0]
    """
    m = _sixes(data).movedim(1, -1)  # (n, X, Y, Z, 6)
    there = m[..., [0, 3, 5]].sum(-1) > 0
    values, vectors = torch.linalg.eigh(m[there][:, torch.tensor(PLACE)].double())
    found = torch.zeros(*there.shape, 3, dtype=data.dtype)
    found[there] = (values[:, 2:].clamp(min=0) * vectors[:, :, 2]).to(data.dtype)
    order = found.square().sum(-1).argsort(dim=0, descending=True, stable=True)
    return found.take_along_dim(order[..., None], 0).movedim(-1, 1).flatten(0, 1)


def sizes(data: Tensor) -> Tensor:
    """Trace of each matrix, (..., n, X, Y, Z): lengths of peaks, three times the mean diffusivity of a tensor.

    Parameters
    ----------
    data : (..., 6 n, X, Y, Z) float
        Matrices.
    """
    m = _sixes(data)
    return m[..., 0, :, :, :] + m[..., 3, :, :, :] + m[..., 5, :, :, :]


def guide(data: Tensor, kind: Kind) -> Tensor:
    """What registration may look at: images as they are, of directions the sizes, which no rotation changes.

    Parameters
    ----------
    data : (..., C, X, Y, Z) float
        Image, or matrices.
    kind : {"scalar", "peaks", "tensor"}
        Which of them.
    """
    return data if kind == "scalar" else sizes(data)


def raw_sizes(data: NDArray[Any], kind: Kind) -> NDArray[np.float32]:
    """`sizes` of channels as a file holds them, (n, ...).

    Parameters
    ----------
    data : (C, ...) number
        Peaks or a tensor.
    kind : {"peaks", "tensor"}
        Which of them.
    """
    values = data.astype(np.float32)
    if kind == "tensor":
        trace: NDArray[np.float32] = values[:1] + values[3:4] + values[5:6]
        return trace
    lengths: NDArray[np.float32] = np.linalg.norm(values.reshape(-1, 3, *values.shape[1:]), axis=1)
    return lengths


def usual_size(data: NDArray[Any], kind: Kind) -> float:
    """A long peak of a scan, or a large trace: what programs scale differently; 1 where there is none at all.

    Parameters
    ----------
    data : (C, X, Y, Z) number
        Peaks or a tensor.
    kind : {"peaks", "tensor"}
        Which of them.
    """
    flat = data.reshape(len(data), -1)
    largest = raw_sizes(flat[:, :: max(1, flat.shape[1] // SEEN)], kind).max(0)
    there = largest[largest > 0]
    return float(np.percentile(there, USUAL)) if there.size else 1.0


def congruent(data: Tensor, by: Tensor) -> Tensor:
    """``A D A^T`` for each matrix D.

    Parameters
    ----------
    data : (B, 6 n, X, Y, Z) float
        Matrices.
    by : (B, 3, 3, X, Y, Z) float
        A; a length of 1 stands for all.
    """
    m, a = _sixes(data), by[:, None]
    half = [[sum(a[:, :, i, k] * m[:, :, PLACE[k][j]] for k in range(3)) for j in range(3)] for i in range(3)]
    rows = [sum(half[i][k] * a[:, :, j, k] for k in range(3)) for i, j in ORDER]
    return torch.stack(rows, 2).flatten(1, 2)  # type: ignore[arg-type]


def follow(data: Tensor, jacobian: Tensor, *, kind: Kind) -> Tensor:
    """Matrices turned along with an anatomy that a map has moved.

    Peaks follow the push forward, the inverse of the Jacobian, and keep their size; tensors turn by its rotation alone
    and keep their eigenvalues ("preservation of principal direction" and "finite strain" of Alexander et al. 2001, IEEE
    TMI 20(11), doi 10.1109/42.963816). Where the map collapses they stay.

    Parameters
    ----------
    data : (B, 6 n, X, Y, Z) float
        Sampled through the map already.
    jacobian : (B, 3, 3, X, Y, Z) float
        Of the pull-back map, from the voxels' place to the place read, both in mm; a length of 1 stands for all.
    kind : {"peaks", "tensor"}
        Which of them.
    """
    adjoint = _cofactors(jacobian)
    det = (jacobian[:, 0] * adjoint[:, 0]).sum(1)
    eye = torch.eye(3, dtype=jacobian.dtype, device=jacobian.device).view(1, 3, 3, 1, 1, 1)
    usable = (det.abs() >= SINGULAR)[:, None, None]
    if kind == "tensor":
        return congruent(data, rotation_of(torch.where(usable, jacobian, eye)).transpose(1, 2))
    turned = congruent(data, torch.where(usable, adjoint.transpose(1, 2), eye))  # inverse but for a factor
    factor = sizes(data) / sizes(turned).clamp(min=1e-12)
    return (_sixes(turned) * factor.unsqueeze(2)).flatten(1, 2)


def reorient(data: Tensor, u: Tensor, *, kind: Kind, spacing: Array | tuple[float, ...]) -> Tensor:
    """`follow` for a displacement.

    Parameters
    ----------
    data : (B, 6 n, X, Y, Z) float
        Matrices, sampled at ``x + u(x)`` already.
    u : (B, 3, X, Y, Z) float
        Displacement, voxels.
    kind : {"peaks", "tensor"}
        Which of them.
    spacing : (3,) float
        Of the grid, mm.
    """
    return follow(data, _jacobian_mm(u, spacing), kind=kind)


def reorient_world(data: Tensor, u: Tensor, *, kind: Kind, grid: Geometry) -> Tensor:
    """As `reorient`, of matrices along the axes of the world.

    Parameters
    ----------
    data : (B, 6 n, X, Y, Z) float
        Matrices, sampled at ``x + u(x)`` already.
    u : (B, 3, X, Y, Z) float
        Displacement, voxels.
    kind : {"peaks", "tensor"}
        Which of them.
    grid : Geometry
        Of the displacement.
    """
    to_mm = torch.from_numpy(grid.affine[:3, :3].copy()).to(u)
    jacobian = torch.einsum("ij,bjkxyz,kl->bilxyz", to_mm, field.jacobian(u), torch.linalg.inv(to_mm))
    return follow(data, jacobian, kind=kind)


def turned_deg(u: Tensor, *, spacing: Array | tuple[float, ...]) -> Tensor:
    """Angle by which a displacement turns what it moves, (B, X, Y, Z), degrees; 0 where it collapses.

    Parameters
    ----------
    u : (B, 3, X, Y, Z) float
        Displacement, voxels.
    spacing : (3,) float
        Of the grid, mm.
    """
    jacobian = _jacobian_mm(u, spacing)
    det = (jacobian[:, 0] * _cofactors(jacobian)[:, 0]).sum(1)
    eye = torch.eye(3, dtype=u.dtype, device=u.device).view(1, 3, 3, 1, 1, 1)
    turn = rotation_of(torch.where((det >= SINGULAR)[:, None, None], jacobian, eye))
    trace = turn[:, 0, 0] + turn[:, 1, 1] + turn[:, 2, 2]
    return torch.rad2deg(torch.arccos(((trace - 1) / 2).clamp(-1, 1)))


def _jacobian_mm(u: Tensor, spacing: Array | tuple[float, ...]) -> Tensor:
    """Jacobian of a displacement in voxels, between places in mm."""
    mm = torch.tensor([float(s) for s in spacing], dtype=u.dtype, device=u.device)
    return field.jacobian(u) * (mm[:, None] / mm[None, :]).view(1, 3, 3, 1, 1, 1)


def mirrored(data: Tensor) -> Tensor:
    """Matrices as in a mirror across the first axis; their voxels stay.

    Parameters
    ----------
    data : (..., 6 n, X, Y, Z) float
        Matrices.
    """
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0], dtype=data.dtype, device=data.device)
    return (_sixes(data) * sign.view(6, 1, 1, 1)).flatten(-5, -4)


def rotation_of(matrix: Tensor) -> Tensor:
    """Orthogonal factor of the polar decomposition, by Newton's scaled iteration (Higham 1986, doi 10.1137/0907079).

    Without the scaling, maps that nearly fold would need many more steps.

    Parameters
    ----------
    matrix : (B, 3, 3, X, Y, Z) float
        Not singular.
    """
    q = matrix
    for _ in range(POLAR_STEPS):
        cofactors = _cofactors(q)
        other = cofactors / (q[:, 0] * cofactors[:, 0]).sum(1)[:, None, None]  # inverse, transposed
        scale = (other.square().sum((1, 2), keepdim=True) / q.square().sum((1, 2), keepdim=True)) ** 0.25
        q = (q * scale + other / scale) / 2
    return q


def small_rotations(vectors: Tensor) -> Tensor:
    """Rotations (B, 3, 3, X, Y, Z) about these axes by about their lengths.

    Parameters
    ----------
    vectors : (B, 3, X, Y, Z) float
        Radians.
    """
    a, b, c = (vectors / 2).unbind(1)
    n = 1 + a * a + b * b + c * c  # of the quaternion (1, a, b, c)
    rows = (
        1 - 2 * (b * b + c * c) / n, 2 * (a * b - c) / n, 2 * (a * c + b) / n,
        2 * (a * b + c) / n, 1 - 2 * (a * a + c * c) / n, 2 * (b * c - a) / n,
        2 * (a * c - b) / n, 2 * (b * c + a) / n, 1 - 2 * (a * a + b * b) / n,
    )  # fmt: skip
    return torch.stack(rows, 1).reshape(len(vectors), 3, 3, *vectors.shape[2:])


def _sixes(data: Tensor) -> Tensor:
    """(..., 6 n, X, Y, Z) to (..., n, 6, X, Y, Z)."""
    return data.reshape(*data.shape[:-4], -1, 6, *data.shape[-3:])


def _cofactors(matrix: Tensor) -> Tensor:
    """Inverse, transposed, times the determinant."""
    x, y, z = matrix.unbind(1)
    return torch.stack([torch.linalg.cross(p, q, dim=1) for p, q in ((y, z), (z, x), (x, y))], 1)
