"""Deformable registration by optimisation: a diffeomorphism grown step by step, coarse to fine.

Each step takes the gradient of the similarity, smooths it, scales it per voxel with the moments of Adam and composes
the small displacement with what is there (Avants et al. 2008, doi 10.1016/j.media.2007.06.004; the adaptive step
follows Jena et al. 2024, arXiv 2404.01249). Ours: moments of the vector's length instead of its components, so that
steps do not favour the axes; a floor under them, so that flat background stays where it is; label terms beside the
image term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewscan.errors import ConfigError
from fewscan.space import field, kernels
from fewscan.space.geometry import Shape
from fewscan.space.similarity import SIMILARITIES, counted, features
from fewscan.space.volume import resample

SMALLEST_AXIS = 12  # voxels; an axis is not shrunk below
PLATEAU = 10  # steps without progress after which a level ends

Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class DeformConfig:
    """How to deform.

    Parameters
    ----------
    similarity : str
        Key of `similarity.SIMILARITIES`.
    shrink : tuple of int
        Factor of each level, coarsest first.
    steps : tuple of int
        Most steps of each level.
    step_voxels : float
        Length of the longest step, voxels of the level.
    smooth_gradient : float
        Standard deviation of the Gaussian on each gradient, voxels of the level: how fluid it is.
    smooth_field : float
        The same on the displacement after each step: how elastic it is.
    floor : float
        Share of the root mean square gradient that is added to the moments.
    anatomy : float
        Weight of the label term against the image term.

    Raises
    ------
    ConfigError
        If levels and steps do not pair, or a value makes no sense.
    """

    similarity: str = "lncc"
    shrink: tuple[int, ...] = (4, 2, 1)
    steps: tuple[int, ...] = (100, 60, 8)
    step_voxels: float = 0.5
    smooth_gradient: float = 1.0
    smooth_field: float = 0.7
    floor: float = 0.5
    anatomy: float = 1.0

    def __post_init__(self) -> None:
        if len(self.shrink) != len(self.steps) or not self.shrink:
            raise ConfigError(f"as many steps as levels are needed, got {self.steps} for {self.shrink}")
        if min(self.shrink) < 1 or min(self.steps) < 0:
            raise ConfigError(f"levels must be at least 1 and steps at least 0, got {self.shrink} and {self.steps}")
        if not 0 < self.step_voxels <= 2:
            raise ConfigError(f"step_voxels must lie above 0 and at most at 2, got {self.step_voxels:g}")
        if min(self.smooth_gradient, self.smooth_field, self.floor, self.anatomy) < 0:
            raise ConfigError("smoothing, floor and anatomy must not be negative")
        if self.similarity not in SIMILARITIES:
            known = ", ".join(sorted(SIMILARITIES))
            raise ConfigError(f"unknown similarity {self.similarity!r}; known are {known}")


def level_shape(shape: Sequence[int], factor: int) -> Shape:
    """Grid of a level: each axis shrunk, but not below `SMALLEST_AXIS` voxels.

    Parameters
    ----------
    shape : (3,) int
        Full grid.
    factor : int
        Of the level.

    Examples
    --------
    >>> level_shape((160, 192, 20), 4)
    (40, 48, 12)
    """
    x, y, z = (max(round(n / factor), min(n, SMALLEST_AXIS)) for n in shape)
    return x, y, z


def deform(
    fixed: Tensor,
    moving: Tensor,
    *,
    config: DeformConfig,
    start: Tensor | None = None,
    weight: Tensor | None = None,
    masks: tuple[Tensor, Tensor] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Displacement (B, 3, X, Y, Z) that makes ``moving`` look like ``fixed``.

    Parameters
    ----------
    fixed, moving : (B, C, X, Y, Z) float
        Images on one grid, with a standard deviation near 1.
    config : DeformConfig
        Levels and strengths.
    start : (B, 3, X, Y, Z) float, optional
        Displacement to start from; zero when None.
    weight : (B, 1, X, Y, Z) float, optional
        On the fixed grid: where likeness counts.
    masks : pair of (B, K, X, Y, Z) float, optional
        Soft label maps of the fixed and the moving image, whose overlap counts too (the anatomy term of Xu &
        Niethammer 2019, arXiv 1904.08465, eq. 2).
    progress : callable, optional
        Gets the share that is done.
    """
    kernels.log_path(str(fixed.device))
    whole: Shape = (fixed.shape[2], fixed.shape[3], fixed.shape[4])
    u = torch.zeros(len(fixed), 3, *whole, device=fixed.device) if start is None else start
    work = [n * s for n, s in zip(config.steps, [f**-3 for f in config.shrink], strict=True)]
    for i, (factor, steps) in enumerate(zip(config.shrink, config.steps, strict=True)):
        if not steps:  # a start that is not optimised keeps its resolution
            continue
        shape = level_shape(whole, factor)

        def at_level(image: Tensor, shape: Shape = shape) -> Tensor:
            return torch.stack([resample(one, shape) for one in image])

        def tick(share: float, i: int = i) -> None:
            if progress is not None:
                progress((sum(work[:i]) + share * work[i]) / max(sum(work), 1e-9))

        pair = features(config.similarity, at_level(fixed)), features(config.similarity, at_level(moving))
        labels = None if masks is None else (at_level(masks[0]), at_level(masks[1]))
        looked = counted(config.similarity, None if weight is None else at_level(weight))
        u = _level(pair, labels, field.resize(u, shape), config=config, steps=steps, weight=looked, tick=tick)
    return field.resize(u, whole)


def _level(
    pair: tuple[Tensor, Tensor],
    labels: tuple[Tensor, Tensor] | None,
    u: Tensor,
    *,
    config: DeformConfig,
    steps: int,
    weight: Tensor | None,
    tick: Progress,
) -> Tensor:
    """Steps on one grid."""
    measure = SIMILARITIES[config.similarity]
    moments = torch.zeros_like(u).contiguous(), torch.zeros_like(u[:, :1]).contiguous()
    best, since = -float("inf"), 0
    for step in range(1, steps + 1):
        u = u.detach().requires_grad_(True)
        gain = measure(pair[0], kernels.sample(pair[1], u), weight=weight)
        if labels is not None and config.anatomy > 0:
            gain = gain + config.anatomy * overlap(labels[0], kernels.sample(labels[1], u))
        (grad,) = torch.autograd.grad(gain, u)
        with torch.no_grad():
            grad = kernels.gaussian(grad, config.smooth_gradient)
            delta = kernels.adaptive_step(grad, moments, step=step, floor=config.floor, longest=config.step_voxels)
            u = kernels.gaussian(field.compose(u.detach(), delta), config.smooth_field)
        value = float(gain.detach())
        since = 0 if value > best + 1e-4 * abs(best) else since + 1
        best = max(best, value)
        tick(step / steps)
        if since >= PLATEAU:
            break
    return u.detach()


def overlap(fixed: Tensor, warped: Tensor) -> Tensor:
    """Mean soft Dice of the channels that occur in either map, each sample counting alike.

    Parameters
    ----------
    fixed, warped : (B, K, X, Y, Z) float
        Soft label maps.
    """
    axes = (2, 3, 4)
    both, each = (fixed * warped).sum(axes), fixed.sum(axes) + warped.sum(axes)
    there = (each > 1e-3).float()
    found = (2 * both / each.clamp(min=1e-3) * there).sum(1) / there.sum(1).clamp(min=1)
    return found.mean()  # a sample without maps leaves its share to nobody: it would pull the others harder
