"""The grid of a volume: its shape and its affine, nothing else.

World coordinates are RAS+ millimetres throughout: the first axis grows to the patient's right, the second to the front,
the third to the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewscan.errors import GeometryError

Array = NDArray[np.float64]
Shape = tuple[int, int, int]
AXES = (("L", "R"), ("P", "A"), ("I", "S"))
THICK = 3.0  # times the finest voxel edge from which an axis counts as one of thick slices


@dataclass(frozen=True, eq=False)
class Geometry:
    """Shape and affine of a voxel grid.

    Parameters
    ----------
    shape : (X, Y, Z) int
        Number of voxels along each axis.
    affine : (4, 4) float
        Voxel index to RAS+ millimetres.

    Raises
    ------
    GeometryError
        If the shape has a length below one or the affine is not finite and invertible.

    Examples
    --------
    >>> Geometry((4, 4, 2), np.diag([1.0, 1.0, 3.0, 1.0])).spacing
    (1.0, 1.0, 3.0)
    """

    shape: Shape
    affine: Array

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(f"a grid needs three lengths of at least 1, got {tuple(self.shape)}")
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError(f"an affine must be 4 x 4 and finite, got {affine.tolist()}")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise GeometryError(f"the affine is singular, so voxels have no place in space: {affine.tolist()}")
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along each axis, mm."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(0))
        return float(x), float(y), float(z)

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel, cubic mm."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def axis_codes(self) -> str:
        """World direction in which each voxel axis grows, e.g. ``"RAS"`` or ``"LPS"``."""
        permutation, flips = orientation(self.affine)
        return "".join(AXES[axis][0 if flip else 1] for axis, flip in zip(permutation, flips, strict=True))


def orientation(affine: Array) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """World axis that each voxel axis follows most closely, and whether it runs against it.

    Parameters
    ----------
    affine : (4, 4) float
        Voxel to RAS+ mm.

    Examples
    --------
    >>> orientation(np.diag([-1.0, -1.0, 1.0, 1.0]))
    ((0, 1, 2), (True, True, False))
    """
    cosines = affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(0))
    world, free = [-1, -1, -1], np.abs(cosines)
    for _ in range(3):  # the strongest pairing first, so that oblique axes are never used twice
        w, v = np.unravel_index(int(np.argmax(free)), (3, 3))
        world[int(v)] = int(w)
        free[w, :] = -1
        free[:, v] = -1
    flips = tuple(bool(cosines[world[v], v] < 0) for v in range(3))
    return tuple(world), flips


def to_ras(data: NDArray[np.generic], geometry: Geometry) -> tuple[NDArray[np.generic], Geometry]:
    """Permute and flip voxel axes to the order closest to RAS+; no resampling, the world stays where it is.

    Parameters
    ----------
    data : (..., X, Y, Z)
        Any type; leading axes are carried along.
    geometry : Geometry
        Grid of ``data``.
    """
    world, flips = orientation(geometry.affine)
    lead = data.ndim - 3
    for axis, flip in enumerate(flips):
        if flip:
            data = np.flip(data, lead + axis)
    order = [world.index(w) for w in range(3)]
    data = data.transpose(*range(lead), *(lead + o for o in order))
    return data, ras_geometry(geometry)


def ras_geometry(geometry: Geometry) -> Geometry:
    """Grid that `to_ras` gives to data on this one.

    Parameters
    ----------
    geometry : Geometry
        Grid in any axis order.
    """
    world, flips = orientation(geometry.affine)
    matrix, corner = geometry.affine[:3, :3].copy(), geometry.affine[:3, 3].copy()
    for axis, flip in enumerate(flips):
        if flip:
            corner = corner + matrix[:, axis] * (geometry.shape[axis] - 1)
            matrix[:, axis] = -matrix[:, axis]
    order = [world.index(w) for w in range(3)]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix[:, order], corner
    x, y, z = (geometry.shape[o] for o in order)
    return Geometry((x, y, z), affine)


def from_ras(data: NDArray[np.generic], native: Geometry) -> NDArray[np.generic]:
    """Undo `to_ras`: bring RAS-ordered data back to the axis order of its file.

    Parameters
    ----------
    data : (..., X, Y, Z)
        On the grid ``ras_geometry(native)``.
    native : Geometry
        The file's own grid.

    Examples
    --------
    >>> native = Geometry((2, 3, 4), np.diag([-1.0, 1.0, 1.0, 1.0]))
    >>> image = np.arange(24).reshape(2, 3, 4)
    >>> bool((from_ras(to_ras(image, native)[0], native) == image).all())
    True
    """
    world, flips = orientation(native.affine)
    lead = data.ndim - 3
    data = data.transpose(*range(lead), *(lead + w for w in world))
    for axis, flip in enumerate(flips):
        if flip:
            data = np.flip(data, lead + axis)
    return data


def check_same(a: Geometry, b: Geometry, *, what: str, tolerance_mm: float = 0.05) -> None:
    """Refuse two grids that are not the same.

    Parameters
    ----------
    a, b : Geometry
        The grids.
    what : str
        What they belong to, for the message.
    tolerance_mm : float
        Largest distance that two voxels of the same index may lie apart.

    Raises
    ------
    GeometryError
        If shapes differ, or voxels of the same index lie further apart than the tolerance.
    """
    if a.shape != b.shape:
        raise GeometryError(f"{what}: grids differ, {a.shape} against {b.shape} voxels; resample one onto the other")
    gap = largest_gap_mm(a, b)
    if gap > tolerance_mm:
        raise GeometryError(f"{what}: affines differ by up to {gap:.3g} mm; resample one onto the other")


def largest_gap_mm(a: Geometry, b: Geometry) -> float:
    """Largest distance between voxels of the same index, over the corners of the grid.

    Parameters
    ----------
    a, b : Geometry
        Two grids of one shape.
    """
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in a.shape], indexing="ij")).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.linalg.norm(((a.affine - b.affine) @ corners)[:3], axis=0).max())


def with_spacing(geometry: Geometry, spacing: tuple[float, float, float]) -> Geometry:
    """The grid with another voxel size that covers the same block of space, edge to edge.

    Parameters
    ----------
    geometry : Geometry
        Grid to replace.
    spacing : (3,) float
        Wanted voxel size, mm; met up to rounding the shape, so the block stays covered exactly.

    Examples
    --------
    >>> with_spacing(Geometry((10, 10, 10), np.eye(4)), (2.0, 2.0, 5.0)).shape
    (5, 5, 2)
    """
    old = np.array(geometry.spacing)
    x, y, z = np.maximum(1, np.round(np.array(geometry.shape) * old / np.array(spacing))).astype(int).tolist()
    return with_shape(geometry, (x, y, z))


def with_shape(geometry: Geometry, shape: Shape) -> Geometry:
    """The grid with another number of voxels that covers the same block of space, edge to edge.

    Parameters
    ----------
    geometry : Geometry
        Grid to replace.
    shape : (X, Y, Z) int
        Wanted.

    Examples
    --------
    >>> with_shape(Geometry((10, 10, 10), np.eye(4)), (5, 5, 2)).spacing
    (2.0, 2.0, 5.0)
    """
    scale = np.array(geometry.shape) / np.array(shape)  # new voxel in old voxels
    affine = geometry.affine.copy()
    affine[:3, :3] = geometry.affine[:3, :3] * scale
    affine[:3, 3] = geometry.affine[:3, 3] + geometry.affine[:3, :3] @ ((scale - 1) / 2)
    return Geometry(shape, affine)


def with_at_most(geometry: Geometry, voxels: int) -> Geometry:
    """The grid, its finest axes coarsened together until about so many voxels are left at most.

    Parameters
    ----------
    geometry : Geometry
        Grid to replace; returned as it is when it is small enough.
    voxels : int
        Wanted number, met up to rounding the shape.

    Examples
    --------
    >>> with_at_most(Geometry((100, 100, 10), np.diag([1.0, 1.0, 5.0, 1.0])), 25_000).shape
    (50, 50, 10)
    """
    if np.prod(geometry.shape) <= voxels:
        return geometry
    extent = np.array(geometry.shape) * geometry.spacing
    low, high = min(geometry.spacing), float(extent.max())
    for _ in range(40):
        side = (low + high) / 2
        count = np.prod(extent / np.maximum(side, geometry.spacing))
        low, high = (side, high) if count > voxels else (low, side)
    x, y, z = (max(high, s) for s in geometry.spacing)
    return with_spacing(geometry, (x, y, z))


def thick(spacing: Sequence[float]) -> list[bool]:
    """Which axes are those of thick slices, between which there is nothing to see.

    Parameters
    ----------
    spacing : (3,) float
        Voxel size, mm.

    Examples
    --------
    >>> thick((1.5, 1.5, 10.0))
    [False, False, True]
    """
    return [float(edge) >= THICK * float(min(spacing)) for edge in spacing]
