"""Patches: repeatable, centred where it matters, blind where nobody looked."""

import numpy as np
import pytest
import torch
from phantom import NAMES, phantom

from fewscan.learn.batches import PatchBatches, crop, crop_label, prepare, resample_index
from fewscan.learn.config import AugmentConfig, Settings
from fewscan.learn.engine import step_generator
from fewscan.learn.plan import derive
from fewscan.space.geometry import Geometry
from fewscan.space.volume import IGNORE, Case, Labelmap, Volume


def case(seed=0, *, shape=(20, 24, 18), blank=None, drawn=None):
    image, label, geometry = phantom(seed, shape=shape)
    label = label.astype(np.uint16)
    if blank is not None:
        label[:, :, blank] = IGNORE
    return Case(str(seed), Volume(image[None], geometry, geometry), Labelmap(label, geometry, NAMES), drawn)


def make(folder, cases, *, voxels=0, foreground=0.67, batch=2):
    settings = Settings()
    plan = derive(cases, names=NAMES, channels=("image",), modality="mr", settings=settings, gpu=False)
    if voxels:
        import dataclasses

        plan = dataclasses.replace(plan, patch=(8, 8, 8))
    prepared = [prepare(c, plan, folder=folder) for c in cases]
    return PatchBatches(
        prepared, plan, config=AugmentConfig(), batch=batch, foreground=foreground, device=torch.device("cpu")
    )


def test_the_same_step_gives_the_same_batch(tmp_path):
    batches = make(tmp_path, [case(0), case(1)])
    one, same, other = batches(step_generator(0, 3)), batches(step_generator(0, 3)), batches(step_generator(0, 4))
    assert torch.equal(one.images, same.images)
    assert torch.equal(one.labels, same.labels)
    assert not torch.equal(one.images, other.images)
    assert one.images.shape == (2, 1, *batches.plan.patch)
    assert one.labels.shape == (2, 3, *batches.plan.patch)


def test_foreground_patches_hold_a_structure(tmp_path):
    batches = make(tmp_path, [case(0, shape=(40, 40, 40))], voxels=512, foreground=1.0, batch=1)
    held = [float(batches(step_generator(0, s)).labels[:, 1:].sum()) > 0 for s in range(20)]
    assert sum(held) >= 16


def test_slices_left_blank_stay_unseen(tmp_path):
    batches = make(tmp_path, [case(0, blank=slice(None, None, 2))])
    seen = batches(step_generator(0, 0)).labels.sum(1)
    assert 0.2 < float((seen > 0.99).float().mean()) < 0.8 or float(seen.mean()) < 0.8
    assert float((seen < 0.5).float().mean()) > 0.2


def test_what_was_not_drawn_is_passed_on(tmp_path):
    batches = make(tmp_path, [case(0, drawn=frozenset({1}))])
    assert batches(step_generator(0, 0)).drawn.tolist() == [[True, True, False]] * 2


def test_crop_repeats_the_border():
    array = np.arange(27, dtype=np.float32).reshape(1, 3, 3, 3)
    assert (crop(array, (1, 1, 1), size=(3, 3, 3)) == array).all()
    outside = crop(array, (0, 1, 1), size=(5, 3, 3))
    assert outside.shape == (1, 5, 3, 3)
    assert (outside[0, 0] == array[0, 0]).all()


def test_labels_beyond_the_grid_are_unseen():
    label = np.ones((3, 3, 3), np.int16)
    got = crop_label(label, (0, 1, 1), size=(5, 3, 3))
    assert (got[:2] == -1).all()
    assert (got[2:] == 1).all()


@pytest.mark.parametrize("shape", [(9, 10, 12), (40, 30, 20)])
def test_resampled_labels_keep_their_volume(shape):
    _, label, _ = phantom(0)
    index = label.astype(np.int16)
    got = resample_index(index, shape, classes=3)
    for k in range(3):
        assert abs((got == k).mean() - (index == k).mean()) < 0.03


def test_many_labels_give_hard_targets_that_are_blind_beyond_the_scan(tmp_path):
    import dataclasses

    batches = make(tmp_path, [case(0, blank=slice(0, 4))])
    batches.plan = dataclasses.replace(batches.plan, weights=(1.0, 1.0, 1.0))
    labels = batches(step_generator(0, 0)).labels
    assert set(labels.unique().tolist()) == {0.0, 1.0}
    assert labels.sum(1).max() == 1
    assert float((labels.sum(1) == 0).float().mean()) > 0.1


def test_background_patches_lie_anywhere(tmp_path):
    batches = make(tmp_path, [case(0, shape=(40, 40, 40))], voxels=512, foreground=0.0, batch=1)
    held = [float(batches(step_generator(0, s)).labels[:, 1:].sum()) > 0 for s in range(30)]
    assert sum(held) <= 15  # most of the box is background


@pytest.mark.parametrize("labels", [2, 10])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_thin_scans_lose_no_targets(tmp_path, depth, labels):
    """What moves the patch is left out, so that every voxel of a scan that fills it has to be taught."""
    rng = np.random.default_rng(0)
    shape = (32, 32, depth)
    image, label, geometry = rng.random(shape, np.float32), np.zeros(shape, np.uint16), Geometry(shape, np.eye(4))
    names = {k: f"part {k}" for k in range(1, labels + 1)}
    for k in names:
        label[3 * k - 2 : 3 * k, 4:28] = k
    one = Case("a", Volume(image[None], geometry, geometry), Labelmap(label, geometry, names))
    plan = derive([one], names=names, channels=("image",), modality="mr", settings=Settings(), gpu=False)
    assert plan.patch == shape
    still = AugmentConfig(rotate_deg=0, scale=0, shift=0, elastic=0, probability=0, mirror="never")
    batches = PatchBatches(
        [prepare(one, plan, folder=tmp_path)], plan, config=still, batch=1, foreground=1.0, device=torch.device("cpu")
    )
    told = batches(step_generator(0, 0)).labels
    assert float(told.sum()) == pytest.approx(np.prod(shape))
    assert told.argmax(1)[0].numpy() == pytest.approx(label)
