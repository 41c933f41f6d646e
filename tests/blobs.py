"""An image that is known everywhere in the world: soft blobs in an elliptic head, to be put on any grid."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fewscan.space.geometry import Array, Geometry


def grid(shape: tuple[int, int, int], spacing: tuple[float, float, float], *, tilt: float = 0.0) -> Geometry:
    """A grid centred on the world's origin, turned about the first axis by ``tilt`` radians."""
    c, s = np.cos(tilt), np.sin(tilt)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.diag(spacing)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Geometry(shape, affine)


def world(geometry: Geometry) -> Array:
    """Place of each voxel, RAS+ mm, (3, X, Y, Z)."""
    index = np.indices(geometry.shape).reshape(3, -1)
    places: Array = geometry.affine[:3, :3] @ index + geometry.affine[:3, 3:]
    return places.reshape(3, *geometry.shape)


def blobs(places: Array, *, seed: int = 0, extent: float = 24.0, texture: int = 0) -> Array:
    """Intensity at places (3, ...) in mm; the head has a radius of about two thirds of the extent.

    ``texture`` more and smaller blobs make it fine enough for measures that look at small windows.
    """
    rng = np.random.default_rng(seed)
    x, y, z = places / extent
    image = 1 / (1 + np.exp(12 * (np.sqrt((x / 0.6) ** 2 + (y / 0.75) ** 2 + (z / 0.65) ** 2) - 1)))
    for index in range(14 + texture):
        large = index < 14
        a, b, c = rng.uniform(-1, 1, 3) * (0.4 if large else 0.55)
        width, height = (
            rng.uniform(0.08, 0.18) if large else 0.08,
            rng.choice([-0.8, 0.8, 1.2] if large else [-0.5, 0.5]),
        )
        image = image + height * np.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / (2 * width**2))
    return np.asarray(image)


def unit(image: Array) -> Tensor:
    """(1, X, Y, Z) with mean 0 and deviation 1."""
    return torch.from_numpy(((image - image.mean()) / image.std())[None].astype(np.float32))
