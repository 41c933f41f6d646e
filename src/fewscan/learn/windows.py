"""Windows of a prediction: how large, where, and what each voxel of one counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fewscan.space.geometry import Shape

STRETCH = 1.25  # a scan this much larger than the patch is still one window


class Windowed(Protocol):
    """What has a patch and strides, as a plan has."""

    @property
    def patch(self) -> Shape:
        """Window, voxels."""

    @property
    def strides(self) -> Sequence[Sequence[int]]:
        """Stride of each level."""


def window_shape(grid: Shape, plan: Windowed) -> Shape:
    """Prediction window: the patch, or the whole scan where it is hardly larger.

    Parameters
    ----------
    grid : (X, Y, Z) int
        Scan on the plan's grid.
    plan : Plan or the like
        Patch and strides.
    """
    factor = np.prod(np.array(plan.strides), axis=0)
    sizes = []
    for n, p, f in zip(grid, plan.patch, factor, strict=True):
        # two voxels at the bottom at least along each axis that has them: one alone cannot be normalised
        sizes.append(max(int(-(-n // f) * f), min(p, 2 * int(f))) if n <= STRETCH * p else p)
    return sizes[0], sizes[1], sizes[2]


def starts(length: int, window: int) -> list[int]:
    """First voxels of windows that cover a line, overlapping by at least half.

    Parameters
    ----------
    length, window : int
        Voxels.

    Examples
    --------
    >>> starts(10, 4), starts(3, 4)
    ([0, 2, 4, 6], [0])
    """
    if length <= window:
        return [0]
    count = math.ceil((length - window) / max(1, window // 2)) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def bell(shape: Shape) -> Tensor:
    """Gaussian weight of each voxel of a window, so that its middle counts most.

    Parameters
    ----------
    shape : (X, Y, Z) int
        Window.
    """
    axes = [torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 6)) ** 2) for n in shape]
    return (axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None, :]).clamp(min=1e-3)
