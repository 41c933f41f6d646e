"""The net of a label map, smoothed within half a voxel of the mask's boundary.

Smoothing alone would shrink what is round, so every piece is blown up again by a pressure of its own until it has the
volume of its voxels. The loops are in `nets`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cc3d
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import spsolve

from fewscan.deliver import nets
from fewscan.deliver.surface import Corners, in_threads
from fewscan.errors import DataError
from fewscan.space.geometry import Array
from fewscan.space.volume import IGNORE, Labelmap, bounding_box

RADIUS = 0.46
"""How far a vertex may go from its corner of the mask, voxels: along each axis where that keeps it within half a voxel
of the mask's boundary, else in all. With `sheets.APART` it stays below a half, so that two vertices never meet."""
SHARE = 0.5  # of the way to the neighbours' mean, each time
MOST_PASSES = 200
HOLD_EVERY, HOLD_LAST = 5, 8  # passes between two corrections of the volumes, and corrections at the end
MOST_PRESSURE = 0.2  # voxels in one correction


@dataclass(eq=False, kw_only=True)
class Net:
    """The net of a label map, on its grid.

    Parameters
    ----------
    cells : (V, 3) int
        Cell of each vertex.
    neighbours : (V, 6) int
        Vertices next to each, or -1.
    free : (V,) int
        Octants of its cell in which each vertex may go further, as bits.
    quads : (Q, 4) int
        Corners.
    sides : (Q, 2) int
        Piece before and behind each quad; 0 is background.
    axes : (Q,) int
        Axis that crosses each quad.
    labels : (P,) int
        Label of each piece.
    voxels : (P,) float
        Number of voxels of each piece.
    moved : (V, 3) float
        Way of each vertex from the middle of its cell, voxels.
    affine : (4, 4) float
        Cell to RAS+ mm; the middle of cell (0, 0, 0) is at (0, 0, 0).
    """

    cells: NDArray[np.int32]
    neighbours: Corners
    free: NDArray[np.uint8]
    quads: Corners
    sides: Corners
    axes: NDArray[np.int8]
    labels: NDArray[np.int64]
    voxels: Array
    moved: NDArray[np.float32]
    affine: Array

    @property
    def spacing(self) -> Array:
        """Voxel size along each axis, mm."""
        found: Array = np.sqrt((self.affine[:3, :3] ** 2).sum(0))
        return found


def extract(label: Labelmap) -> Net:
    """The net of a label map, its vertices still on the corners of the voxels.

    Parameters
    ----------
    label : Labelmap
        As for `surfaces`.

    Raises
    ------
    DataError
        If the map holds no label.
    """
    inside = (label.data != 0) & (label.data != IGNORE)
    if not inside.any():
        raise DataError("the label map holds no label, so there is no surface to make; give one that is not empty")
    box = bounding_box(inside)
    shown = np.pad(np.where(inside[box], label.data[box], 0), 1)
    del inside
    pieces = cc3d.connected_components(shown, connectivity=6, out_dtype=np.uint32)
    count = int(pieces.max())
    labels = np.zeros(count + 1, np.int64)
    labels[pieces.ravel()] = shown.ravel()
    del shown
    vertices, quads = nets.count(pieces)
    net = Net(
        cells=np.empty((vertices, 3), np.int32), neighbours=np.empty((vertices, 6), np.int32),
        free=np.empty(vertices, np.uint8), quads=np.empty((quads, 4), np.int32),
        sides=np.empty((quads, 2), np.int32), axes=np.empty(quads, np.int8), labels=labels,
        voxels=np.bincount(pieces.ravel(), minlength=count + 1).astype(np.float64),
        moved=np.zeros((vertices, 3), np.float32), affine=label.geometry.affine.copy(),
    )  # fmt: skip
    nets.extract(pieces, net.cells, net.neighbours, net.free, net.quads, net.sides, net.axes)
    first = (
        np.array([side.start for side in box]) - 0.5
    )  # of the padded box: its voxel 0 lies one before, its cell half
    net.affine[:3, 3] += net.affine[:3, :3] @ first
    return net


def fair(net: Net, *, smooth_mm: float) -> None:
    """Smooth a net in place, each piece keeping its volume.

    Parameters
    ----------
    net : Net
        From `extract`.
    smooth_mm : float
        Standard deviation of the smoothing along the surface.

    Notes
    -----
    A pass that goes a share s of the way spreads a vertex by s h² / 2 along each direction of a square mesh with edge
    h, so that it takes 2 smooth_mm² / (s h²) passes.
    """
    edge = float(np.prod(net.spacing)) ** (1 / 3)
    passes = min(MOST_PASSES, math.ceil(2 * smooth_mm**2 / (SHARE * edge**2)))
    hold = _Volumes(net)
    for done in range(1, passes + 1):
        out = np.empty_like(net.moved)
        _in_slabs(nets.smooth, len(out), net.cells, net.neighbours, net.free, net.moved, out, SHARE, RADIUS)
        net.moved = out
        if done % HOLD_EVERY == 0:
            hold()
    for _ in range(HOLD_LAST if passes else 0):
        hold()


class _Volumes:
    """Brings every piece of a net back to the volume of its voxels."""

    def __init__(self, net: Net) -> None:
        self.net, self.scale = net, net.spacing
        pieces = len(net.labels)
        keys = net.sides[:, 0].astype(np.int64) * pieces + net.sides[:, 1]
        walls, self.walls = np.unique(keys, return_inverse=True)
        self.walls = self.walls.astype(np.int32)
        self.before, self.behind = walls // pieces, walls % pieces
        self.push, self.weight = np.empty_like(net.moved), np.empty(len(net.moved), np.float32)

    def __call__(self) -> None:
        """One step: to first order each wall's pressure times its area makes up for what its pieces lack."""
        net, pieces = self.net, len(self.net.labels)
        volumes, areas = np.zeros(pieces), np.zeros(len(self.before))
        nets.measure(net.cells, net.moved, net.quads, net.sides, self.walls, self.scale, volumes, areas)
        rows, columns = np.r_[self.before, self.behind], np.r_[self.behind, self.before]
        between = sparse.coo_array((np.r_[areas, areas], (rows, columns)), shape=(pieces, pieces)).tocsc()
        system = sparse.diags_array(np.asarray(between.sum(1)).ravel() + 1e-9).tocsc() - between
        pressure = np.zeros(pieces)  # the background's stays 0
        pressure[1:] = spsolve(system[1:, 1:], net.voxels[1:] - volumes[1:])
        step = np.clip(pressure[self.before] - pressure[self.behind], -MOST_PRESSURE, MOST_PRESSURE)
        nets.inflate(net.cells, net.free, net.moved, net.quads, self.walls, step, self.push, self.weight, RADIUS)


def _in_slabs(kernel: Callable[..., Any], length: int, *args: Any) -> None:
    """Run a loop over ``range(length)``, a part on each thread."""
    count = max(1, min(torch.get_num_threads(), length))
    parts = list(pairwise(round(i * length / count) for i in range(count + 1)))
    in_threads(lambda part: kernel(*args, *part), parts)
