"""A surface of triangles in world millimetres, and what can be asked of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fewscan.deliver import triangles
from fewscan.space.geometry import Array

Corners = NDArray[np.int32]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Mesh:
    """A surface of triangles.

    Parameters
    ----------
    points : (V, 3) float
        World, mm.
    faces : (F, 3) int
        Corners, counterclockwise seen from outside.
    """

    points: Array
    faces: Corners

    @property
    def volume_mm3(self) -> float:
        """Enclosed volume; negative where the surface is inside out."""
        a, b, c = (self.points[self.faces[:, i]] - self.points.mean(0) for i in range(3))
        return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)

    @property
    def area_vectors(self) -> Array:
        """(F, 3): normal of each face times its area, mm²."""
        a, b, c = (self.points[self.faces[:, i]] for i in range(3))
        found: Array = np.cross(b - a, c - a) / 2
        return found

    @property
    def normals(self) -> Array:
        """(V, 3): mean direction of the faces around each vertex, weighted by area; 0 where they cancel out."""
        found, vectors = np.empty_like(self.points), self.area_vectors
        for axis in range(3):
            found[:, axis] = sum(np.bincount(c, vectors[:, axis], len(found)) for c in self.faces.T)
        length = np.linalg.norm(found, axis=1, keepdims=True)
        unit: Array = found / np.where(length > 0, length, 1)
        return unit


def crossing_faces(mesh: Mesh) -> NDArray[np.bool_]:
    """(F,): which faces cross another one, or lie on it.

    Parameters
    ----------
    mesh : Mesh
        Any surface; faces that share a corner may meet there.
    """
    found = np.zeros(len(mesh.faces), np.bool_)
    if len(mesh.faces):
        cubes = Cubes(mesh)
        args = cubes.low, cubes.size, cubes.shape, cubes.spans, cubes.starts, cubes.lists
        triangles.crossings(cubes.corners, mesh.faces, cubes.boxes, *args, found)
    return found


class Cubes:
    """Grid of cubes to find a mesh's triangles in, as the loops of `triangles` take it.

    Parameters
    ----------
    mesh : Mesh
        With at least one face.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.corners = np.ascontiguousarray(mesh.points[mesh.faces])
        self.boxes = np.concatenate([self.corners.min(1), self.corners.max(1)], 1)
        self.low, high = self.boxes[:, :3].min(0), self.boxes[:, 3:].max(0)
        size = 1.5 * float((self.boxes[:, 3:] - self.boxes[:, :3]).max(1).mean()) + 1e-6
        room = float(np.prod(high - self.low + size))
        self.size = max(size, (room / (16 * len(mesh.faces) + 1e5)) ** (1 / 3))  # no huge grid that is mostly empty
        self.shape = np.maximum(np.ceil((high - self.low) / self.size), 1).astype(np.int64)
        self.spans, self.starts, self.lists = triangles.fill_grid(self.boxes, self.low, self.size, self.shape)


def shells(mesh: Mesh) -> list[Mesh]:
    """The connected surfaces of a mesh, largest first; cavities count as surfaces.

    Parameters
    ----------
    mesh : Mesh
        Any surface.
    """
    a, b = mesh.faces[:, [0, 1]].ravel(), mesh.faces[:, [1, 2]].ravel()
    linked = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(mesh.points),) * 2)
    _, piece = connected_components(linked, directed=False)
    of_face = piece[mesh.faces[:, 0]]
    found = []
    for number in np.unique(of_face):
        used, faces = np.unique(mesh.faces[of_face == number], return_inverse=True)
        found.append(Mesh(mesh.points[used], faces.reshape(-1, 3).astype(np.int32)))
    return sorted(found, key=lambda shell: -abs(shell.volume_mm3))


def together(meshes: Sequence[Mesh]) -> Mesh:
    """Several meshes as one, without uniting them.

    Parameters
    ----------
    meshes : sequence of Mesh
        At least one.
    """
    offsets = np.cumsum([0, *(len(mesh.points) for mesh in meshes[:-1])])
    faces = [mesh.faces + offset for mesh, offset in zip(meshes, offsets, strict=True)]
    return Mesh(np.concatenate([mesh.points for mesh in meshes]), np.concatenate(faces).astype(np.int32))


def in_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """The answers for all items, in as many threads as torch has.

    Parameters
    ----------
    work : callable
        Mostly loops that release the interpreter lock.
    items : sequence
        What to work on.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(work, items))
