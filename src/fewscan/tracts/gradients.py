"""Diffusion gradients: b-values and directions, from FSL's two text files into the RAS+ world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewscan.errors import DataError
from fewscan.space.geometry import Array, Geometry

B0 = 50.0
"""s/mm2; volumes up to here count as not diffusion-weighted, as scanners write 5 or 20 for 0."""
LEAST_DIRECTIONS = 6  # a tensor has six numbers
SAME_SHELL = 100.0  # s/mm2
SAME_DEG = 2.0  # directions up to here count as one: repeated, and turned a little by the correction of motion
LEAST_SPREAD = 0.02  # smallest singular value of the design of a tensor over the largest; spread directions have 0.6


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradient table of a diffusion scan.

    Parameters
    ----------
    bvals : (V,) float
        s/mm2, one a volume.
    directions : (V, 3) float
        Unit vectors in the RAS+ world; zero where `B0` or less.

    Raises
    ------
    DataError
        If lengths differ, no volume is unweighted, or fewer than six are weighted.
    """

    bvals: Array
    directions: Array

    def __post_init__(self) -> None:
        if self.directions.shape != (len(self.bvals), 3):
            raise DataError(f"{len(self.bvals)} b-values for directions {self.directions.shape}; give one of each")
        if not (self.bvals <= B0).any():
            raise DataError(f"no volume with b <= {B0:.0f} s/mm2 among {len(self.bvals)}; at least one is needed")
        weighted = int((self.bvals > B0).sum())
        if weighted < LEAST_DIRECTIONS:
            raise DataError(f"{weighted} diffusion-weighted volumes, at least {LEAST_DIRECTIONS} are needed")

    def shell(self, b: float) -> NDArray[np.bool_]:
        """Volumes of one b-value, within 100 s/mm2.

        Parameters
        ----------
        b : float
            s/mm2.
        """
        inside: NDArray[np.bool_] = (self.bvals > B0) & (np.abs(self.bvals - b) <= SAME_SHELL)
        return inside

    def apart(self, b: float) -> int:
        """Directions of a shell; one that is stored twice, or as its opposite too, counts once.

        Parameters
        ----------
        b : float
            s/mm2.

        Examples
        --------
        >>> found = spread_directions(6)
        >>> Gradients(np.array([0.0, *[1000.0] * 12]), np.concatenate([np.zeros((1, 3)), found, -found])).apart(1000)
        6
        """
        return distinct(self.directions[self.shell(b)])

    @property
    def shells(self) -> list[float]:
        """b-values of the shells, ascending, each the mean of volumes that lie within 100 s/mm2 of the first."""
        rest, found = np.sort(self.bvals[self.bvals > B0]), []
        while len(rest):
            inside = rest <= rest[0] + SAME_SHELL
            found.append(float(rest[inside].mean()))
            rest = rest[~inside]
        return found


def read_gradients(bvals: Path, bvecs: Path, *, native: Geometry, axes: Array | None = None) -> Gradients:
    """Read FSL's pair of text files.

    Parameters
    ----------
    bvals, bvecs : Path
        One number a volume; three rows (or three columns) of numbers.
    native : Geometry
        Grid of the diffusion scan as it is in its file: FSL counts directions along its voxel axes.
    axes : (3, 3) float, optional
        Signed permutation of the rows, from `orientation.parse_axes`, applied before anything else.

    Raises
    ------
    DataError
        If a file is no table of numbers, or the two do not fit each other.
    """
    b, table = _numbers(bvals).ravel(), _numbers(bvecs)
    if table.shape[0] != 3 and table.shape[1] == 3:
        table = table.T
    if table.shape != (3, len(b)):
        raise DataError(f"{bvecs}: {table.shape[0]} x {table.shape[1]} numbers for {len(b)} b-values in {bvals.name}")
    if not np.isfinite(b).all() or (b < 0).any():
        raise DataError(f"{bvals}: b-values must be finite and not negative; export the file again")
    weighted = b > B0
    length = np.linalg.norm(table, axis=0)
    if not np.isfinite(table[:, weighted]).all() or (np.abs(length[weighted] - 1) > 0.1).any():
        worst = int(np.flatnonzero(weighted)[np.argmax(np.abs(np.nan_to_num(length[weighted]) - 1))])
        raise DataError(f"{bvecs}: direction {worst} has length {length[worst]:.3g}, unit vectors are needed")
    unit = np.where(weighted, table / np.where(weighted, length, 1), 0.0)
    turn = fsl_to_world(native) @ (np.eye(3) if axes is None else axes)
    return Gradients(b, (turn @ unit).T)


def distinct(directions: Array) -> int:
    """How many directions there are, up to sign.

    Parameters
    ----------
    directions : (N, 3) float
        Unit vectors.
    """
    kept: list[Array] = []
    for one in directions:
        if not kept or np.abs(np.stack(kept) @ one).max() < np.cos(np.radians(SAME_DEG)):
            kept.append(one)
    return len(kept)


def determine_tensor(directions: Array) -> bool:
    """Whether signals along these directions tell all six numbers of a tensor: three, stored twice, do not.

    Parameters
    ----------
    directions : (N, 3) float
        Unit vectors.
    """
    if distinct(directions) < LEAST_DIRECTIONS:
        return False
    x, y, z = directions.T
    root = np.sqrt(2)  # so that no way the directions are turned changes what is compared
    design = np.stack([x * x, y * y, z * z, root * x * y, root * x * z, root * y * z], 1)
    values = np.linalg.svd(design, compute_uv=False)
    return bool(values[-1] > LEAST_SPREAD * values[0])


def fsl_to_world(native: Geometry) -> Array:
    """Turns directions of an FSL bvecs file into RAS+ world directions, (3, 3).

    FSL counts along the voxel axes of the file, with the first one reversed where the affine has a positive
    determinant: its own convention is a left-handed, radiological grid (FSL's user guide of FDT). The affine's stretch
    and shear are taken off by the closest rotation or reflection.

    Parameters
    ----------
    native : Geometry
        Grid of the file.

    Examples
    --------
    >>> fsl_to_world(Geometry((4, 4, 4), np.diag([-2.0, 2.0, 2.0, 1.0]))).diagonal().tolist()
    [-1.0, 1.0, 1.0]
    >>> fsl_to_world(Geometry((4, 4, 4), np.diag([2.0, 2.0, 2.0, 1.0]))).diagonal().tolist()
    [-1.0, 1.0, 1.0]
    """
    matrix = native.affine[:3, :3] / np.array(native.spacing)
    left, _, right = np.linalg.svd(matrix)
    turn: Array = left @ right
    if np.linalg.det(turn) > 0:
        turn = turn * np.array([-1.0, 1.0, 1.0])
    return turn


def spread_directions(count: int, *, seed: int = 0, steps: int = 200) -> Array:
    """Directions spread over the half sphere by repulsion of each and its opposite, (count, 3).

    After Jones et al. 1999, Magnetic Resonance in Medicine 42(3), by plain gradient steps.

    Parameters
    ----------
    count : int
        How many.
    seed : int
        Of the start.
    steps : int
        Of the repulsion.
    """
    points = np.random.default_rng(seed).normal(size=(count, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    for step in range(steps):
        push = np.zeros_like(points)
        for sign in (1, -1):
            apart = points[:, None] - sign * points[None]
            length = np.linalg.norm(apart, axis=2, keepdims=True)
            np.divide(apart, length**3, out=apart, where=length > 1e-6)
            push += np.where(length > 1e-6, apart, 0).sum(1)
        push -= (push * points).sum(1, keepdims=True) * points
        largest = np.linalg.norm(push, axis=1).max()
        points += push / max(largest, 1e-9) * 0.2 * (1 - step / steps)
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points


def _numbers(path: Path) -> Array:
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the name")
    try:
        rows = [
            [float(word) for word in line.replace(",", " ").split()] for line in path.read_text("utf-8").splitlines()
        ]
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a table of numbers ({error}); export it as FSL's bvals or bvecs") from None
    rows = [row for row in rows if row]
    if not rows or len({len(row) for row in rows}) != 1:
        raise DataError(f"{path}: rows of {sorted({len(row) for row in rows})} numbers are no table; export it again")
    return np.array(rows)
