import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewscan.errors import GeometryError
from fewscan.judge import metrics
from fewscan.space.volume import IGNORE

SPACING = (0.8, 1.5, 3.0)


def two_blobs(seed=0, shape=(9, 8, 7)):
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    blobs = []
    for _ in range(2):
        centre = rng.uniform(3, 5, 3).reshape(3, 1, 1, 1)
        blobs.append(((grid - centre) ** 2).sum(0) < rng.uniform(4, 9))
    return blobs


def naive_distances(p, r, spacing):
    """Surface distances by comparing every surface voxel with every other."""

    def points(mask):
        found = []
        for x, y, z in np.argwhere(mask):
            for step in np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)]):
                i = np.array([x, y, z]) + step
                if (i < 0).any() or (i >= mask.shape).any() or not mask[tuple(i)]:
                    found.append((x, y, z))
                    break
        return np.array(found) * spacing

    a, b = points(p), points(r)
    gaps = np.linalg.norm(a[:, None] - b[None], axis=2)
    return gaps.min(1), gaps.min(0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_surface_distances_equal_the_naive_search(seed):
    p, r = two_blobs(seed)
    for fast, slow in zip(
        metrics.surface_distances(p, r, spacing=SPACING), naive_distances(p, r, SPACING), strict=True
    ):
        np.testing.assert_allclose(np.sort(fast), np.sort(slow), atol=1e-5)


def test_named_metrics_follow_from_the_naive_distances():
    p, r = two_blobs(3)
    a, b = naive_distances(p, r, SPACING)
    both = np.concatenate([a, b])
    assert metrics.hd95_mm(p, r, spacing=SPACING) == pytest.approx(max(np.percentile(a, 95), np.percentile(b, 95)))
    assert metrics.assd_mm(p, r, spacing=SPACING) == pytest.approx(both.mean())
    assert metrics.surface_dice(p, r, spacing=SPACING, tolerance_mm=1.5) == pytest.approx((both <= 1.5 + 1e-4).mean())
    assert metrics.dice(p, r) == pytest.approx(2 * (p & r).sum() / (p.sum() + r.sum()))


def test_a_mask_agrees_with_itself():
    p, _ = two_blobs()
    found = metrics.score(p.astype(int), p.astype(int), spacing=SPACING, names={1: "x"})["x"]
    assert (found.status, found.dice, found.surface_dice) == ("scored", 1, 1)
    assert (found.hd95_mm, found.assd_mm, found.volume_error) == (0, 0, 0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shift_along_an_axis_costs_its_own_millimetres(axis):
    block = np.zeros((12, 12, 12), int)
    block[3:7, 3:7, 3:7] = 1
    found = metrics.score(np.roll(block, 1, axis), block, spacing=SPACING, names={1: "x"})["x"]
    assert found.dice == pytest.approx(0.75)
    assert found.hd95_mm == pytest.approx(SPACING[axis])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), flip=st.lists(st.integers(0, 2), unique=True), order=st.permutations([0, 1, 2]))
def test_flipping_and_permuting_axes_changes_no_number(seed, flip, order):
    p, r = (b.astype(int) for b in two_blobs(seed))
    moved = [np.flip(a, flip).transpose(order) for a in (p, r)]
    spacing = tuple(SPACING[o] for o in order)
    before = metrics.score(p, r, spacing=SPACING, names={1: "x"})["x"]
    after = metrics.score(*moved, spacing=spacing, names={1: "x"})["x"]
    for metric in metrics.METRICS:
        assert getattr(before, metric) == pytest.approx(getattr(after, metric), abs=1e-5, nan_ok=True)


def test_permuting_label_values_permutes_the_scores():
    p, r = two_blobs(5)
    label, other = np.where(r, 1, 2), np.where(p, 1, 2)
    straight = metrics.score(other, label, spacing=SPACING, names={1: "in", 2: "out"})
    swapped = metrics.score(3 - other, 3 - label, spacing=SPACING, names={2: "in", 1: "out"})
    assert straight == swapped


def test_absent_missed_and_extra_labels_follow_the_stated_rule():
    empty, full = np.zeros((4, 4, 4), int), np.zeros((4, 4, 4), int)
    full[1:3, 1:3, 1:3] = 1
    judge = lambda p, r: metrics.score(p, r, spacing=SPACING, names={1: "x"})["x"]  # noqa: E731
    absent, missed, extra = judge(empty, empty), judge(empty, full), judge(full, empty)
    assert (absent.status, missed.status, extra.status) == ("absent", "missed", "extra")
    assert math.isnan(absent.dice)
    assert (missed.dice, missed.surface_dice, missed.volume_error) == (0, 0, 1)
    assert (extra.dice, extra.surface_dice) == (0, 0)
    assert all(math.isnan(v) for v in (missed.hd95_mm, extra.assd_mm, extra.volume_error))
    assert missed.reference_ml == extra.volume_ml == pytest.approx(8 * 0.8 * 1.5 * 3 / 1000)


def test_ignored_voxels_are_not_judged():
    reference = np.zeros((8, 8, 8), np.uint16)
    reference[2:6, 2:6, 2:6] = 1
    prediction = reference.copy()
    prediction[:, :, 4:] = 0
    reference[:, :, 4:] = IGNORE
    assert metrics.score(prediction, reference, spacing=SPACING, names={1: "x"})["x"].dice == 1


def test_inputs_are_not_changed():
    p, r = (b.astype(np.uint16) for b in two_blobs())
    r[0] = IGNORE
    before = p.copy(), r.copy()
    metrics.score(p, r, spacing=SPACING, names={1: "x"})
    assert (p == before[0]).all()
    assert (r == before[1]).all()


def test_score_refuses_two_grids():
    with pytest.raises(GeometryError, match=r"\(4, 4, 4\) against \(4, 4, 5\)"):
        metrics.score(np.zeros((4, 4, 4), int), np.zeros((4, 4, 5), int), spacing=SPACING, names={1: "x"})
