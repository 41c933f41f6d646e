"""Where each scan lies on the grid that all share while a registration network learns.

`fewscan register` brings the moving scan affinely onto the fixed one before the network sees the pair, so that the
network learns from scans that lie alike too: each is brought affinely onto the most usual one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.errors import GeometryError
from fewscan.learn.batches import Prepared, resample_index
from fewscan.space import affine, kernels
from fewscan.space import field as fields
from fewscan.space.geometry import Array, Geometry, Shape, with_shape

MOST_SCALE = 3.0  # volume ratio of an affine fit beyond which the headers are believed instead


@dataclass(frozen=True, eq=False)
class Alignment:
    """Affine map between the shared grid and a case's own.

    Parameters
    ----------
    shared, own : Geometry
        The two grids.
    matrix : (4, 4) float
        From the world of the shared grid to that of the case's own, mm.
    """

    shared: Geometry
    own: Geometry
    matrix: Array

    def onto_shared(self, data: Tensor) -> Tensor:
        """Image or probabilities (C, X, Y, Z) of the case on the shared grid; beyond the border its voxels repeat."""
        return affine.onto(data, self.own, grid=self.shared, matrix=self.matrix)

    def onto_own(self, data: Tensor) -> Tensor:
        """Values (C, X, Y, Z) on the shared grid at the case's own voxels; 0 where that grid does not reach."""
        back = self._back
        missed = kernels.outside(self._places(back), self.shared.shape)
        return affine.onto(data, self.shared, grid=self.own, matrix=back) * ~missed

    def labels_onto_shared(self, index: NDArray[np.int16], *, classes: int) -> NDArray[np.int16]:
        """Class indices (X, Y, Z) of the case on the shared grid; -1, "not looked at", where it does not reach.

        Parameters
        ----------
        index : (X, Y, Z) int16
            On the case's own grid.
        classes : int
            Number of classes.
        """
        x, y, z = (min(n, 2 * m) for n, m in zip(self.own.shape, self.shared.shape, strict=True))
        coarse = with_shape(self.own, (x, y, z))
        u = fields.from_matrix(self.matrix, self.shared).to_moving(coarse)
        index = resample_index(index, coarse.shape, classes=classes)
        return kernels.vote_labels(index + 1, torch.from_numpy(u)).astype(np.int16) - 1

    def carried(self, u: Tensor, *, moving: Alignment) -> Tensor:
        """Displacement (3, X, Y, Z) from this case's own voxels to those of another, through one on the shared grid.

        Parameters
        ----------
        u : (1, 3, X, Y, Z) float
            From the shared grid of this case to that of the other, voxels.
        moving : Alignment
            Of the other case.
        """
        back = self._back
        to_shared = self._places(back)
        axes = [torch.arange(n, dtype=torch.float32) for n in self.own.shape]
        here = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        there = here + to_shared + kernels.sample(u, to_shared[None])[0]
        to_moving = np.linalg.inv(moving.own.affine) @ moving.matrix @ self.shared.affine
        matrix = torch.from_numpy(to_moving.astype(np.float32))
        return torch.einsum("ij,jxyz->ixyz", matrix[:3, :3], there) + matrix[:3, 3].view(3, 1, 1, 1) - here

    @property
    def _back(self) -> Array:
        answer: Array = np.linalg.inv(self.matrix).astype(np.float64)
        return answer

    def _places(self, back: Array) -> Tensor:
        return torch.from_numpy(fields.from_matrix(back, self.own).to_moving(self.shared))


def align(cases: Sequence[Prepared], shape: Shape, *, spacing: Sequence[float]) -> list[Alignment]:
    """Bring every case onto the shared grid: the block of the case whose size is most usual, labelled ones first.

    Parameters
    ----------
    cases : sequence of Prepared
        On the plan's grid.
    shape : (X, Y, Z) int
        Of the shared grid.
    spacing : (3,) float
        Of the plan, mm.
    """
    grids = [grid_of(case, spacing) for case in cases]
    size = np.log([grid.shape for grid in grids])
    unusual = np.abs(size - np.median(size, 0)).sum(1)
    eligible = [i for i, case in enumerate(cases) if case.label is not None] or range(len(cases))
    usual = min(eligible, key=lambda i: float(unusual[i]))
    shared, reference = with_shape(grids[usual], shape), _first(cases[usual])
    answer = []
    for i, (case, own) in enumerate(zip(cases, grids, strict=True)):
        matrix = np.eye(4) if i == usual else _fit(reference, _first(case), grids=(grids[usual], own))
        answer.append(Alignment(shared, own, matrix))
    return answer


def grid_of(case: Prepared, spacing: Sequence[float]) -> Geometry:
    """Grid of a prepared case, in a world of its own that begins with its first voxel.

    Parameters
    ----------
    case : Prepared
        On the plan's grid.
    spacing : (3,) float
        Of the plan, mm.
    """
    x, y, z = case.image.shape[1:]
    return Geometry((x, y, z), np.diag([*spacing, 1.0]))


def _first(case: Prepared) -> Tensor:
    return torch.from_numpy(np.array(case.image[:1]))


def _fit(fixed: Tensor, moving: Tensor, *, grids: tuple[Geometry, Geometry]) -> Array:
    """A coarse affine fit, which pairs that are like each other only need; edge to edge where it fails."""
    try:
        matrix = affine.fit(fixed, moving, grids=grids, levels=affine.LEVELS[:1])
        if 1 / MOST_SCALE < float(np.linalg.det(matrix[:3, :3])) < MOST_SCALE:
            return matrix
    except GeometryError:
        pass
    one, other = grids
    edge: Array = with_shape(other, one.shape).affine @ np.linalg.inv(one.affine)
    return edge
