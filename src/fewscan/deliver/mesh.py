"""Label map to closed surfaces in world millimetres: all labels at once, walls shared, volumes held.

`surface_net` makes and smooths the net of all labels, `sheets` takes each label's surface from it. Where smoothing made
a surface cross itself, the vertices there go back towards the mask's boundary, which crosses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewscan.deliver.sheets import Sheet, mesh_of, sheet_of
from fewscan.deliver.surface import Mesh, crossing_faces, in_threads
from fewscan.deliver.surface_net import Net, extract, fair
from fewscan.space.volume import Labelmap

REACH = 2.5  # of the smoothing, in voxels of the coarsest axis, unless told
MOST_ATTEMPTS = 12  # to untangle


@dataclass(frozen=True, eq=False, kw_only=True)
class Surface:
    """The surface of one label.

    Parameters
    ----------
    value : int
        In the label map.
    name : str
        Of the label.
    mesh : Mesh
        RAS+ mm.
    voxel_mm3 : float
        Volume of its voxels together.
    """

    value: int
    name: str
    mesh: Mesh
    voxel_mm3: float


def surfaces(
    label: Labelmap, *, smooth_mm: float | None = None, say: Callable[[str], None] | None = None
) -> list[Surface]:
    """Closed, oriented, manifold surfaces of all labels of a map, without gaps where they touch.

    Parameters
    ----------
    label : Labelmap
        `IGNORE` counts as background; what touches the border of the grid is closed there.
    smooth_mm : float, optional
        Standard deviation of the smoothing along the surface; 0 leaves the voxels' faces. None takes 2.5 times the
        coarsest voxel edge.
    say : callable, optional
        Gets a sentence where something had to be changed.

    Raises
    ------
    DataError
        If the map holds no label.

    Examples
    --------
    >>> from fewscan.space.geometry import Geometry
    >>> data = np.zeros((6, 6, 6), np.uint16); data[1:5, 1:5, 1:5] = 1
    >>> found, = surfaces(Labelmap(data, Geometry((6, 6, 6), np.diag([2.0, 2.0, 2.0, 1.0])), {1: "cube"}))
    >>> found.name, round(found.voxel_mm3), round(found.mesh.volume_mm3)
    ('cube', 512, 512)
    """
    net = extract(label)
    fair(net, smooth_mm=REACH * float(net.spacing.max()) if smooth_mm is None else smooth_mm)
    values = [int(v) for v in np.unique(net.labels[1:])]
    sheets = in_threads(lambda value: sheet_of(net, value), values)
    meshes, back = _untangled(net, sheets)
    if back and say is not None:
        say(f"{back} vertices of {len(net.cells)} went back towards the mask, where smoothing made surfaces cross")
    voxel = abs(float(np.linalg.det(net.affine[:3, :3])))
    size = {value: voxel * float(net.voxels[net.labels == value].sum()) for value in values}
    return [
        Surface(value=value, name=label.names.get(value, f"label {value}"), mesh=mesh, voxel_mm3=size[value])
        for value, mesh in zip(values, meshes, strict=True)
    ]


def _untangled(net: Net, sheets: Sequence[Sheet]) -> tuple[list[Mesh], int]:
    """Meshes that do not cross themselves, and the number of vertices that had to go back for it."""
    meshes: list[Mesh | None] = [None] * len(sheets)
    gone = np.zeros(len(net.cells), bool)
    waiting = list(range(len(sheets)))
    for attempt in range(MOST_ATTEMPTS):
        bad = np.zeros(len(net.cells), bool)
        for i, (mesh, crossing) in zip(waiting, in_threads(lambda i: _crossing(net, sheets[i]), waiting), strict=True):
            meshes[i] = mesh
            bad[crossing] = True
        if not bad.any():
            break
        for _ in range(attempt // 3):  # what stays tangled needs more room
            ring = net.neighbours[bad].ravel()
            bad[ring[ring >= 0]] = True
        net.moved[bad] *= 0.5 if attempt < MOST_ATTEMPTS // 2 else 0.0
        gone |= bad
        waiting = [i for i, sheet in enumerate(sheets) if bad[sheet.origin].any()]
    return [mesh for mesh in meshes if mesh is not None], int(gone.sum())


def _crossing(net: Net, sheet: Sheet) -> tuple[Mesh, NDArray[np.int64]]:
    """A sheet's mesh, and the vertices of the net where it crosses itself."""
    mesh, origin = mesh_of(net, sheet)
    return mesh, origin[mesh.faces[crossing_faces(mesh)].ravel()]
