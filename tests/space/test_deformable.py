"""Deformable registration: a known deformation comes back, without folds; weights and labels steer it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from blobs import blobs, grid, unit, world
from torch import Tensor

from fewscan.errors import ConfigError
from fewscan.space import field as fields
from fewscan.space.deformable import DeformConfig, deform, level_shape, overlap
from fewscan.space.geometry import Array
from fewscan.space.similarity import SIMILARITIES

GRID = grid((30, 32, 28), (1.5, 1.5, 1.5))
QUICK = DeformConfig(shrink=(2, 1), steps=(40, 12))
STILL = torch.zeros(1, 3, *GRID.shape)
BALLS = (((-6.0, 4.0, 3.0), 6.0), ((6.0, -5.0, -3.0), 6.0))  # centre and radius, mm


def bend(size: float = 3.0) -> Array:
    """A smooth displacement in mm that ends at the border, (3, X, Y, Z)."""
    x, y, z = (axis / np.abs(axis).max() * math.pi / 2 for axis in world(GRID))
    fade = np.cos(x) * np.cos(y) * np.cos(z)
    return size * np.stack([fade * np.cos(2 * y), -fade * np.cos(1.5 * z), fade * np.sin(2 * x)])


def image_at(places: Array, *, seed: int) -> Tensor:
    noise = np.random.default_rng(seed).normal(0, 0.05, places.shape[1:])
    return unit(blobs(places, texture=150) + noise)[None]


def balls_at(places: Array) -> Tensor:
    parts = [np.linalg.norm(places - np.reshape(c, (3, 1, 1, 1)), axis=0) < r for c, r in BALLS]
    return torch.from_numpy(np.stack(parts).astype(np.float32))[None]


BENT = world(GRID) + bend()
FIXED, MOVING = image_at(BENT, seed=0), image_at(world(GRID), seed=1)
FIXED_BALLS, MOVING_BALLS = balls_at(BENT), balls_at(world(GRID))


def dice(u: Tensor) -> list[float]:
    """Of each ball."""
    a, b = FIXED_BALLS[0] > 0.5, fields.warp(MOVING_BALLS, u)[0] > 0.5
    return [float(2 * (p & q).sum() / (p.sum() + q.sum())) for p, q in zip(a, b, strict=True)]


@pytest.mark.parametrize("similarity", sorted(SIMILARITIES))
def test_a_known_deformation_is_recovered_without_folds(similarity: str) -> None:
    u = deform(FIXED, MOVING, config=DeformConfig(shrink=(2, 1), steps=(40, 12), similarity=similarity))
    assert max(dice(STILL)) < 0.8
    assert min(dice(u)) > 0.9
    assert fields.folding(u) == 0
    inside = torch.from_numpy(np.linalg.norm(BENT, axis=0) < 13)
    miss = (1.5 * u[0] - torch.from_numpy(bend())).norm(dim=0)[inside]
    assert float(miss.mean()) < 1.0  # of 2.9 mm that they were apart


def test_labels_help_where_images_show_nothing() -> None:
    plain = [unit(np.clip(blobs(p), 0, 0.4))[None] for p in (BENT, world(GRID))]  # the head's outline at most
    alone = deform(plain[0], plain[1], config=QUICK)
    helped = deform(plain[0], plain[1], config=QUICK, masks=(FIXED_BALLS, MOVING_BALLS))
    ignored = DeformConfig(shrink=(2, 1), steps=(40, 12), anatomy=0.0)
    assert min(dice(helped)) > 0.9 > min(dice(alone))
    assert fields.folding(helped) == 0
    torch.testing.assert_close(
        deform(plain[0], plain[1], config=ignored, masks=(FIXED_BALLS, MOVING_BALLS)), alone, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("similarity", sorted(SIMILARITIES))
def test_a_lesion_that_one_scan_lacks_hardly_pulls_when_it_has_no_weight(similarity: str) -> None:
    config = DeformConfig(shrink=(2, 1), steps=(40, 12), similarity=similarity)
    lesion = torch.from_numpy(np.linalg.norm(world(GRID) - np.reshape((0.0, 8.0, 0.0), (3, 1, 1, 1)), axis=0) < 7)
    fixed = MOVING.clone()
    fixed[0, 0, lesion] = 6.0
    weight = 1 - lesion.float()[None, None]
    masked, plain = (deform(fixed, MOVING, config=config, weight=w)[0].norm(dim=0)[lesion] for w in (weight, None))
    assert float(masked.mean()) < 0.5 * float(plain.mean())


def test_what_lies_far_from_all_weight_is_left_alone() -> None:
    weight = torch.zeros(1, 1, *GRID.shape)
    weight[:, :, :14] = 1
    u = 1.5 * deform(FIXED, MOVING, config=QUICK, weight=weight)[0].norm(dim=0)[:, 8:24, 8:20]
    wanted = torch.from_numpy(np.linalg.norm(bend(), axis=0))[:, 8:24, 8:20]
    assert float((u[4:12] - wanted[4:12]).abs().mean()) < 0.25 * float(wanted[4:12].mean())
    assert float(u[-4:].mean()) < 0.25 * float(u.max())


def test_images_that_are_alike_stay_where_they_are() -> None:
    u = deform(MOVING, MOVING, config=QUICK)[0].norm(dim=0)
    assert float(u.mean()) < 0.1
    assert float(u[MOVING_BALLS[0].sum(0) > 0].max()) < 0.25


def test_it_goes_on_from_a_start() -> None:
    true = torch.from_numpy((bend() / 1.5).astype(np.float32))[None]
    kept = true.clone()
    none = DeformConfig(shrink=(1,), steps=(0,))
    torch.testing.assert_close(deform(FIXED, MOVING, config=none, start=true), true)
    few = DeformConfig(shrink=(1,), steps=(5,))
    assert min(dice(deform(FIXED, MOVING, config=few, start=true))) > 0.9 > max(dice(deform(FIXED, MOVING, config=few)))
    torch.testing.assert_close(true, kept, atol=0, rtol=0)


def test_a_start_without_steps_keeps_its_resolution() -> None:
    torch.manual_seed(0)
    images, start = torch.rand(2, 1, 1, 12, 10, 8), torch.randn(1, 3, 12, 10, 8)
    u = deform(images[0], images[1], config=DeformConfig(shrink=(2, 1), steps=(0, 0)), start=start)
    torch.testing.assert_close(u, start)


def test_every_pair_of_a_batch_is_registered_as_if_alone() -> None:
    few = DeformConfig(shrink=(2,), steps=(6,))
    fixed, moving = torch.cat([FIXED, MOVING]), torch.cat([MOVING, FIXED])
    both = deform(fixed, moving, config=few)
    for i in range(2):
        torch.testing.assert_close(
            both[i : i + 1], deform(fixed[i : i + 1], moving[i : i + 1], config=few), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("similarity", sorted(SIMILARITIES))
def test_a_single_slice_can_be_deformed(similarity: str) -> None:
    config = DeformConfig(shrink=(2, 1), steps=(5, 5), similarity=similarity)
    u = deform(FIXED[..., 14:15], MOVING[..., 14:15], config=config)
    assert u.shape == (1, 3, 30, 32, 1)
    assert bool(u.isfinite().all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_what_the_cpu_finds() -> None:
    u = deform(FIXED.cuda(), MOVING.cuda(), config=QUICK).cpu()
    assert min(dice(u)) > 0.9
    assert (u - deform(FIXED, MOVING, config=QUICK)).norm(dim=1).mean() < 0.3


def test_progress_runs_to_the_end() -> None:
    shares: list[float] = []
    deform(FIXED, MOVING, config=DeformConfig(shrink=(4, 2), steps=(3, 4)), progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert len(shares) == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shrink": (2, 1), "steps": (5,)}, r"as many steps as levels are needed, got \(5,\) for \(2, 1\)"),
        ({"shrink": (), "steps": ()}, "as many steps as levels"),
        ({"shrink": (0,), "steps": (5,)}, "levels must be at least 1"),
        ({"shrink": (1,), "steps": (-1,)}, "steps at least 0"),
        ({"step_voxels": 0.0}, "step_voxels must lie above 0 and at most at 2, got 0"),
        ({"smooth_field": -1.0}, "must not be negative"),
        ({"similarity": "ssd"}, "unknown similarity 'ssd'; known are lncc, mi, mind, mse"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeformConfig(**values)  # type: ignore[arg-type]


def test_short_axes_are_not_shrunk_to_nothing() -> None:
    assert level_shape((160, 20, 5), 4) == (40, 12, 5)
    assert level_shape((161, 20, 5), 1) == (161, 20, 5)


def test_overlap_is_the_mean_dice_of_the_structures_that_occur() -> None:
    a, b = torch.zeros(1, 3, 4, 1, 1), torch.zeros(1, 3, 4, 1, 1)
    a[0, 0, :2] = b[0, 0, 1:3] = 1  # 2 and 2 voxels, one in common: 0.5
    a[0, 1, 0] = b[0, 1, 0] = 1  # the same: 1; the third occurs in neither
    assert float(overlap(a, b)) == pytest.approx(0.75)
    one_blank = [torch.cat([x, torch.zeros_like(x)]) for x in (a, b)]  # which pulls the other sample no harder
    assert float(overlap(*one_blank)) == pytest.approx(0.75 / 2)
