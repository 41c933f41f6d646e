"""Measures of likeness: they grow with it, can be climbed, and leave out what has no weight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from blobs import blobs, grid, unit, world
from torch import Tensor

from fewscan.errors import ConfigError
from fewscan.space import kernels, similarity
from fewscan.space.similarity import SIMILARITIES, counted, features

GRID = grid((18, 20, 16), (2.0, 2.0, 2.0))
IMAGE = unit(blobs(world(GRID), texture=60))[None]


def by_descriptor(fixed: Tensor, warped: Tensor, *, weight: Tensor | None = None) -> Tensor:
    return similarity.mse(features("mind", fixed), features("mind", warped), weight=weight)


MEASURES = {
    "lncc": similarity.lncc,
    "mi": similarity.mi,
    "mind": by_descriptor,
    "mse": similarity.mse,
    "ncc": similarity.ncc,
}
every = pytest.mark.parametrize("name", sorted(MEASURES))


def shifted(voxels: float) -> Tensor:
    u = torch.zeros(1, 3, *GRID.shape)
    u[:, 1] = voxels
    return kernels.sample(IMAGE, u)


def test_all_measures_are_tested() -> None:
    assert SIMILARITIES.keys() <= MEASURES.keys()


@every
def test_likeness_falls_with_a_shift(name: str) -> None:
    values = [float(MEASURES[name](IMAGE, shifted(v))) for v in (0, 0.5, 1, 2)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1] + 0.01


@every
def test_its_gradient_leads_uphill_and_is_finite(name: str) -> None:
    u = torch.zeros(1, 3, *GRID.shape, requires_grad=True)
    value = MEASURES[name](IMAGE, kernels.sample(shifted(1.3), u))
    (grad,) = torch.autograd.grad(value, u)
    assert bool(grad.isfinite().all())
    step = 0.1 * grad / grad.norm(dim=1).max()
    assert float(MEASURES[name](IMAGE, kernels.sample(shifted(1.3), (u + step).detach()))) > float(value.detach())
    assert float(grad[0, 1].sum()) < 0  # back against the shift


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_are_kept_and_inputs_left_alone(name: str, dtype: torch.dtype) -> None:
    pair = [IMAGE.to(dtype), shifted(1).to(dtype)]
    weight = torch.rand(1, 1, *GRID.shape, dtype=dtype)
    kept = [p.clone() for p in (*pair, weight)]
    value = MEASURES[name](*pair, weight=weight)
    assert value.shape == ()
    assert value.dtype == dtype
    torch.testing.assert_close([*pair, weight], kept, atol=0, rtol=0)


@every
def test_equal_weights_change_nothing(name: str) -> None:
    weight = torch.full((1, 1, *GRID.shape), 0.5)
    found = MEASURES[name](IMAGE, shifted(1), weight=weight)
    torch.testing.assert_close(found, MEASURES[name](IMAGE, shifted(1)), atol=1e-4, rtol=1e-4)


@every
def test_voxels_without_weight_have_no_influence(name: str) -> None:
    weight = torch.ones(1, 1, *GRID.shape)
    weight[:, :, 9:] = 0
    other = shifted(1)
    changed = torch.where(weight > 0, other, other.flip(4))  # the extremes, and so the bins, stay
    weight = counted(name, weight)
    found = MEASURES[name](IMAGE, changed, weight=weight)
    torch.testing.assert_close(found, MEASURES[name](IMAGE, other, weight=weight), atol=2e-3, rtol=0)


@every
def test_two_channels_or_two_pairs_count_alike(name: str) -> None:
    one, two = MEASURES[name](IMAGE, shifted(1)), MEASURES[name](IMAGE, shifted(2))
    for axis in (0, 1):
        both = MEASURES[name](torch.cat([IMAGE, IMAGE], axis), torch.cat([shifted(1), shifted(2)], axis))
        torch.testing.assert_close(both, (one + two) / 2, atol=1e-4, rtol=1e-3)


@every
def test_a_constant_image_is_like_nothing_and_breaks_nothing(name: str) -> None:
    flat = torch.zeros_like(IMAGE, requires_grad=True)
    value = MEASURES[name](IMAGE, flat)
    value.backward()
    assert bool(value.isfinite())
    assert flat.grad is not None
    assert bool(flat.grad.isfinite().all())
    assert float(value.detach()) < float(MEASURES[name](IMAGE, IMAGE))


def test_ncc_is_the_squared_correlation() -> None:
    wanted = np.corrcoef(IMAGE.flatten(), shifted(2).flatten())[0, 1] ** 2
    assert float(similarity.ncc(IMAGE, shifted(2))) == pytest.approx(wanted, abs=1e-4)


def test_mutual_information_of_two_halves_is_one_bit() -> None:
    half = torch.zeros(1, 1, 4, 4, 4)
    half[:, :, :2] = 1
    across = half.transpose(2, 3).contiguous()
    assert float(similarity.mi(half, half)) == pytest.approx(math.log(2), abs=1e-4)
    assert float(similarity.mi(half, across)) == pytest.approx(0, abs=1e-4)


def test_mutual_information_does_not_mind_contrast() -> None:
    same = float(similarity.mi(IMAGE, IMAGE))
    assert float(similarity.mi(IMAGE, -IMAGE)) == pytest.approx(same, rel=0.02)
    assert float(similarity.mi(IMAGE, 5 * IMAGE - 3)) == pytest.approx(same, rel=0.02)


def test_descriptors_do_not_mind_inversion_and_lie_between_zero_and_one() -> None:
    found = similarity.mind(IMAGE)
    assert found.shape == (1, 6, *GRID.shape)
    assert float(found.min()) >= 0
    assert float(found.max()) == 1
    torch.testing.assert_close(similarity.mind(4 - 3 * IMAGE), found, atol=1e-3, rtol=0)
    assert float(by_descriptor(IMAGE, -IMAGE)) > float(by_descriptor(IMAGE, -shifted(1)))


def test_descriptors_tell_the_direction_of_an_edge() -> None:
    edge = torch.zeros(1, 1, 8, 8, 8)
    edge[:, :, 4:] = 1
    found = similarity.mind(edge)[0, :, 4, 4, 4]
    assert float(found[:2].max()) < 0.5  # neighbours across the edge differ
    assert bool((found[2:] == 1).all())  # those along it do not


def test_only_descriptors_change_an_image() -> None:
    pair = torch.cat([IMAGE, IMAGE.flip(2)], 1)
    assert features("lncc", IMAGE) is IMAGE
    torch.testing.assert_close(features("mind", pair)[:, 6:], similarity.mind(IMAGE.flip(2)))
    with pytest.raises(ConfigError, match="unknown similarity 'ssd'; known are lncc, mi, mind, mse"):
        features("ssd", IMAGE)


def test_a_window_counts_as_little_as_its_least_voxel() -> None:
    weight = torch.ones(2, 1, 9, 1, 5)
    weight[0, 0, 4, 0, 2] = 0.25
    found = counted("lncc", weight)
    assert found is not None
    wanted = torch.ones(9, 5)
    wanted[2:7] = 0.25  # two voxels each way; the last axis is no longer than the window
    torch.testing.assert_close(found[0, 0, :, 0], wanted)
    torch.testing.assert_close(found[1], weight[1])
    assert counted("mse", weight) is weight
    assert counted("lncc", None) is None


def test_a_region_thinner_than_the_window_keeps_its_weight() -> None:
    weight = torch.zeros(1, 1, 9, 9, 9)
    weight[..., 4] = 1
    torch.testing.assert_close(counted("lncc", weight), weight)
