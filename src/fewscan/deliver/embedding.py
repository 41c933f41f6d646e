"""What a viewer gets of a scene: thinned to fit into a page, and packed as files that say nothing of a patient.

NIfTI for what lies on a grid (fresh header: type, shape, place), TCK for lines, MZ3 for surfaces; each gzipped.
"""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from fewscan.data.formats import put_nifti
from fewscan.deliver import solids
from fewscan.deliver.mesh_files import Item, painted
from fewscan.deliver.scenes import Content, Layer
from fewscan.deliver.structures import colour
from fewscan.deliver.surface import Mesh
from fewscan.errors import FewscanError
from fewscan.space.field import from_matrix, warp_labels
from fewscan.space.geometry import Geometry, with_at_most
from fewscan.space.volume import bounding_box, resample

CT_WINDOWS = {"soft tissue": (-160.0, 240.0), "lung": (-1350.0, 150.0), "bone": (-500.0, 1500.0)}
"""Hounsfield units from black to white."""
SHARES = {"usual": (0.5, 99.5), "dark tissue": (0.5, 80.0), "bright tissue": (40.0, 99.9), "everything": (0.0, 100.0)}
"""Percentiles of voxels above the lowest value, from black to white, where intensities have no unit."""
HU_LOW, HU_HIGH, HU_STEP = -1024, 3071, 4
EXTREMES = (0.1, 99.9)  # percentiles, beyond which 256 grey levels do not reach
TYPES = (np.uint8, np.int16, np.uint16, np.float32)  # that go into a page as they are
MARGIN_MM = 30.0  # around the labels, where a scan is cropped to them


@dataclass(frozen=True)
class Limits:
    """How much of a scene goes into a page.

    Parameters
    ----------
    voxels : int
        Of each layer, at most about.
    faces : int
        Triangles of all surfaces together, at most about.
    """

    voxels: int = 2_500_000
    faces: int = 150_000


@dataclass(frozen=True, eq=False)
class Packed:
    """A layer as the viewer reads it.

    Parameters
    ----------
    about : mapping
        What the page must know of it, for JSON.
    content : bytes
        A gzipped file.
    """

    about: Mapping[str, Any]
    content: bytes


def thinned(content: Content, limits: Limits) -> tuple[Content, list[str]]:
    """The scene within limits, and what was done to it in sentences; intensities in steps that a screen can show.

    Parameters
    ----------
    content : Content
        As read.
    limits : Limits
        Of the page.
    """
    remarks = []
    if content.geometry is not None:
        whole = content.geometry
        content = _cropped(content, limits.voxels)
        coarse = with_at_most(content.geometry or whole, limits.voxels)
        if content.geometry is not None and coarse.shape != content.geometry.shape:
            layers = [replace(layer, data=_coarser(layer, content.geometry, coarse)) for layer in content.layers]
            content = replace(content, geometry=coarse, layers=layers)
        if coarse.shape != whole.shape:
            remarks.append(f"{_grid(coarse)} instead of {_grid(whole)}")
        content = replace(content, layers=[_levels(layer) for layer in content.layers])
        scans = [layer for layer in content.layers if layer.kind == "scan"]
        if scans:
            remarks.append(f"steps of {HU_STEP} HU" if scans[0].ct else "256 grey levels")
    faces = sum(len(item.mesh.faces) for item in content.items)
    if faces > limits.faces:
        try:
            meshes, moved = solids.simplified([item.mesh for item in content.items], faces=limits.faces)
        except FewscanError:
            return content, remarks  # not closed: shown whole
        items = [_moved(item, mesh) for item, mesh in zip(content.items, meshes, strict=True)]
        content = replace(content, items=items)
        left = sum(len(mesh.faces) for mesh in meshes)
        remarks.append(f"{left} triangles instead of {faces}, surfaces moved by at most {moved:.2g} mm")
    return content, remarks


def packed(content: Content, *, level: int = 6) -> list[Packed]:
    """Every layer as a gzipped file with what the viewer must know of it.

    Parameters
    ----------
    content : Content
        Thinned, or as read.
    level : int
        Of compression, 1 to 9.
    """
    files = []
    values = sorted(content.names)
    place = {value: i + 1 for i, value in enumerate(values)}
    for layer in content.layers:
        about: dict[str, Any] = {
            "name": layer.name, "kind": layer.kind, "state": layer.state, "shown": layer.shown
        }  # fmt: skip
        assert content.geometry is not None
        data = layer.data
        if layer.kind == "scan":
            data = data if data.dtype in TYPES else data.astype(np.float32)
            about["windows"] = windows(layer)
        elif layer.kind == "labels":
            table = np.zeros(int(max(values, default=0)) + 1, np.uint8 if len(values) < 256 else np.uint16)
            table[values] = list(place.values())
            data = table[layer.data]
            about["labels"] = [{"name": content.names[v], "colour": colour(i)} for i, v in enumerate(values)]
        stream = io.BytesIO()
        put_nifti(data, stream, native=content.geometry, scale=layer.scale)
        files.append(Packed(about, gzip.compress(stream.getvalue(), level, mtime=0)))
    if content.lines:
        about = {"name": "deformed grid", "kind": "lines", "state": "", "shown": False, "step": content.step_mm}
        files.append(Packed(about, gzip.compress(_tck(content.lines), level, mtime=0)))
    for item in content.items:
        shade = item.colour if item.confidence is None else None  # the vertices have colours of their own
        about = {"name": item.name, "kind": "surface", "state": "", "shown": True, "colour": shade}
        files.append(Packed(about, gzip.compress(_mz3(item), level, mtime=0)))
    return files


def windows(scan: Layer) -> list[dict[str, Any]]:
    """Ways to show intensities: name, black and white of each; in Hounsfield units for CT, else by percentiles.

    Parameters
    ----------
    scan : Layer
        Of the kind "scan".

    Examples
    --------
    >>> air_to_bone = np.arange(-1000, 1000).reshape(10, 10, 20)
    >>> windows(Layer(name="scan", kind="scan", data=air_to_bone, ct=True))[0]
    {'name': 'soft tissue', 'low': -160.0, 'high': 240.0}
    """
    pairs = dict(CT_WINDOWS)
    if not scan.ct:
        sample = scan.data.ravel(order="K")[:: max(1, scan.data.size // 500_000)].astype(np.float64)
        tissue = sample[sample > sample.min()] if sample.min() < sample.max() else sample
        for name, shares in SHARES.items():
            low, high = (scan.scale[0] * v + scan.scale[1] for v in np.percentile(tissue, shares).tolist())
            pairs[name] = (low, max(high, low + 1e-6))
        pairs = {name: pairs[name] for name in SHARES}
    return [{"name": name, "low": low, "high": high} for name, (low, high) in pairs.items()]


# -------------------------------------------------------------------------------------------------------------- thinner


def _grid(geometry: Geometry) -> str:
    shape, spacing = (" x ".join(f"{n:.3g}" for n in row) for row in (geometry.shape, geometry.spacing))
    return f"{shape} voxels of {spacing} mm"


def _cropped(content: Content, voxels: int) -> Content:
    """To the labels and what is around them, where the whole would have to be coarsened."""
    geometry = content.geometry
    masks = [layer.data > 0 for layer in content.layers if layer.kind == "labels"]
    if geometry is None or not masks or np.prod(geometry.shape) <= voxels:
        return content
    inside = bounding_box(np.logical_or.reduce(masks))
    margins = [int(np.ceil(MARGIN_MM / mm)) for mm in geometry.spacing]
    box = tuple(
        slice(max(0, s.start - m), min(n, s.stop + m)) for s, m, n in zip(inside, margins, geometry.shape, strict=True)
    )
    affine = geometry.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [s.start for s in box]
    x, y, z = (s.stop - s.start for s in box)
    layers = [replace(layer, data=layer.data[box]) for layer in content.layers]
    return replace(content, geometry=Geometry((x, y, z), affine), layers=layers)


def _coarser(layer: Layer, geometry: Geometry, coarse: Geometry) -> NDArray[Any]:
    if layer.kind == "labels":
        return warp_labels(layer.data, geometry, field=from_matrix(np.eye(4), coarse))
    data = torch.from_numpy(np.ascontiguousarray(layer.data, dtype=np.float32))[None]
    found = resample(data, coarse.shape)[0].numpy()
    whole = np.issubdtype(layer.data.dtype, np.integer)
    return np.rint(found).astype(layer.data.dtype) if whole else found


def _levels(layer: Layer) -> Layer:
    """Intensities in 256 steps, those of CT in steps of 4 Hounsfield units."""
    if layer.kind != "scan":
        return layer
    data = layer.data.astype(np.float32)
    if layer.ct:
        kept = np.clip(np.rint(data / HU_STEP) * HU_STEP, HU_LOW, HU_HIGH).astype(np.int16)
        return replace(layer, data=kept)
    low, high = (float(v) for v in np.percentile(data, EXTREMES))
    step = max(high - low, 1e-6) / 255
    return replace(layer, data=np.clip(np.rint((data - low) / step), 0, 255).astype(np.uint8), scale=(step, low))


# --------------------------------------------------------------------------------------------------------------- files


def _tck(lines: Sequence[NDArray[np.float32]]) -> bytes:
    """Streamlines as MRtrix keeps them: a header in words, points in mm, lines parted by NaN, infinity at the end."""
    offset = 128
    head = f"mrtrix tracks\ndatatype: Float32LE\ncount: {len(lines)}\nfile: . {offset}\nEND\n".encode().ljust(offset)
    gap = np.full((1, 3), np.nan, "<f4")
    points = np.concatenate([part for line in lines for part in (line.astype("<f4"), gap)])
    return head + points.tobytes() + np.full(3, np.inf, "<f4").tobytes()


def _moved(item: Item, mesh: Mesh) -> Item:
    """The part with other triangles, each vertex as sure as the nearest one was."""
    if item.confidence is None:
        return replace(item, mesh=mesh)
    nearest = cKDTree(item.mesh.points).query(mesh.points)[1]
    return replace(item, mesh=mesh, confidence=item.confidence[nearest])


def _mz3(item: Item) -> bytes:
    """Triangles in the format of Surf Ice: counts, corners, places in mm, and colours where there is confidence."""
    mesh = item.mesh
    shades = b""
    if item.confidence is not None:
        shown = np.full((len(mesh.points), 4), 255, np.uint8)
        shown[:, :3] = np.rint(painted(item.confidence))
        shades = shown.tobytes()
    head = struct.pack("<HHIII", 0x5A4D, 7 if shades else 3, len(mesh.faces), len(mesh.points), 0)
    return head + mesh.faces.astype("<u4").tobytes() + mesh.points.astype("<f4").tobytes() + shades
