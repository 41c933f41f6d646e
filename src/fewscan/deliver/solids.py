"""What a print needs besides anatomy: a hollow inside, cuts, struts between loose pieces, a tag with text, fewer faces.

Solids are united and cut by manifold3d, whose answers are manifold whatever goes in; what goes in must be closed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from manifold3d import CrossSection, Error, FillRule, Manifold, Mesh64, OpType
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from fewscan.deliver import distances, triangles
from fewscan.deliver.mesh import surfaces
from fewscan.deliver.surface import Cubes, Mesh, shells
from fewscan.errors import ConfigError, DataError, ResourceError
from fewscan.space.geometry import Array, Geometry
from fewscan.space.volume import Labelmap

AXES = {"R": 0, "A": 1, "S": 2}
ROUND = 24  # sides of a strut and of a hole
FINEST, MOST_SAMPLES = 3.0, 12_000_000  # samples across the wall of a hollow part, and samples at most
LEAST_CAVITY = 0.05  # of the largest one's volume
CLEAN_MM = 0.002  # by which a surface may move to get rid of slivers that 32 bits a number could fold over
LETTER_MM, RAISED_MM, PLATE_MM, FRAME_MM = 9.0, 0.8, 2.0, 2.0  # of a tag: height of letters, relief, plate, rim
NECK_MM = 3.0  # radius of what joins the tag to the part
CUT = re.compile(r"([RAS])=([-+]?\d+(?:\.\d+)?)")


@dataclass(frozen=True, kw_only=True)
class Additions:
    """What to do to each part before it is printed.

    Parameters
    ----------
    hollow_mm : float
        Wall to leave; 0 leaves the part solid.
    drain_mm : float
        Diameter of a hole at the lowest place of each cavity, through which resin or powder leaves; 0 for none.
    cuts : tuple of str
        Planes, each an axis R, A or S and a coordinate in mm, such as "S=120".
    strut_mm : float
        Diameter of struts that join loose pieces; 0 for none.
    tag : str
        Text on a plate under each part; empty for none.

    Raises
    ------
    ConfigError
        If a length is negative or a cut cannot be read.

    Examples
    --------
    >>> Additions(cuts=("Z=3",))
    Traceback (most recent call last):
    ...
    fewscan.errors.ConfigError: a cut must look like R=10, A=-5 or S=120.5, RAS mm, got 'Z=3'
    """

    hollow_mm: float = 0.0
    drain_mm: float = 0.0
    cuts: tuple[str, ...] = ()
    strut_mm: float = 0.0
    tag: str = ""

    def __post_init__(self) -> None:
        for name in ("hollow_mm", "drain_mm", "strut_mm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be 0 or more, got {value}")
        if self.drain_mm and not self.hollow_mm:
            raise ConfigError(f"a drain of {self.drain_mm} mm needs a hollow part; give the wall's thickness too")
        for cut in self.cuts:
            if CUT.fullmatch(cut) is None:
                raise ConfigError(f"a cut must look like R=10, A=-5 or S=120.5, RAS mm, got {cut!r}")


def add(mesh: Mesh, wanted: Additions) -> tuple[list[Mesh], list[str]]:
    """A part as it shall be printed: in one piece, or in several where it is cut; and what was done to it.

    Parameters
    ----------
    mesh : Mesh
        Closed surface, RAS+ mm.
    wanted : Additions
        What to do.

    Raises
    ------
    DataError
        If the mesh is not closed, or a cut misses it.
    """
    done = []
    if wanted.strut_mm:
        mesh, count = with_struts(mesh, diameter_mm=wanted.strut_mm)
        done += [f"{count} strut(s) of {wanted.strut_mm:g} mm join loose pieces"] if count else []
    if wanted.hollow_mm:
        before = mesh.volume_mm3
        mesh = hollowed(mesh, wall_mm=wanted.hollow_mm, drain_mm=wanted.drain_mm)
        spared = (1 - mesh.volume_mm3 / before) if before else 0.0
        drains = f", drained by holes of {wanted.drain_mm:g} mm" if wanted.drain_mm and spared > 0 else ""
        done.append(f"hollow behind a wall of {wanted.hollow_mm:g} mm, {spared:.0%} of the volume spared{drains}")
    if wanted.tag:
        mesh = tagged(mesh, wanted.tag)
        done.append("a plate with text hangs under it")
    pieces = [mesh]
    for cut in wanted.cuts:
        halves = [half for piece in pieces for half in cut_at(piece, cut)]
        if len(halves) > len(pieces):
            done.append(f"cut at {cut} mm (RAS)")
        pieces = halves
    return pieces, done


def solid(mesh: Mesh) -> Manifold:
    """The mesh as manifold3d takes it.

    Parameters
    ----------
    mesh : Mesh
        Closed, oriented and manifold.

    Raises
    ------
    DataError
        If it is not.
    """
    found = Manifold(Mesh64(np.ascontiguousarray(mesh.points), np.ascontiguousarray(mesh.faces, dtype=np.uint64)))
    if found.status() != Error.NoError:
        raise DataError(f"a surface cannot be made solid ({found.status().name}); mesh the label map without additions")
    return found


def mesh_of(body: Manifold, *, clean_mm: float = CLEAN_MM) -> Mesh:
    """What manifold3d made, as a mesh.

    Parameters
    ----------
    body : Manifold
        Any solid.
    clean_mm : float
        How far the surface may move to lose slivers.
    """
    found = body.simplify(clean_mm).to_mesh64()
    faces = np.array(found.tri_verts, np.int64)
    if len(found.merge_from_vert):
        same = np.arange(len(found.vert_properties))
        same[np.array(found.merge_from_vert)] = np.array(found.merge_to_vert)
        faces = same[faces]
    used, faces = np.unique(faces, return_inverse=True)
    return Mesh(np.array(found.vert_properties[used, :3]), faces.reshape(-1, 3).astype(np.int32))


def hollowed(mesh: Mesh, *, wall_mm: float, drain_mm: float = 0.0) -> Mesh:
    """The mesh with a cavity wherever the inside is further than the wall's thickness from the surface.

    Distances are measured to the surface itself, on a grid of a third of the wall, and the grid's own error is added to
    the wall, so that the wall is not thinner than asked for.

    Parameters
    ----------
    mesh : Mesh
        Closed surface.
    wall_mm : float
        Thickness to leave.
    drain_mm : float
        Diameter of a hole from the lowest place of each cavity downwards; 0 for none.

    Raises
    ------
    ResourceError
        If the part is too large for so thin a wall.
    """
    step = wall_mm / FINEST
    low, high = mesh.points.min(0) - step, mesh.points.max(0) + step
    x, y, z = (int(n) for n in np.ceil((high - low) / step) + 1)
    if x * y * z > MOST_SAMPLES:
        least = FINEST * float(np.prod(high - low) / MOST_SAMPLES) ** (1 / 3)
        raise ResourceError(f"a wall of {wall_mm:g} mm is too thin for a part of this size; ask for {least:.1f} mm")
    cubes = Cubes(mesh)
    deep = np.zeros((x, y, z), bool)
    triangles.inside(cubes.corners, low, step, deep)
    places = low + step * np.argwhere(deep)
    distance = np.empty(len(places))
    args = cubes.corners, cubes.low, cubes.size, cubes.shape, cubes.starts, cubes.lists
    most = wall_mm + 2 * step
    distances.nearest(*args, np.ascontiguousarray(places), most, distance, 0, len(places))
    deep[deep] = distance > wall_mm + step
    if not deep.any():
        return mesh
    deep = _large(deep)
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = low
    cavity = surfaces(Labelmap(deep.astype(np.uint16), Geometry((x, y, z), affine), {1: "cavity"}))[0].mesh
    holes = [hole for shell in shells(cavity) if (hole := _drain(shell, drain_mm, mesh)) is not None]
    body = solid(mesh) - solid(cavity)
    return mesh_of(Manifold.batch_boolean([body, *holes], OpType.Subtract) if holes else body)


def _large(deep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Cavities worth having; each needs a drain, and many drains weaken a part."""
    piece = cc3d.connected_components(deep, connectivity=6)
    voxels = np.bincount(piece.ravel())
    voxels[0] = 0
    kept: NDArray[np.bool_] = (voxels >= LEAST_CAVITY * voxels.max())[piece]
    return kept


def _drain(cavity: Mesh, diameter_mm: float, mesh: Mesh) -> Manifold | None:
    if not diameter_mm or cavity.volume_mm3 <= 0:
        return None
    lowest = cavity.points[cavity.points[:, 2].argmin()]
    bottom = float(mesh.points[:, 2].min()) - 1
    hole = Manifold.cylinder(lowest[2] - bottom + diameter_mm, diameter_mm / 2, circular_segments=ROUND)
    return hole.translate((lowest[0], lowest[1], bottom))


def cut_at(mesh: Mesh, cut: str) -> list[Mesh]:
    """The two closed halves of a mesh; itself where the plane passes it by.

    Parameters
    ----------
    mesh : Mesh
        Closed surface.
    cut : str
        As in `Additions`.
    """
    found = CUT.fullmatch(cut)
    if found is None:
        raise ConfigError(f"a cut must look like R=10, A=-5 or S=120.5, RAS mm, got {cut!r}")
    normal = [0.0, 0.0, 0.0]
    normal[AXES[found[1]]] = 1.0
    halves = solid(mesh).split_by_plane((normal[0], normal[1], normal[2]), float(found[2]))
    kept = [mesh_of(half) for half in halves if not half.is_empty()]
    return kept if len(kept) == 2 else [mesh]


def with_struts(mesh: Mesh, *, diameter_mm: float) -> tuple[Mesh, int]:
    """The mesh with its loose pieces joined by cylinders along the shortest ways between them, and their number.

    Parameters
    ----------
    mesh : Mesh
        Closed surface.
    diameter_mm : float
        Of the struts; they reach half as far into each piece.
    """
    loose = [shell for shell in shells(mesh) if shell.volume_mm3 > 0]
    joined, waiting, struts = [loose[0]], loose[1:], []
    while waiting:
        tree = cKDTree(np.concatenate([shell.points for shell in joined]))
        ways = [tree.query(shell.points) for shell in waiting]
        best = int(np.argmin([float(distance.min()) for distance, _ in ways]))
        distance, index = ways[best]
        start = int(distance.argmin())
        struts.append(_strut(waiting[best].points[start], tree.data[index[start]], diameter_mm))
        joined.append(waiting.pop(best))
    if not struts:
        return mesh, 0
    body = solid(mesh)
    for strut in struts:
        body = body + strut
    return mesh_of(body), len(struts)


def _strut(start: Array, end: Array, diameter_mm: float) -> Manifold:
    """A cylinder from one place to another and its radius beyond both."""
    way = end - start
    length = float(np.linalg.norm(way))
    axis = way / length if length > 1e-6 else np.array([0.0, 0.0, 1.0])
    side = np.cross(axis, np.eye(3)[np.abs(axis).argmin()])
    side /= np.linalg.norm(side)
    frame = np.stack([side, np.cross(axis, side), axis, start - diameter_mm / 2 * axis], 1)
    return Manifold.cylinder(length + diameter_mm, diameter_mm / 2, circular_segments=ROUND).transform(frame)


def tagged(mesh: Mesh, text: str) -> Mesh:
    """The mesh with a plate under its lowest place that carries the text in relief, to be read from below.

    Parameters
    ----------
    mesh : Mesh
        Closed surface.
    text : str
        One line.

    Raises
    ------
    ConfigError
        If the text has nothing to draw.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not text.strip():
        raise ConfigError(f"the tag {text!r} has nothing to print; give letters or digits")
    path = TextPath((0, 0), text, size=LETTER_MM, prop=FontProperties(weight="bold"))
    drawn = (np.asarray(line) for line in path.to_polygons())
    outlines = [line for line in drawn if len(line) > 3]
    letters = CrossSection([line[:-1] for line in outlines], FillRule.EvenOdd)
    left, bottom, right, top = letters.bounds()
    width, height = right - left + 2 * FRAME_MM, top - bottom + 2 * FRAME_MM
    relief = Manifold.extrude(letters.translate((-(left + right) / 2, -(bottom + top) / 2)), 2 * RAISED_MM)
    plate = Manifold.cube((width, height, PLATE_MM), True).translate((0, 0, PLATE_MM / 2))
    plate = plate + relief.translate((0, 0, PLATE_MM - RAISED_MM))
    lowest = mesh.points[mesh.points[:, 2].argmin()]
    down = np.array([[1.0, 0, 0], [0, -1.0, 0], [0, 0, -1.0]])  # letters face down, unmirrored
    frame = np.c_[down, lowest - [0, 0, NECK_MM]]
    neck = Manifold.cylinder(2 * NECK_MM + PLATE_MM, NECK_MM, circular_segments=ROUND)
    neck = neck.translate(tuple(lowest - [0, 0, NECK_MM + PLATE_MM / 2]))
    return mesh_of(solid(mesh) + neck + plate.transform(frame))


def simplified(meshes: Sequence[Mesh], *, faces: int) -> tuple[list[Mesh], float]:
    """Meshes with about so many faces at most together, and how far their surfaces moved at most, mm.

    Parameters
    ----------
    meshes : sequence of Mesh
        Closed surfaces.
    faces : int
        Wanted number; what takes more than 5 mm of moving is left.
    """
    bodies = [solid(mesh) for mesh in meshes]
    tolerance = 0.01
    while sum(body.num_tri() for body in bodies) > faces and tolerance < 5:
        tolerance *= 1.5
        bodies = [solid(mesh).simplify(tolerance) for mesh in meshes]
    moved = 0.0 if tolerance == 0.01 else tolerance
    return [mesh_of(body, clean_mm=tolerance) for body in bodies] if moved else list(meshes), moved
