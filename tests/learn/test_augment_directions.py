"""Augmentation turns directions with the patch, keeps their lengths apart from one factor, and leaves scalars alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewscan.learn.augment import Params, intensity, sample, spatial
from fewscan.learn.config import AugmentConfig
from fewscan.space.directions import congruent, matrices, sizes
from fewscan.space.volume import Kind

STILL: dict[str, float] = {
    "rotate_deg": 0, "scale": 0, "shift": 0, "elastic": 0, "blur": 0, "low_resolution": 1, "bias": 0, "gamma": 0,
    "contrast": 0, "noise": 0,
}  # fmt: skip
SHAPE = (14, 16, 14)
VECTORS: tuple[Kind, ...] = ("peaks", "tensor")


def draw(seed: int, *, mirror: bool = False, spacing: Any = (1.0, 1.0, 1.0), **strong: float) -> Params:
    config = AugmentConfig(**{**STILL, **strong})  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(seed)
    return sample(config, rng, batch=2, shape=SHAPE, spacing=spacing, mirror=mirror)


def constant(kind: Kind, seed: int = 0) -> Tensor:
    """The same directions in every voxel, (2, 6 n, X, Y, Z): turning them is exact whatever the interpolation."""
    rng = torch.Generator().manual_seed(seed)
    data = torch.randn(6, 1, 1, 1, generator=rng).expand(6, *SHAPE)  # two peaks, or one tensor
    return matrices(data, kind, axes=np.eye(3))[None].repeat(2, 1, 1, 1, 1)


def through(params: Params, images: Tensor, **how: Any) -> Tensor:
    return spatial(params, images, labels=torch.ones(2, 1, *SHAPE), shape=SHAPE, **how)[0]


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.5, 2.0)])
@pytest.mark.parametrize("mirror", [False, True])
def test_a_patch_turns_its_directions_by_the_inverse_of_what_it_was_read_by(
    kind: Kind, spacing: tuple[float, float, float], mirror: bool
) -> None:
    params = draw(3, rotate_deg=40, spacing=spacing, mirror=mirror)
    mm = torch.tensor(spacing)
    turn = params.matrix * mm[None, :, None] / mm[None, None, :]
    turn[params.mirror] = turn[params.mirror] * torch.tensor([-1.0, 1.0, 1.0])  # its first column
    wanted = congruent(constant(kind), turn.transpose(1, 2)[..., None, None, None])
    torch.testing.assert_close(through(params, constant(kind), kind=kind), wanted, atol=1e-3, rtol=0)
    if mirror:
        assert bool(params.mirror.any())
    assert float((wanted - constant(kind)).abs().max()) > 0.1


@pytest.mark.parametrize("kind", VECTORS)
def test_lengths_and_traces_outlive_every_deformation(kind: Kind) -> None:
    params = draw(1, rotate_deg=30, scale=0.2, elastic=0.4, mirror=True)
    images = constant(kind)
    moved = through(params, images, kind=kind)
    torch.testing.assert_close(sizes(moved), sizes(images), atol=1e-4, rtol=1e-4)
    assert float((moved - images).abs().max()) > 0.1


@pytest.mark.parametrize("kind", VECTORS)
def test_contrast_and_shading_are_one_factor_a_voxel(kind: Kind) -> None:
    images = constant(kind)
    params = draw(2, bias=0.5, contrast=0.4, gamma=0.8, probability=1.0)
    changed = intensity(params, images, kind=kind)
    factor = sizes(changed) / sizes(images)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(changed, images * factor[:, :1], atol=1e-4, rtol=1e-4)
    assert float((factor - 1).abs().max()) > 0.05


@pytest.mark.parametrize("kind", VECTORS)
def test_noise_turns_and_keeps_lengths(kind: Kind) -> None:
    images = constant(kind)
    changed = intensity(draw(5, noise=0.4, probability=1.0), images, kind=kind)
    torch.testing.assert_close(sizes(changed), sizes(images), atol=1e-5, rtol=1e-5)
    assert 0.01 < float((changed - images).abs().mean()) < 1


def test_scalars_are_what_they_were_bit_for_bit() -> None:
    """The path of intensities as it was before there were kinds, written out."""
    import torch.nn.functional as F

    params = draw(7, rotate_deg=20, scale=0.2, elastic=0.3, shift=0.1)
    images = torch.randn(2, 6, *SHAPE, generator=torch.Generator().manual_seed(0))
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in SHAPE]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij")).view(3, -1)
    places = (params.matrix @ offsets).view(-1, 3, *SHAPE)
    places = places + F.interpolate(params.control, size=SHAPE, mode="trilinear", align_corners=True)
    places = places + params.shift[:, :, None, None, None]
    half = torch.tensor([(n - 1) / 2 for n in SHAPE]).view(1, 3, 1, 1, 1)
    grid = (places / half).permute(0, 2, 3, 4, 1).flip(-1)
    wanted = F.grid_sample(images, grid, padding_mode="border", align_corners=True)
    assert torch.equal(through(params, images), wanted)
    assert not torch.equal(through(params, images, kind="tensor"), wanted)
