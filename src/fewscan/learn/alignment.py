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

LEVELS = ((8_000, 40),)  # of the fits: scans of one kind, for a network that sees what is left


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
        """Intensities or probabilities (C, X, Y, Z) on the shared grid; beyond the border the case's voxels repeat."""
        return affine.onto(data, self.own, grid=self.shared, matrix=self.matrix)

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
    return torch.from_numpy(np.array(case.guide[:1]))


def _fit(fixed: Tensor, moving: Tensor, *, grids: tuple[Geometry, Geometry]) -> Array:
    """A coarse affine fit; edge to edge where it fails."""
    try:
        matrix = affine.fit(fixed, moving, grids=grids, levels=LEVELS)
        if affine.plausible(matrix):
            return matrix
    except GeometryError:
        pass
    one, other = grids
    edge: Array = with_shape(other, one.shape).affine @ np.linalg.inv(one.affine)
    return edge
