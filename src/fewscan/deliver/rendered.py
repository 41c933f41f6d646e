"""Pictures of surfaces: parallel projection from the front, the left and above, lit from the viewer's side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewscan.data.io import atomic
from fewscan.deliver import triangles
from fewscan.deliver.surface import Mesh

VIEWS = {
    "front": ((-1.0, 0.0, 0.0), (0.0, 0.0, 1.0)),
    "left": ((0.0, -1.0, 0.0), (0.0, 0.0, 1.0)),
    "above": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
}
"""What points right and what points up in each picture, RAS."""
SIDE, FINER = 420, 2  # pixels of a picture's side, and of each pixel's own side before averaging
MARGIN = 0.04  # of the side left free
INSIDE = (255, 0, 255)  # where the inside of a surface is seen, which a closed one never shows
Colour = tuple[int, int, int]


def picture(meshes: Sequence[Mesh], view: str, *, colours: Sequence[Colour]) -> NDArray[np.uint8]:
    """(H, W, 4): the surfaces seen from one side, on a transparent ground.

    Parameters
    ----------
    meshes : sequence of Mesh
        RAS+ mm.
    view : {"front", "left", "above"}
        Where from.
    colours : sequence of (int, int, int)
        One for each.
    """
    right, up = (np.array(axis) for axis in VIEWS[view])
    toward = np.cross(right, up)
    frame = np.stack([right, -up, toward])  # right, down, near
    low, high = np.min([m.points.min(0) for m in meshes], 0), np.max([m.points.max(0) for m in meshes], 0)
    side = SIDE * FINER
    scale = side * (1 - 2 * MARGIN) / max(float((high - low).max()), 1e-9)
    image, depth = np.zeros((side, side, 4), np.uint8), np.full((side, side), -np.inf)
    for mesh, colour in zip(meshes, colours, strict=True):
        places = (mesh.points - (low + high) / 2) @ frame.T * scale
        places[:, :2] += side / 2
        faced = mesh.area_vectors @ toward > 0
        shown = np.where(faced[:, None], colour, INSIDE).astype(np.float64)
        light = mesh.normals @ toward
        light = np.where(faced[:, None], light[mesh.faces], 0.6)
        triangles.draw(places[mesh.faces], light, shown, depth, image[..., :3])
    image[..., 3] = np.where(np.isfinite(depth), 255, 0)
    rows, margin = np.flatnonzero(image[..., 3].any(1)), round(side * MARGIN / FINER) * FINER
    if len(rows):  # sides stay, so that all views are of one scale
        top = max(0, rows[0] // FINER * FINER - margin)
        image = image[top : top + (rows[-1] - top) // FINER * FINER + FINER + margin]
    return np.asarray(Image.fromarray(image, "RGBA").reduce(FINER))


def write_picture(pixels: NDArray[np.uint8], path: Path) -> None:
    """Write a picture as a PNG file of few colours, whole or not at all.

    Parameters
    ----------
    pixels : (H, W, 4) uint8
        From `picture`.
    path : Path
        File to write.
    """
    content = io.BytesIO()
    Image.fromarray(pixels, "RGBA").quantize(128).save(content, "PNG", optimize=True)
    with atomic(path) as part:
        part.write_bytes(content.getvalue())
