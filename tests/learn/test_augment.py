"""Augmentation: identity, replay, sides, what the padding means."""

import pytest
import torch

from fewscan.learn.augment import _moved, _softened, intensity, sample, spatial
from fewscan.learn.batches import swap_sides
from fewscan.learn.config import AugmentConfig

STILL = AugmentConfig(
    rotate_deg=0, scale=0, shift=0, elastic=0, blur=0, low_resolution=1, bias=0, gamma=0, contrast=0, noise=0
)
SHAPE = (12, 14, 10)


def draw(config, *, seed=0, mirror=False, spacing=(1.0, 1.0, 1.0), batch=2):
    rng = torch.Generator().manual_seed(seed)
    return sample(config, rng, batch=batch, shape=SHAPE, spacing=spacing, mirror=mirror)


def pair(batch=2):
    torch.manual_seed(1)
    images = torch.randn(batch, 1, *SHAPE)
    labels = torch.zeros(batch, 3, *SHAPE)
    labels[:, 1, :6] = 1
    labels[:, 2, 6:] = 1
    return images, labels


def test_no_strength_changes_nothing():
    images, labels = pair()
    params = draw(STILL)
    moved, target = spatial(params, images, labels=labels, shape=SHAPE)
    torch.testing.assert_close(moved, images, atol=1e-4, rtol=0)
    torch.testing.assert_close(target, labels, atol=1e-4, rtol=0)
    torch.testing.assert_close(intensity(params, images), images, atol=1e-4, rtol=0)


def test_the_same_parameters_give_the_same_patch():
    images, labels = pair()
    params = draw(AugmentConfig(probability=1.0))
    first, again = (spatial(params, images, labels=labels, shape=SHAPE) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(intensity(params, first[0]), intensity(params, again[0]))
    assert not torch.equal(first[0], spatial(draw(AugmentConfig(), seed=1), images, labels=labels, shape=SHAPE)[0])


def test_inputs_are_not_changed():
    images, labels = pair()
    before = images.clone(), labels.clone()
    params = draw(AugmentConfig(probability=1.0))
    intensity(params, spatial(params, images, labels=labels, shape=SHAPE)[0])
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


def test_image_and_label_move_together():
    _, labels = pair()
    params = draw(AugmentConfig())
    moved, target = spatial(params, labels[:, 1:2], labels=labels, shape=SHAPE)
    inside = target.sum(1, keepdim=True) > 0.999  # where the source reaches
    torch.testing.assert_close(moved[inside], target[:, 1:2][inside], atol=1e-3, rtol=0)


def test_beyond_the_source_nobody_looked():
    images, labels = pair()
    small = images[:, :, :4], labels[:, :, :4]
    _, target = spatial(draw(STILL), small[0], labels=small[1], shape=SHAPE)
    assert target.sum(1)[:, 0].max() == 0
    assert target.sum(1)[:, 6].min() > 0.99


def test_mirroring_flips_left_and_right_and_swaps_the_sides():
    images, labels = pair(8)
    params = draw(STILL, mirror=True, batch=8)
    assert 0 < int(params.mirror.sum()) < 8
    moved, target = spatial(params, images, labels=labels, shape=SHAPE)
    target = swap_sides(target, params.mirror, pairs=[(1, 2)])
    for i, flipped in enumerate(params.mirror.tolist()):
        want = images[i].flip(1) if flipped else images[i]
        torch.testing.assert_close(moved[i], want, atol=1e-4, rtol=0)
        torch.testing.assert_close(target[i], labels[i], atol=1e-4, rtol=0)  # sides swapped back: as if not mirrored


def test_nothing_is_mirrored_unless_allowed():
    assert not draw(AugmentConfig(), mirror=False, batch=50).mirror.any()


@pytest.mark.parametrize("axis", [0, 2])
def test_thick_slices_are_never_blended_with_their_neighbours(axis):
    spacing = tuple(7.7 if a == axis else 1.5 for a in range(3))
    index = torch.arange(SHAPE[axis], dtype=torch.float32)
    for seed in range(20):
        params = draw(AugmentConfig(probability=1.0), seed=seed, spacing=spacing, batch=4, mirror=True)
        read = _moved(params, SHAPE, torch.device("cpu"))[1][:, axis] + (SHAPE[axis] - 1) / 2
        assert torch.allclose(read, read.round(), atol=1e-4)
        shown = torch.rand(SHAPE[axis], generator=torch.Generator().manual_seed(seed))[index.long()]
        slices = shown.view([-1 if a == axis else 1 for a in range(3)]).expand(4, 1, *SHAPE)
        torch.testing.assert_close(_softened(params, slices), slices, atol=1e-5, rtol=0)


def test_thick_slices_do_not_tilt():
    params = draw(AugmentConfig(elastic=0, scale=0), spacing=(1.0, 1.0, 8.0), batch=64)
    in_mm = params.matrix * torch.tensor([1.0, 1.0, 8.0])[None, :, None] / torch.tensor([1.0, 1.0, 8.0])[None, None, :]
    assert in_mm[:, 2, :2].abs().max() < 0.02
    assert in_mm[:, 0, 1].abs().max() > 0.2


def test_rotation_keeps_millimetres_on_anisotropic_grids():
    params = draw(AugmentConfig(elastic=0, scale=0), spacing=(1.0, 1.0, 1.6), batch=16)
    mm = torch.tensor([1.0, 1.0, 1.6])
    turn = params.matrix * mm[None, :, None] / mm[None, None, :]
    torch.testing.assert_close(turn @ turn.transpose(1, 2), torch.eye(3).expand(16, 3, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [1.1, 1.5, 1.9, 2.0, 3.0])
def test_low_resolution_does_not_shift_the_image_against_its_labels(factor):
    ramp = torch.arange(48.0).view(1, 1, 48, 1, 1).expand(1, 1, 48, 12, 10)
    shift = intensity(draw(STILL, batch=1)._replace(low_resolution=(factor, 1.0, 1.0)), ramp) - ramp
    assert shift[:, :, 6:-6].mean().abs() < 0.02


@pytest.mark.parametrize("name", ["blur", "low_resolution", "bias", "gamma", "contrast", "noise"])
def test_each_intensity_change_does_something_and_stays_finite(name):
    strong = {"low_resolution": 3.0}.get(name, 0.8)
    settings = {f: getattr(STILL, f) for f in STILL.__dataclass_fields__} | {name: strong, "probability": 1.0}
    images, _ = pair(4)
    changed = [intensity(draw(AugmentConfig(**settings), seed=s, batch=4), images) for s in range(8)]
    assert all(torch.isfinite(c).all() for c in changed)
    assert any((c - images).abs().max() > 0.05 for c in changed)
