"""One label's share of a net: the closed, manifold surface around its voxels.

Where voxels of one label touch by an edge or a corner only, the net's surface touches itself. There it gets corners of
its own for each sheet, and where the same two sheets meet along an edge and at both its ends, a vertex in the middle of
it for each; sheets are then drawn apart by a few hundredths of a voxel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewscan.deliver import nets
from fewscan.deliver.surface import Corners, Mesh
from fewscan.deliver.surface_net import Net
from fewscan.space.geometry import Array

APART = 0.03  # voxels by which sheets are drawn apart where voxels of one label touch by an edge or a corner only


@dataclass(frozen=True, eq=False)
class Sheet:
    """Faces as corners of quads, and where each corner lies.

    Parameters
    ----------
    chosen : (q,) int
        Quads of the net.
    inverse : (q,) bool
        Whether the label lies behind them.
    corners : (q, 4) int
        Their corners.
    origin : (v,) int
        Vertex of the net that each corner comes from.
    nudge : (v, 3) float
        How far it is drawn away, voxels.
    doubled : (d, 4) int
        Sides of quads (four times the quad plus the side) that lie on one edge; the first two belong to one sheet, the
        others to the other.
    """

    chosen: NDArray[np.int64]
    inverse: NDArray[np.bool_]
    corners: Corners
    origin: NDArray[np.int64]
    nudge: Array
    doubled: Corners


def sheet_of(net: Net, value: int) -> Sheet:
    """The quads around a label, with corners of their own where its surface touches itself.

    Parameters
    ----------
    net : Net
        Of all labels.
    value : int
        Of the label.
    """
    before, behind = (net.labels[net.sides[:, side]] == value for side in (0, 1))
    chosen = np.flatnonzero(before != behind)
    inverse = behind[chosen]
    quads, axes = net.quads[chosen], net.axes[chosen]
    used = np.zeros(len(net.cells), bool)
    used[quads.ravel()] = True
    vertices = np.flatnonzero(used)
    local = np.cumsum(used, dtype=np.int32)[quads] - 1
    voxel = net.cells[quads[:, 2]].astype(np.int64)  # the third corner's cell is named by the voxel before the quad
    voxel[np.arange(len(voxel)), axes] += inverse
    strides = net.cells.max(0).astype(np.int64) + 2
    key = (voxel[:, 0] * strides[1] + voxel[:, 1]) * strides[2] + voxel[:, 2]
    corners, origin, doubled = nets.split(np.ascontiguousarray(local), axes, key, len(vertices))
    nudge = np.zeros((len(origin), 3))
    twice = np.bincount(origin, minlength=len(vertices))[origin] > 1
    near = np.flatnonzero(twice[corners].any(1))
    centre = net.cells[quads[near]].mean(1)
    for side in range(4):
        np.add.at(nudge, corners[near, side], centre - net.cells[quads[near, side]])
    nudge[~twice] = 0
    return Sheet(chosen, inverse, corners, vertices[origin], _shortened(nudge), doubled)


def _shortened(ways: Array) -> Array:
    length = np.linalg.norm(ways, axis=1, keepdims=True)
    short: Array = ways * APART / np.where(length > 0, length, 1)
    return short


def mesh_of(net: Net, sheet: Sheet) -> tuple[Mesh, NDArray[np.int64]]:
    """A sheet as triangles in the world, and the vertex of the net that each of its vertices belongs to.

    Each quad is cut along its shorter diagonal, alike for the labels on both its sides.

    Parameters
    ----------
    net : Net
        As it is now.
    sheet : Sheet
        From `sheet_of`.
    """
    short = np.empty(len(sheet.chosen), bool)
    nets.diagonals(net.cells, net.moved, net.quads[sheet.chosen], net.spacing, short)
    first = np.where(short[:, None], [0, 1, 2], [0, 1, 3])
    second = np.where(short[:, None], [0, 2, 3], [1, 2, 3])
    cut = np.stack([first, second], 1)  # (q, 2, 3)
    faces = np.take_along_axis(sheet.corners[:, None, :], cut, 2)
    places = net.cells[sheet.origin] + net.moved[sheet.origin].astype(np.float64) + sheet.nudge
    origin, backward = sheet.origin, np.repeat(sheet.inverse, 2)
    faces = faces.reshape(-1, 3)
    if len(sheet.doubled):
        places, faces, origin, backward = _with_middles(net, sheet, places, faces)
    backward = backward ^ (np.linalg.det(net.affine[:3, :3]) < 0)
    faces = np.where(backward[:, None], faces[:, ::-1], faces)
    world = places @ net.affine[:3, :3].T + net.affine[:3, 3]
    return Mesh(world, np.ascontiguousarray(faces, dtype=np.int32)), origin


def _with_middles(
    net: Net, sheet: Sheet, places: Array, faces: Corners
) -> tuple[Array, Corners, NDArray[np.int64], NDArray[np.bool_]]:
    """Places, faces, origins and turned faces, with a vertex in the middle of each doubled edge for each of its sheets.

    A quad at such an edge becomes a fan around a vertex in its middle.
    """
    pairs = sheet.doubled.reshape(-1, 2)
    quad, side = pairs // 4, pairs % 4
    ends = np.stack([sheet.corners[quad[:, 0], (side[:, 0] + step) % 4] for step in (0, 1)], 1)
    square = net.cells[net.quads[sheet.chosen]].astype(np.float64)  # (q, 4, 3)
    middle = np.stack([square[quad[:, 0], (side[:, 0] + step) % 4] for step in (0, 1)], 1).mean(1)
    away = square[quad].mean((1, 2)) - middle
    middles = places[ends].mean(1) + _shortened(away)
    fanned = np.unique(quad)
    centres = places[sheet.corners[fanned]].mean(1)
    number = {code: len(places) + i for i, pair in enumerate(pairs.tolist()) for code in pair}
    fans, turned = [], []
    for i, q in enumerate(fanned.tolist()):
        ring = []
        for s in range(4):
            ring += [int(sheet.corners[q, s]), *([number[4 * q + s]] if 4 * q + s in number else [])]
        hub = len(places) + len(pairs) + i
        fans += [(hub, a, b) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
        turned += [bool(sheet.inverse[q])] * len(ring)
    kept = np.ones(len(sheet.chosen), bool)
    kept[fanned] = False
    kept = np.repeat(kept, 2)
    return (
        np.concatenate([places, middles, centres]),
        np.concatenate([faces[kept], np.array(fans, np.int32)]),
        np.concatenate([sheet.origin, sheet.origin[ends[:, 0]], sheet.origin[sheet.corners[fanned, 0]]]),
        np.concatenate([np.repeat(sheet.inverse, 2)[kept], np.array(turned, bool)]),
    )
