"""Batched augmentation: `sample` draws parameters, `apply` is a pure function of them, so any patch can be replayed.

One resampling does affine, elastic and mirroring together; the intensity changes follow on the patch. Everything works
on whole batches of tensors on whatever device they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fewscan.learn.config import AugmentConfig
from fewscan.space import directions
from fewscan.space.geometry import Shape, thick
from fewscan.space.volume import Kind

CONTROL_POINTS = 5
SHAKEN = 0.5  # radians by which directions turn for noise of strength 1


class Params(NamedTuple):
    """One drawn augmentation for each sample of a batch; see `sample`.

    Parameters
    ----------
    matrix : (B, 3, 3) float
        Patch offset to source offset, both in voxels from the middle.
    shift : (B, 3) float
        Voxels.
    control : (B, 3, G, G, G) float
        Displacement of the control points, voxels.
    mirror : (B,) bool
        Whether left and right are exchanged.
    blur : (B,) float
        Share of the blurred image, 0 to 1.
    low_resolution : (3,) float
        Factor by which each axis is coarsened, one for the batch.
    bias : (B, 1, 3, 3, 3) float
        Logarithm of a smooth gain.
    log_gamma, gain, offset : (B,) float
        Contrast.
    noise : (B,) float
        Standard deviation.
    noise_seed : int
        Of the noise.
    spacing : (3,) float
        Voxel size, mm.
    """

    matrix: Tensor
    shift: Tensor
    control: Tensor
    mirror: Tensor
    blur: Tensor
    low_resolution: tuple[float, float, float]
    bias: Tensor
    log_gamma: Tensor
    gain: Tensor
    offset: Tensor
    noise: Tensor
    noise_seed: int
    spacing: tuple[float, float, float]


def sample(
    config: AugmentConfig, rng: Generator, *, batch: int, shape: Shape, spacing: Sequence[float], mirror: bool
) -> Params:
    """Draw the parameters of a batch.

    Parameters
    ----------
    config : AugmentConfig
        Largest strengths.
    rng : torch.Generator
        On the CPU; the only source of randomness.
    batch : int
        Number of samples B.
    shape : (X, Y, Z) int
        Patch size.
    spacing : (3,) float
        Voxel size in mm. Rotations that mix a fine with a coarse axis, and displacements along a coarse one, shrink by
        the ratio of the two; so do rotations out of the plane of a slab. Thick slices (`geometry.thick`) move whole
        and by whole ones: no slice of a scan to predict is a blend of its neighbours.
    mirror : bool
        Whether left-right mirroring is allowed.
    """

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=rng) * 2 - 1

    def sometimes(values: Tensor, probability: float = config.probability) -> Tensor:
        on = torch.rand(batch, generator=rng) < probability
        return values * on.view(-1, *[1] * (values.ndim - 1))

    mm = torch.tensor([float(s) for s in spacing])
    thin = mm.min() / mm  # 1 for the finest axis
    pair = torch.stack([thin[[1, 2]].min() / thin[[1, 2]].max(), thin[[0, 2]].min() / thin[[0, 2]].max(),
                        thin[[0, 1]].min() / thin[[0, 1]].max()])  # fmt: skip
    slices = torch.tensor(thick(spacing))
    pair = torch.where(pair < 0.5, pair**2, torch.ones(3)) * ~(slices[[1, 0, 0]] | slices[[2, 2, 1]])
    extent = mm * torch.tensor([float(n) for n in shape])
    flat = torch.stack([extent[list(p)].min() / extent[list(p)].max() for p in ((1, 2), (0, 2), (0, 1))])
    pair = pair * (4 * flat).clamp(max=1)  # a slab would tilt out of its own grid
    angles = uniform(batch, 3) * math.radians(config.rotate_deg) * pair
    scales = 1 + uniform(batch, 3) * config.scale * ~slices
    rotation = _rotation(angles) * scales[:, None, :]
    matrix = rotation * (mm[None, None, :] / mm[None, :, None])  # voxels -> mm -> turned -> voxels
    size = torch.tensor([float(n) for n in shape])
    shift = uniform(batch, 3) * config.shift * size
    shift = torch.where(slices, shift.round(), shift)
    knots = (size - 1).clamp(min=1) / (CONTROL_POINTS - 1)  # voxels between control points
    reach = config.elastic * knots * thin.clamp(max=1) * ~slices * torch.rand(batch, 1, generator=rng)
    control = torch.randn(batch, 3, *[CONTROL_POINTS] * 3, generator=rng) * reach[:, :, None, None, None]
    flips = torch.rand(batch, generator=rng) < 0.5
    axes = [a for a in range(3) if not slices[a]]
    axis = [*axes, 3][int(torch.randint(0, len(axes) + 1, (1,), generator=rng))]  # one axis, as of slices, or all
    factor = 1 + float(torch.rand(1, generator=rng)) * (config.low_resolution - 1)
    if float(torch.rand(1, generator=rng)) >= config.probability / 2:
        factor = 1.0
    low = tuple(factor if a in axes and axis in (3, a) else 1.0 for a in range(3))
    return Params(
        matrix=matrix,
        shift=shift,
        control=control,
        mirror=flips & mirror,
        blur=sometimes((uniform(batch) + 1) / 2 * min(1.0, config.blur)),
        low_resolution=(low[0], low[1], low[2]),
        bias=sometimes(uniform(batch, 1, 3, 3, 3) * config.bias),
        log_gamma=sometimes(uniform(batch) * config.gamma, min(1.0, 1.4 * config.probability)),
        gain=1 + uniform(batch) * config.contrast,
        offset=uniform(batch) * config.contrast,
        noise=sometimes((uniform(batch) + 1) / 2 * config.noise),
        noise_seed=int(torch.randint(0, 2**62, (1,), generator=rng)),
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
    )


def _rotation(angles: Tensor) -> Tensor:
    """Rotation matrices (B, 3, 3) from angles (B, 3) about the three axes."""
    c, s = angles.cos(), angles.sin()
    o, z = torch.ones_like(c[:, 0]), torch.zeros_like(c[:, 0])
    x = torch.stack([o, z, z, z, c[:, 0], -s[:, 0], z, s[:, 0], c[:, 0]], 1).view(-1, 3, 3)
    y = torch.stack([c[:, 1], z, s[:, 1], z, o, z, -s[:, 1], z, c[:, 1]], 1).view(-1, 3, 3)
    w = torch.stack([c[:, 2], -s[:, 2], z, s[:, 2], c[:, 2], z, z, z, o], 1).view(-1, 3, 3)
    return x @ y @ w


def grid(params: Params, *, shape: Shape, source: Shape, device: torch.device) -> Tensor:
    """Where each patch voxel is read from, in the (B, X, Y, Z, 3) form that ``grid_sample`` takes.

    Parameters
    ----------
    params : Params
        From `sample`.
    shape, source : (X, Y, Z) int
        Patch and source size; both are centred on the same point.
    device : torch.device
        Where to compute.
    """
    _, places = _moved(params, shape, device)
    half = torch.tensor([max(n - 1, 1) / 2 for n in source], device=device)
    return (places / half.view(1, 3, 1, 1, 1)).permute(0, 2, 3, 4, 1).flip(-1)


def _moved(params: Params, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Patch voxels (3, X, Y, Z), and where each is read from (B, 3, X, Y, Z), both counted from the middle."""
    axes = [torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2 for n in shape]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij")).view(3, -1)  # (3, N)
    matrix = params.matrix.to(device).clone()
    matrix[:, :, 0] = torch.where(params.mirror.to(device)[:, None], -matrix[:, :, 0], matrix[:, :, 0])
    places = (matrix @ offsets).view(-1, 3, *shape)
    places = places + F.interpolate(params.control.to(device), size=shape, mode="trilinear", align_corners=True)
    return offsets.view(3, *shape), places + params.shift.to(device)[:, :, None, None, None]


def spatial(
    params: Params, images: Tensor, *, labels: Tensor, shape: Shape, nearest: bool = False, kind: Kind = "scalar"
) -> tuple[Tensor, Tensor]:
    """Resample source crops into deformed patches.

    Parameters
    ----------
    params : Params
        From `sample`.
    images : (B, C, X, Y, Z) float
        Source crops; beyond their border the nearest voxel is repeated.
    labels : (B, K, X, Y, Z) float
        One-hot source labels; beyond the border all channels are 0, that is, not looked at.
    shape : (X, Y, Z) int
        Patch size.
    nearest : bool
        Take the nearest label instead of interpolating.
    kind : {"scalar", "peaks", "tensor"}
        Of the images; those of directions hold matrices (`space.directions`), which turn with the anatomy.
    """
    source = (images.shape[2], images.shape[3], images.shape[4])
    places = grid(params, shape=shape, source=source, device=images.device)
    images = F.grid_sample(images, places, padding_mode="border", align_corners=True)
    if kind != "scalar":
        offsets, moved = _moved(params, shape, images.device)
        images = directions.reorient(images, moved - offsets, kind=kind, spacing=params.spacing)
    mode = "nearest" if nearest else "bilinear"
    labels = F.grid_sample(labels, places, mode=mode, padding_mode="zeros", align_corners=True)
    return images, labels


def intensity(params: Params, images: Tensor, *, kind: Kind = "scalar") -> Tensor:
    """Change resolution, sharpness, shading, contrast and noise of normalised patches.

    Of directions neither shading nor contrast is changed by component: all entries of a voxel get one factor, and
    noise turns them.

    Parameters
    ----------
    params : Params
        From `sample`.
    images : (B, C, X, Y, Z) float
        Normalised to a standard deviation near 1. Not changed in place.
    kind : {"scalar", "peaks", "tensor"}
        As for `spatial`.
    """
    images = _softened(params, images)
    return _graded(params, images) if kind == "scalar" else _turned(params, images)


def _per_sample(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device).view(-1, 1, 1, 1, 1)


def _softened(params: Params, images: Tensor) -> Tensor:
    """Resolution and sharpness, which mix neighbours and nothing else."""
    size = images.shape[2:]
    if max(params.low_resolution) > 1:
        small = [max(1, round(n / f)) for n, f in zip(size, params.low_resolution, strict=True)]
        # read at the middles of the large voxels: their nearest small one would shift the image against its labels
        images = F.interpolate(F.interpolate(images, size=small, mode="trilinear"), size=size, mode="trilinear")
    if bool((params.blur > 0).any()):
        share, width = _per_sample(params.blur, images.device), [1 if slices else 3 for slices in thick(params.spacing)]
        around = [n // 2 for n in width]
        images = images.lerp(F.avg_pool3d(images, width, 1, around, count_include_pad=False), share)
    return images


def _shading(params: Params, images: Tensor) -> Tensor:
    bias = params.bias.to(images.device)
    return F.interpolate(bias, size=images.shape[2:], mode="trilinear", align_corners=True).exp()


def _graded(params: Params, images: Tensor) -> Tensor:
    """Shading, contrast and noise of intensities."""
    device = images.device
    low, high = images.amin((2, 3, 4), keepdim=True), images.amax((2, 3, 4), keepdim=True)
    span = (high - low).clamp(min=1e-6)
    images = (images - low) / span
    if bool((params.bias != 0).any()):
        images = images * _shading(params, images)
    if bool((params.log_gamma != 0).any()):
        images = images.clamp(min=0) ** _per_sample(params.log_gamma.exp(), device)
    images = images * span + low
    images = images * _per_sample(params.gain, device) + _per_sample(params.offset, device)
    if bool((params.noise > 0).any()):
        rng = torch.Generator(device).manual_seed(params.noise_seed)
        images = images + torch.randn(images.shape, generator=rng, device=device) * _per_sample(params.noise, device)
    return images


def _turned(params: Params, images: Tensor) -> Tensor:
    """One length factor a voxel, and small random rotations in the place of noise."""
    device = images.device
    images = images * _per_sample(params.gain.clamp(min=0.1), device)
    if bool((params.bias != 0).any()):
        images = images * _shading(params, images)
    if bool((params.noise > 0).any()):
        rng = torch.Generator(device).manual_seed(params.noise_seed)
        size = (len(images), 3, *images.shape[2:])
        angles = torch.randn(size, generator=rng, device=device) * _per_sample(params.noise * SHAKEN, device)
        images = directions.congruent(images, directions.small_rotations(angles))
    return images
