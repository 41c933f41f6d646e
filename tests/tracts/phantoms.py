"""Fibres that cross: two curved bands and a straight one in a ball of grey matter, with diffusion signals."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fewscan.space.geometry import Geometry
from fewscan.tracts.anatomy import Anatomy
from fewscan.tracts.gradients import Gradients, spread_directions

SHAPE = (28, 32, 26)


def grid(matrix: NDArray[np.float64] | None = None) -> Geometry:
    """A grid of 3 mm about the origin; ``matrix`` turns or flips its axes."""
    affine = np.eye(4)
    affine[:3, :3] = 3.0 * (np.eye(3) if matrix is None else matrix)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return Geometry(SHAPE, affine)


def fibres(geometry: Geometry) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Fractions (X, Y, Z, 3), directions (X, Y, Z, 3, 3) in the world and the mask of the brain.

    Three bands of different planes and radii, so that no exchange of axes leaves them as they are.
    """
    index = np.indices(geometry.shape).reshape(3, -1)
    x, y, z = (geometry.affine[:3, :3] @ index + geometry.affine[:3, 3:]).reshape(3, *geometry.shape)
    brain = x**2 / 38**2 + y**2 / 43**2 + z**2 / 36**2 < 1
    fractions, directions = np.zeros((*geometry.shape, 3), np.float32), np.zeros((*geometry.shape, 3, 3), np.float32)
    arch = np.hypot(x, z + 22)  # an arch of left-right fibres, as the corpus callosum
    bands = [
        ((np.abs(arch - 30) < 6) & (np.abs(y - 4) < 18), np.stack([z + 22, np.zeros_like(x), -x], -1)),
        ((np.abs(np.hypot(y - 30, z - 8) - 34) < 6) & (np.abs(np.abs(x) - 18) < 7),
         np.stack([np.zeros_like(x), z - 8, 30 - y], -1)),
        ((np.hypot(x + 0.35 * y, z + 12) < 9), np.broadcast_to(np.array([-0.35, 1.0, 0.0]), (*geometry.shape, 3))),
    ]  # fmt: skip
    for n, (inside, along) in enumerate(bands):
        unit = along / np.maximum(np.linalg.norm(along, axis=-1, keepdims=True), 1e-9)
        fractions[..., n] = np.where(inside & brain, 0.6, 0)
        directions[..., n, :] = np.where(inside[..., None], unit, 0)
    total = fractions.sum(-1, keepdims=True)
    return np.where(total > 0.7, fractions * 0.7 / np.maximum(total, 1e-9), fractions), directions, brain


def table(count: int = 30, b: float = 1000.0) -> Gradients:
    """One unweighted volume, then a shell."""
    bvals = np.array([0.0, *[b] * count])
    return Gradients(bvals, np.concatenate([np.zeros((1, 3)), spread_directions(count)]))


def scan(
    geometry: Geometry, gradients: Gradients, *, snr: float = 40.0, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Diffusion scan (V, X, Y, Z) of the crossing fibres, ball and sticks with Rician noise, and the brain."""
    fractions, directions, brain = fibres(geometry)
    d, rng = 1.4e-3, np.random.default_rng(seed)
    volumes = []
    for b, g in zip(gradients.bvals, gradients.directions, strict=True):
        along = (directions @ g.astype(np.float32)) ** 2
        signal = (1 - fractions.sum(-1)) * np.exp(-b * d) + (fractions * np.exp(-b * d * along)).sum(-1)
        noise = rng.normal(0, 1 / snr, (2, *geometry.shape))
        volumes.append(1000 * np.hypot(signal + noise[0], noise[1]) * brain)
    return np.stack(volumes).astype(np.float32), brain


def brain() -> Anatomy:
    """The crossing fibres as a brain to make people from, its bands as bundles: one on each side, one in the middle."""
    geometry = grid()
    fractions, directions, mask = fibres(geometry)
    x = (np.arange(SHAPE[0]) - (SHAPE[0] - 1) / 2)[:, None, None]
    bands = np.moveaxis(fractions > 0, -1, 0)
    return Anatomy(
        geometry=geometry, mask=mask, s0=1000.0 * mask.astype(np.float32), d=1.4e-3 * mask.astype(np.float32),
        f=np.moveaxis(fractions, -1, 0).copy(), v=directions.reshape(*SHAPE, 9).transpose(3, 0, 1, 2).copy(),
        bundles={"CC": bands[0], "AF_left": bands[1] & (x < 0), "AF_right": bands[1] & (x > 0)},
    )  # fmt: skip
