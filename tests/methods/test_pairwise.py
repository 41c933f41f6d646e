"""One pair: the affine part finds the pose, the deformable part the shape; odd input gets a sentence."""

import numpy as np
import pytest
import torch
from phantom import phantom

from fewscan.errors import ConfigError, DataError
from fewscan.judge.metrics import dice
from fewscan.methods import pairwise
from fewscan.methods.pairwise import RegisterConfig
from fewscan.space.deformable import DeformConfig
from fewscan.space.field import from_matrix, warp_array
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Labelmap, Volume

QUICK = RegisterConfig(deform=DeformConfig(shrink=(2, 1), steps=(30, 20)))


def scan(seed, **shape):
    image, label, grid = phantom(seed, **shape)
    return Volume(image[None], grid, grid), Labelmap(label.astype(np.uint16), grid, {1: "a", 2: "b"})


def moved(volume, label, matrix):
    """The same scan under another affine: its world is turned, its voxels are the same."""
    grid = Geometry(volume.geometry.shape, matrix @ volume.geometry.affine)
    return Volume(volume.data, grid, grid), Labelmap(label.data, grid, label.names)


def overlap(found, truth):
    return np.mean([dice(found == v, truth == v) for v in (1, 2)])


def test_a_turned_copy_is_brought_back_by_a_rigid_map():
    fixed, truth = scan(0)
    angle = np.radians(12)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = (4.0, -3.0, 2.0)
    moving, label = moved(fixed, truth, matrix)
    found = pairwise.register(fixed, moving, config=RegisterConfig(transform="rigid"))
    assert overlap(pairwise.apply_labels(found, label), truth.data) > 0.93
    np.testing.assert_allclose(found.matrix, matrix, atol=0.6)
    assert found.report["similarity"]["after"] == found.report["similarity"]["affine"]


def test_another_phantom_is_deformed_onto_the_first_without_folding():
    (fixed, truth), (moving, label) = scan(0), scan(5)
    found = pairwise.register(fixed, moving, config=QUICK)
    likeness = found.report["similarity"]
    assert likeness["before"] <= likeness["affine"] + 0.02 < likeness["after"]
    before = overlap(
        pairwise.apply_labels(pairwise.register(fixed, moving, config=RegisterConfig(transform="affine")), label),
        truth.data,
    )
    assert overlap(pairwise.apply_labels(found, label), truth.data) > before
    assert found.report["folding"] < 0.001


def test_a_scan_registered_to_itself_stays_where_it_is():
    fixed, _ = scan(1)
    found = pairwise.register(fixed, fixed, config=QUICK)
    assert found.report["displacement_mm"]["mean"] < 0.3
    assert found.report["similarity"]["after"] > 0.95


def test_grids_of_other_spacing_and_a_single_slice_give_sound_answers():
    fixed, _ = scan(0)
    coarse, label = scan(2, shape=(10, 12, 6), spacing=(2.0, 2.0, 3.0))
    found = pairwise.register(fixed, coarse, config=QUICK)
    assert pairwise.apply(found, coarse).shape == (1, *fixed.geometry.shape)
    assert pairwise.apply_labels(found, label).any()
    flat = Volume(fixed.data[..., 9:10], Geometry((20, 24, 1), np.eye(4)), Geometry((20, 24, 1), np.eye(4)))
    answer = pairwise.register(flat, flat, config=QUICK)
    assert np.isfinite(answer.field.u).all()


def test_a_lesion_left_out_does_not_pull():
    fixed, _ = scan(0)
    moving = fixed
    data = fixed.data.copy()
    data[0, 8:13, 9:14, 7:11] = data.max() * 2
    ill = Volume(data, fixed.geometry, fixed.geometry)
    looked = np.ones(fixed.geometry.shape, bool)
    looked[6:15, 7:16, 5:13] = False
    with_mask = pairwise.register(ill, moving, config=QUICK, weight=looked).report["displacement_mm"]["mean"]
    without = pairwise.register(ill, moving, config=QUICK).report["displacement_mm"]["mean"]
    assert with_mask < without


def test_what_the_moving_scan_does_not_show_does_not_pull():
    fixed, _ = scan(0)
    cut = fixed.data.shape[1] // 2
    part = Geometry((cut, *fixed.geometry.shape[1:]), fixed.geometry.affine)
    found = pairwise.register(fixed, Volume(fixed.data[:, :cut], part, part), config=QUICK)
    assert np.abs(found.field.u).mean() < 0.15
    assert found.report["similarity"]["after"] > 0.95


def test_a_mask_where_the_moving_scan_shows_nothing_is_refused():
    fixed, _ = scan(0)
    cut = fixed.data.shape[1] // 2
    part = Geometry((cut, *fixed.geometry.shape[1:]), fixed.geometry.affine)
    corner = np.zeros(fixed.geometry.shape, bool)
    corner[-2:, -2:, -2:] = True
    with pytest.raises(DataError, match="shows nothing of where likeness counts"):
        pairwise.register(fixed, Volume(fixed.data[:, :cut], part, part), config=QUICK, weight=corner)


def test_inverted_contrast_is_registered_by_mi_and_by_mind():
    fixed, truth = scan(0)
    moving, label = scan(5)
    other = Volume(moving.data.max() - moving.data, moving.geometry, moving.native)
    raw = overlap(label.data, truth.data)
    for name in ("mi", "mind"):
        config = RegisterConfig(deform=DeformConfig(similarity=name, shrink=(2, 1), steps=(30, 10)))
        found = pairwise.register(fixed, other, config=config)
        assert overlap(pairwise.apply_labels(found, label), truth.data) > raw - 0.03, name
        assert found.report["folding"] < 0.01


def test_a_given_start_is_kept_when_no_step_is_allowed():
    fixed, _ = scan(0)
    shift = torch.zeros(1, 3, *fixed.geometry.shape)
    shift[:, 0] = 2
    still = RegisterConfig(deform=DeformConfig(shrink=(1,), steps=(0,)))
    found = pairwise.register(fixed, fixed, config=still, start=lambda fixed, moving: shift)
    plain = pairwise.register(fixed, fixed, config=still)
    np.testing.assert_allclose(found.field.u - plain.field.u, shift[0].numpy(), atol=1e-3)


def test_a_channel_that_is_empty_in_both_scans_tells_nothing():
    def with_empty(volume, *, first):
        empty = np.zeros_like(volume.data)
        data = np.concatenate([empty, volume.data] if first else [volume.data, empty])
        return Volume(data, volume.geometry, volume.native, ("a", "b"))

    still = RegisterConfig(transform="affine")
    fixed, moving = scan(0)[0], scan(1)[0]
    plain = pairwise.register(fixed, moving, config=still)
    for first in (True, False):
        pair = [with_empty(volume, first=first) for volume in (fixed, moving)]
        found = pairwise.register(*pair, config=still)
        np.testing.assert_allclose(found.matrix, plain.matrix, atol=1e-6)
        assert found.report["similarity"] == plain.report["similarity"]
        with pytest.raises(DataError, match="the moving scan is constant in channel"):
            pairwise.register(
                Volume(np.concatenate([fixed.data] * 2), fixed.geometry, fixed.native, ("a", "b")), pair[1]
            )
    seen = []
    config = RegisterConfig(deform=DeformConfig(shrink=(1,), steps=(0,)))

    def start(fixed, moving):
        seen.append((len(fixed), len(moving)))
        return torch.zeros(1, 3, *fixed.shape[1:])

    pairwise.register(*pair, config=config, start=start)
    assert seen == [(2, 2)]


def test_a_later_peak_that_one_scan_has_nowhere_is_left_out():
    def peaks(volume, *lengths):
        data = np.zeros((9, *volume.geometry.shape), np.float32)
        for place, length in zip((0, 4, 8), lengths, strict=True):
            data[place] = length * volume.data[0] / 100
        return Volume(data, volume.geometry, volume.native, tuple(f"c{i}" for i in range(9)), "peaks")

    still = RegisterConfig(transform="affine")
    fixed, moving = scan(0)[0], scan(1)[0]
    found = pairwise.register(peaks(fixed, 1, 0.5, 0), peaks(moving, 1, 0.5, 0.3), config=still)
    neither = pairwise.register(peaks(fixed, 1, 0.5, 0), peaks(moving, 1, 0.5, 0), config=still)
    np.testing.assert_array_equal(found.matrix, neither.matrix)
    assert found.report["similarity"] == neither.report["similarity"]
    with pytest.raises(DataError, match="the fixed scan is constant in channel 'size 1'"):
        pairwise.register(peaks(fixed, 0, 1, 0), peaks(moving, 1, 0.5, 0.3), config=still)


def test_what_cannot_be_registered_is_refused_with_a_sentence():
    fixed, _ = scan(0)
    constant = Volume(np.ones_like(fixed.data), fixed.geometry, fixed.native)
    with pytest.raises(DataError, match="moving scan is constant"):
        pairwise.register(fixed, constant)
    with pytest.raises(DataError, match="fixed scan is constant"):
        pairwise.register(constant, constant)
    with pytest.raises(DataError, match="mask of where likeness counts is empty"):
        pairwise.register(fixed, fixed, weight=np.zeros(fixed.geometry.shape, bool))
    two = Volume(np.concatenate([fixed.data] * 2), fixed.geometry, fixed.native, ("a", "b"))
    with pytest.raises(DataError, match=r"1 channel\(s\), the moving one 2"):
        pairwise.register(fixed, two)
    with pytest.raises(ConfigError, match="transform must be"):
        RegisterConfig(transform="spline")


def test_the_field_says_the_same_as_the_warped_image():
    fixed, _ = scan(0)
    matrix = np.eye(4)
    matrix[:3, 3] = (2.0, 0.0, 0.0)
    shifted = warp_array(fixed.data, fixed.geometry, field=from_matrix(matrix, fixed.geometry))
    np.testing.assert_allclose(shifted[0, :-2], fixed.data[0, 2:], atol=1e-4)
