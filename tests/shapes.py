"""Shapes whose volume, walls and faults are known, as label maps and as meshes."""

from __future__ import annotations

import numpy as np

from fewscan.deliver.surface import Mesh
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Labelmap


def oblique(shape, *, spacing=(1.0, 1.0, 3.0)):
    """A grid that is turned about two axes."""
    a, b = 0.4, 0.25
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ np.diag(spacing)
    affine[:3, 3] = (-20, 35, 100)
    return Geometry(shape, affine)


def labelmap(data, *, geometry=None, names=None):
    data = np.asarray(data, np.uint16)
    names = names or {int(v): f"label {v}" for v in np.unique(data) if v}
    return Labelmap(data, geometry or Geometry(data.shape, np.eye(4)), names)


def ball(*, radius_mm=11.0, geometry=None, side=32):
    """A ball in the middle of a grid."""
    geometry = geometry or Geometry((side, side, side), np.eye(4))
    index = np.indices(geometry.shape).reshape(3, -1)
    places = geometry.affine[:3, :3] @ (index - (np.array(geometry.shape)[:, None] - 1) / 2)
    inside = (np.linalg.norm(places, axis=0) <= radius_mm).reshape(geometry.shape)
    return labelmap(inside, geometry=geometry, names={1: "ball"})


def two_boxes():
    """Two boxes that share a wall."""
    data = np.zeros((20, 14, 14), np.uint16)
    data[3:10, 3:11, 3:11], data[10:17, 3:11, 3:11] = 1, 2
    return labelmap(data)


def box(size=(10.0, 10.0, 10.0), *, at=(0.0, 0.0, 0.0)):
    """A closed box of twelve triangles."""
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float) * size + at
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [f for a, b, c, d in quads for f in ((a, b, c), (a, c, d))]
    return Mesh(corners, np.array(faces, np.int32))
