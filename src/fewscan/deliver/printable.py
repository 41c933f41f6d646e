"""The printability certificate: what a printer needs to know about a surface, measured on the numbers as written.

`METHODS` says in words how each figure is found; it travels with every certificate. `repaired` mends what can be mended
before the figures are taken, and says what it changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from manifold3d import Error, Manifold, Mesh64, OpType
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fewscan.deliver import distances, triangles
from fewscan.deliver.solids import mesh_of
from fewscan.deliver.surface import Cubes, Mesh, crossing_faces, shells, together
from fewscan.errors import ConfigError
from fewscan.space.volume import Labelmap

METHODS: Mapping[str, str] = {
    "as written": "places are rounded to 32 bits as in the files, and equal places are one vertex, as slicers read STL",
    "watertight": "every edge belongs to at least two faces",
    "manifold": "every edge belongs to exactly two faces, and the faces around each vertex are one fan",
    "oriented": "neighbouring faces agree on what is outside, and no shell is inside out unless it is a cavity",
    "crossing_faces": "faces that cross or overlap another face elsewhere than at shared corners, all pairs tested",
    "wall": "from the middle of a face straight inwards to the first face hit, if that faces it to within 60 degrees; "
    "smallest is what 0.1 % of the measured area falls below",
    "gap": "the same straight outwards, within one part",
    "deviation": "from vertices and middles of faces, at most 150,000 of a part, to the nearest face between voxels of "
    "the mask and others, before hollowing, cuts, struts and tag",
    "volume_error": "volume of the surface against that of the mask's voxels, before hollowing, cuts, struts and tag",
    "size": "of the box around the part, which may be turned by right angles to fit",
}
MOST_RAYS = 20_000  # faces of a part that walls and gaps are measured from
MOST_PLACES = 150_000  # of a part that deviation is measured at
SEEN_MM = 20.0  # beyond it a wall or a gap is not looked for
QUANTILE = 0.001  # of the measured area: what counts as smallest
AROUND = 6  # voxels around a surface in which its mask is looked for
SLIVERS_MM = (0.005, 0.01, 0.02, 0.05)  # how far a surface may be moved to lose slivers, tried in turn
MOST_VOLUME_ERROR = 0.01
MOST_DEVIATION = 0.5  # voxels


@dataclass(frozen=True, kw_only=True)
class Printer:
    """What a printer can do; the values are those of a common desktop printer for molten filament.

    Parameters
    ----------
    wall_mm : float
        Thinnest wall it prints.
    gap_mm : float
        Narrowest gap that stays open.
    build_mm : (3,) float
        Room to build in.
    density_g_ml : float
        Of the material; 1.24 is polylactic acid.
    thin_share : float
        Of a part's surface that may lie on walls too thin before the part is refused.

    Raises
    ------
    ConfigError
        If a value is impossible.
    """

    wall_mm: float = 0.8
    gap_mm: float = 0.3
    build_mm: tuple[float, float, float] = (250.0, 210.0, 210.0)
    density_g_ml: float = 1.24
    thin_share: float = 0.01

    def __post_init__(self) -> None:
        lengths = {"wall_mm": self.wall_mm, "gap_mm": self.gap_mm, "density_g_ml": self.density_g_ml}
        for name, value in (
            lengths | {f"build_mm, axis {i}": length for i, length in enumerate(self.build_mm)}
        ).items():
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be above 0, got {value}")
        if not 0 <= self.thin_share <= 1:
            raise ConfigError(f"thin_share must lie between 0 and 1, got {self.thin_share}")


def as_written(mesh: Mesh) -> Mesh:
    """The mesh as a slicer reads it from STL: 32 bits a number, equal places one vertex.

    Parameters
    ----------
    mesh : Mesh
        Any surface.
    """
    points = mesh.points.astype(np.float32).astype(np.float64)
    order, fresh = _sorted(points)
    number = np.empty(len(points), np.int32)
    number[order] = np.cumsum(fresh) - 1
    return Mesh(np.ascontiguousarray(points[order][fresh]), number[mesh.faces])


def _sorted(rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """An order in which equal rows are neighbours, and which of them differ from the one before."""
    order = np.lexsort(rows.T)
    return order, np.r_[True, (rows[order][1:] != rows[order][:-1]).any(1)]


def repaired(mesh: Mesh) -> tuple[Mesh, list[str]]:
    """The mesh without faces that are none, turned right side out, its overlaps united; and what was changed.

    Parameters
    ----------
    mesh : Mesh
        Any surface, as written.

    Examples
    --------
    >>> points = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    >>> inverted = Mesh(points, np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]], np.int32))
    >>> mended, changed = repaired(inverted)
    >>> changed, mended.volume_mm3 > 0
    (['1 shell was inside out and was turned'], True)
    """
    changed = []
    faces = mesh.faces
    real = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    kept = np.zeros(len(faces), bool)
    if len(faces):
        order, fresh = _sorted(np.sort(faces, 1))
        kept[order[fresh]] = real[order[fresh]]
    if not kept.all():
        changed.append(f"{int((~kept).sum())} faces without area or written twice were dropped")
        mesh = Mesh(mesh.points, np.ascontiguousarray(faces[kept]))
    pieces = shells(mesh) if len(mesh.faces) else []
    wrong = [i for i, piece in enumerate(pieces) if _inside_out(piece, pieces)]
    if wrong:
        for i in wrong:
            pieces[i] = Mesh(pieces[i].points, np.ascontiguousarray(pieces[i].faces[:, ::-1]))
        mesh = together(pieces)
        changed.append(
            f"{_count(len(wrong), 'shell')} {'was' if len(wrong) == 1 else 'were'} inside out and was turned"
        )
    if not crossing_faces(mesh).any():
        return mesh, changed
    if len(pieces) > 1 and (united := _united(pieces)) is not None:
        mesh = as_written(united)
        changed.append(f"{len(pieces)} shells that overlapped were united")
    if (smoother := _without_slivers(mesh)) is not None:
        mesh = smoother[0]
        changed.append(f"slivers that folded over were removed; the surface moved by at most {smoother[1]:g} mm")
    return mesh, changed


def _without_slivers(mesh: Mesh) -> tuple[Mesh, float] | None:
    """A mesh that crosses itself no more, and how far it moved for it; None where there is nothing to do or no way."""
    if not crossing_faces(mesh).any():
        return None
    for moved in SLIVERS_MM:
        body = Manifold(Mesh64(mesh.points, mesh.faces.astype(np.uint64)))
        if body.status() != Error.NoError:
            return None
        found = as_written(mesh_of(body, clean_mm=moved))
        if len(found.faces) and not crossing_faces(found).any():
            return found, moved
    return None


def _inside_out(shell: Mesh, others: Sequence[Mesh]) -> bool:
    """Whether a shell encloses a negative volume and lies in the box of no larger one, so that it is no cavity."""
    if shell.volume_mm3 >= 0:
        return False
    low, high = shell.points.min(0), shell.points.max(0)
    around = (
        other
        for other in others
        if other is not shell and other.volume_mm3 > 0 and (other.points.min(0) <= low).all()
        and (other.points.max(0) >= high).all()
    )  # fmt: skip
    return next(around, None) is None


def _united(pieces: Sequence[Mesh]) -> Mesh | None:
    bodies = [Manifold(Mesh64(piece.points, piece.faces.astype(np.uint64))) for piece in pieces]
    if any(body.status() != Error.NoError for body in bodies) or any(piece.volume_mm3 < 0 for piece in pieces):
        return None
    return mesh_of(Manifold.batch_boolean(bodies, OpType.Add))


@dataclass(frozen=True)
class Topology:
    """How the faces of a mesh hang together.

    Parameters
    ----------
    open_edges, crowded_edges : int
        Edges of one face, and of more than two.
    split_vertices : int
        Vertices at which more than one fan of faces meets.
    turned_edges : int
        Edges whose two faces disagree on what is outside.
    shells : int
        Connected surfaces.
    inverted : int
        Shells that are inside out and no cavities.
    """

    open_edges: int
    crowded_edges: int
    split_vertices: int
    turned_edges: int
    shells: int
    inverted: int


def topology(mesh: Mesh) -> Topology:
    """Count what makes a surface no boundary of a solid.

    Parameters
    ----------
    mesh : Mesh
        Any surface.
    """
    faces, n = mesh.faces.astype(np.int64), len(mesh.points)
    start, end = faces.ravel(), faces[:, [1, 2, 0]].ravel()
    key = np.minimum(start, end) * n + np.maximum(start, end)
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.r_[True, key[order][1:] != key[order][:-1]])
    times = np.diff(np.r_[first, len(key)])
    pairs = first[times == 2]
    one, two = order[pairs], order[pairs + 1]  # half-edges; half-edge h starts at corner h of the faces
    one_end, two_end = (h - h % 3 + (h + 1) % 3 for h in (one, two))  # the corner where each ends
    same = start[one] == end[two]  # they run against each other, as they must
    left = np.r_[one, one_end]
    right = np.r_[np.where(same, two_end, two), np.where(same, two, two_end)]
    fans, _ = connected_components(
        coo_array((np.ones(len(left), np.int8), (left, right)), shape=(len(start),) * 2), directed=False
    )
    pieces = shells(mesh)
    return Topology(
        open_edges=int((times == 1).sum()), crowded_edges=int((times > 2).sum()),
        split_vertices=int(fans - len(np.unique(start))), turned_edges=int((~same).sum()), shells=len(pieces),
        inverted=sum(_inside_out(piece, pieces) for piece in pieces),
    )  # fmt: skip


def walls(mesh: Mesh, *, limit_mm: float, outwards: bool = False) -> dict[str, float | None]:
    """Thickness behind the faces of a mesh, or the gap before them: smallest, and the share of area below a limit.

    Parameters
    ----------
    mesh : Mesh
        Closed surface.
    limit_mm : float
        What the share is of.
    outwards : bool
        Gaps instead of walls.
    """
    cubes, vectors = Cubes(mesh), mesh.area_vectors
    area = np.linalg.norm(vectors, axis=1)
    normals = vectors / np.where(area > 0, area, 1)[:, None]
    chosen = np.arange(0, len(area), max(1, math.ceil(len(area) / MOST_RAYS)))
    found = np.empty(len(chosen))
    args = cubes.low, cubes.size, cubes.shape, cubes.starts, cubes.lists
    triangles.rays(cubes.corners, normals, *args, chosen, 1.0 if outwards else -1.0, SEEN_MM, found)
    order = np.argsort(found)
    share = np.cumsum(area[chosen][order]) / area[chosen].sum()
    smallest = float(found[order][min(int(np.searchsorted(share, QUANTILE)), len(order) - 1)])
    return {
        "smallest_mm": round(smallest, 3) if math.isfinite(smallest) else None,
        "limit_mm": limit_mm,
        "share_below": round(float(area[chosen][found < limit_mm].sum() / area[chosen].sum()), 5),
    }


def deviation(mesh: Mesh, label: Labelmap, *, value: int) -> dict[str, float]:
    """How far a surface lies from the boundary of its label's voxels: mean, 95th percentile, largest; mm and voxels.

    Parameters
    ----------
    mesh : Mesh
        RAS+ mm.
    label : Labelmap
        What it was made from.
    value : int
        Of the label.

    Notes
    -----
    In voxels a distance is measured along voxel axes in units of the spacing: half a voxel along thick slices is half a
    slice.
    """
    places = np.concatenate([mesh.points, mesh.points[mesh.faces].mean(1)])
    places = places[:: max(1, math.ceil(len(places) / MOST_PLACES))]
    inverse = np.linalg.inv(label.geometry.affine)
    index = places @ inverse[:3, :3].T + inverse[:3, 3]
    low = np.clip(np.floor(index.min(0)).astype(int) - AROUND, 0, None)
    high = np.clip(np.ceil(index.max(0)).astype(int) + AROUND + 1, None, label.geometry.shape)
    x, y, z = (slice(a, b) for a, b in zip(low, high, strict=True))
    mask = np.pad(label.data[x, y, z] == value, 1)
    index -= low - 1
    found = []
    for matrix in (np.ascontiguousarray(label.geometry.affine[:3, :3]), np.eye(3)):
        distance = np.empty(len(index))
        distances.to_mask(mask, matrix, np.ascontiguousarray(index), distance, 0, len(index))
        found.append(distance)
    mm, voxels = found
    return {
        "mean_mm": round(float(mm.mean()), 4),
        "p95_mm": round(float(np.percentile(mm, 95)), 4),
        "largest_mm": round(float(mm.max()), 4),
        "largest_voxels": round(float(voxels.max()), 4),
    }


def figures(mesh: Mesh, printer: Printer) -> dict[str, Any]:
    """What can be measured on a part as written.

    Parameters
    ----------
    mesh : Mesh
        From `as_written`.
    printer : Printer
        Limits to measure against.
    """
    found, crossing = topology(mesh), int(crossing_faces(mesh).sum())
    size = mesh.points.max(0) - mesh.points.min(0)
    volume_ml = mesh.volume_mm3 / 1000
    return {
        "faces": len(mesh.faces),
        "watertight": found.open_edges == 0,
        "manifold": not (found.open_edges or found.crowded_edges or found.split_vertices),
        "oriented": not (found.turned_edges or found.inverted),
        "crossing_faces": crossing,
        "shells": found.shells,
        "wall": walls(mesh, limit_mm=printer.wall_mm),
        "gap": walls(mesh, limit_mm=printer.gap_mm, outwards=True),
        "size_mm": [round(float(length), 2) for length in size],
        "fits": bool((np.sort(size) <= np.sort(printer.build_mm)).all()),
        "volume_ml": round(volume_ml, 4),
        "material_g": round(volume_ml * printer.density_g_ml, 2),
    }


def judged(part: Mapping[str, Any], printer: Printer) -> tuple[list[str], list[str]]:
    """Why a part must not be printed, and what to know where it may be.

    Parameters
    ----------
    part : mapping
        From `figures`, with ``deviation`` and ``volume_error`` where there is a mask.
    printer : Printer
        Limits.
    """
    faults: list[str] = []
    remarks: list[str] = []
    for key, said in (
        ("watertight", "has open edges"),
        ("manifold", "has edges or vertices where more than two faces or one fan meet"),
        ("oriented", "is inside out in places"),
    ):
        if not part[key]:
            faults.append(f"the surface {said}")
    if part["crossing_faces"]:
        faults.append(f"{_count(part['crossing_faces'], 'face')} cross or overlap others; smooth less with --smooth-mm")
    wall, gap = part["wall"], part["gap"]
    if wall["share_below"] > QUANTILE:
        said = f"{wall['share_below']:.1%} of the surface lies on walls thinner than {wall['limit_mm']:g} mm"
        worse = wall["share_below"] > printer.thin_share
        (faults if worse else remarks).append(f"{said}; print it larger, or set --wall-mm to what the printer can do")
    if gap["share_below"] > QUANTILE:
        remarks.append(
            f"{gap['share_below']:.1%} of the surface faces gaps below {gap['limit_mm']:g} mm: they may fuse"
        )
    if not part["fits"]:
        size, build = (" x ".join(f"{v:.0f}" for v in lengths) for lengths in (part["size_mm"], printer.build_mm))
        faults.append(f"{size} mm do not fit into {build} mm; cut it with --cut or set --build-mm")
    if part["shells"] > 1:
        remarks.append(f"{part['shells']} separate shells (cavities count); --strut-mm joins loose pieces")
    if abs(part.get("volume_error") or 0.0) > MOST_VOLUME_ERROR:
        faults.append(f"the volume is off by {part['volume_error']:.1%}, {MOST_VOLUME_ERROR:.0%} is allowed")
    far = part.get("deviation", {}).get("largest_voxels", 0.0)
    if far > MOST_DEVIATION:
        faults.append(f"the surface lies up to {far:.2f} voxels from the mask, {MOST_DEVIATION} are allowed")
    return faults, remarks


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
