"""The registration network: two images on one grid to a diffeomorphic displacement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewscan.learn import networks
from fewscan.learn.plan import shape_network
from fewscan.space import field
from fewscan.space.geometry import Shape
from fewscan.space.volume import resample

SPEED = 8.0  # largest velocity the last layer is scaled for, voxels: the network starts from nearly nothing
COARSE = 2  # the velocity lives on a grid this much coarser than the images


class Registrar(nn.Module):
    """A U-Net that answers with a stationary velocity, and its flow.

    Parameters
    ----------
    network : nn.Module
        (B, 2 C, X, Y, Z) to (B, 3, X / 2, Y / 2, Z / 2).
    shape : (X, Y, Z) int
        Grid on which it was trained; other images are brought there edge to edge.
    spec : mapping
        What `build_registrar` made it from, for the model folder.
    """

    def __init__(self, network: nn.Module, shape: Shape, *, spec: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.shape, self.spec = network, shape, spec

    def velocity(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Stationary velocity on the coarse grid, in its voxels.

        Parameters
        ----------
        moving, fixed : (B, C, X, Y, Z) float
            On the registrar's grid.
        """
        answer: Tensor = self.network(torch.cat([moving, fixed], 1))
        return answer.float() * SPEED

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Displacement (B, 3, X, Y, Z) in voxels of the registrar's grid that makes ``moving`` look like ``fixed``."""
        return field.resize(field.integrate(self.velocity(moving, fixed)), self.shape)


def build_registrar(*, channels: int, shape: Sequence[int], widths: Sequence[int], seed: int) -> Registrar:
    """A registrar with weights drawn from the seed; its last layer starts near zero, so that it starts at the identity.

    Parameters
    ----------
    channels : int
        Of one image.
    shape : (X, Y, Z) int
        Grid, multiples of what `registration_grid` says.
    widths : sequence of int
        Filters per level.
    seed : int
        Of the initial weights.
    """
    grid: Shape = (int(shape[0]), int(shape[1]), int(shape[2]))
    spec = {"channels": channels, "shape": list(grid), "widths": list(widths)}
    strides = _strides(grid, len(widths))
    network = networks.build(
        "unet", 2 * channels, classes=3, widths=tuple(widths[: len(strides)]), kernels=[(3, 3, 3)] * len(strides),
        strides=strides, finest=2, seed=seed,
    )  # fmt: skip
    head = network.head
    assert isinstance(head, nn.Conv3d)
    assert head.bias is not None
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.weight.mul_(1e-3)
    return Registrar(network, grid, spec=spec)


def _strides(shape: Shape, levels: int) -> list[tuple[int, int, int]]:
    """First a stride of two along every axis but single slices, then whatever keeps four voxels."""
    size = np.array(shape)
    strides = []
    for level in range(levels):
        step = np.where((size % 2 == 0) & (size / 2 >= (1 if level == 0 else 4)), 2, 1)
        if level > 0 and (step == 1).all():
            break
        size = size // step
        strides.append((int(step[0]), int(step[1]), int(step[2])))
    return strides


def registration_grid(extent: Sequence[float], spacing: Sequence[float], *, voxels: int, levels: int) -> Shape:
    """Grid for whole scans: the median scan's extent at the plan's spacing, coarser where it would be too large.

    Parameters
    ----------
    extent : (3,) float
        Median scan size, voxels of the plan.
    spacing : (3,) float
        Of the plan, mm.
    voxels : int
        Most voxels.
    levels : int
        Levels of the network; each axis becomes a multiple of what they halve.

    Examples
    --------
    >>> registration_grid((37, 54, 39), (1, 1, 1), voxels=250_000, levels=4)
    (40, 56, 40)
    """
    size = np.array(extent, dtype=float)
    mm = np.array(spacing, dtype=float)
    while np.prod(size) > voxels:  # the finest axes first, towards voxels that are cubic
        finest = (size > 1) & (mm <= mm[size > 1].min() * 1.001)
        size, mm = np.where(finest, size / 1.01, size), np.where(finest, mm * 1.01, mm)
    _, _, strides = shape_network(size, mm, voxels=1 << 40, levels=levels)
    factor = np.maximum(np.prod(np.array(strides), axis=0), np.where(size >= 4, 2, 1))
    x, y, z = (int(max(1, -(-n // f)) * f) for n, f in zip(np.round(size), factor, strict=True))
    return x, y, z


def register_images(registrar: Registrar, fixed: Tensor, *, moving: Tensor) -> Tensor:
    """Displacement (1, 3, X, Y, Z) between two images on any common grid, in its voxels.

    Parameters
    ----------
    registrar : Registrar
        In the mode it is in.
    fixed, moving : (C, X, Y, Z) float
        Normalised.
    """
    device = next(registrar.parameters()).device
    pair = [resample(image, registrar.shape)[None].to(device) for image in (moving, fixed)]
    with torch.no_grad():
        u = registrar(*pair)
    return field.resize(u.cpu(), (fixed.shape[1], fixed.shape[2], fixed.shape[3]))
