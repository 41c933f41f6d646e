"""What the data decide."""

import dataclasses

import numpy as np
import pytest
from phantom import NAMES, phantom

from fewscan.errors import DataError
from fewscan.learn import symmetry
from fewscan.learn.config import Settings
from fewscan.learn.intensity import normalise
from fewscan.learn.plan import class_weights, coarsen, derive, plan_from_dict, shape_network, to_index
from fewscan.space.geometry import Geometry
from fewscan.space.volume import IGNORE, Case, Labelmap, Volume


def case(seed=0, *, spacing=(1.0, 1.0, 1.0), shape=(20, 24, 18), scale=1.0, shift=0.0):
    image, label, geometry = phantom(seed, shape=shape, spacing=spacing)
    data = (image * scale + shift)[None]
    return Case(str(seed), Volume(data, geometry, geometry), Labelmap(label.astype(np.uint16), geometry, NAMES))


def plan_of(cases, **changes):
    given = {"names": NAMES, "channels": ("image",), "modality": "mr", "settings": Settings(), "gpu": False}
    return derive(cases, **given | changes)


def test_a_small_scan_is_one_patch():
    plan = plan_of([case(i) for i in range(3)])
    assert all(p >= n for p, n in zip(plan.patch, (20, 24, 18), strict=True))
    assert plan.spacing == (1.0, 1.0, 1.0)
    assert plan.batch == 1


def test_the_patch_is_a_multiple_of_the_strides_and_within_budget():
    cases = [
        ((300, 300, 40), (0.8, 0.8, 5)),
        ((512, 512, 600), (0.7, 0.7, 1)),
        ((37, 54, 39), (1, 1, 1)),
        ((128, 128, 36), (2.5, 2.5, 7.7)),
        ((160, 160, 10), (1.5, 1.5, 10)),
        ((9, 300, 300), (4, 1, 1)),
    ]
    for extent, spacing in cases:
        patch, kernels, strides = shape_network(
            np.array(extent, float), np.array(spacing, float), voxels=150_000, levels=5
        )
        total = np.prod(np.array(strides), axis=0)
        assert (np.array(patch) % total == 0).all()
        assert np.prod(patch) < 1.6 * 150_000
        assert len(kernels) == len(strides) <= 5
        assert (np.array(patch) / total >= 3).all() or min(extent) < 8


def test_thick_slices_are_halved_last():
    _, kernels, strides = shape_network(np.array([128.0, 128, 36]), np.array([2.5, 2.5, 7.7]), voxels=150_000, levels=5)
    assert strides[1] == (2, 2, 1)
    assert kernels[0] == (3, 3, 1)
    assert kernels[-1] == (3, 3, 3)


def test_the_working_grid_of_a_large_scan_is_coarser_but_not_where_it_is_coarse_already():
    spacing = coarsen(np.array([0.7, 0.7, 5.0]), np.array([360.0, 360, 600]), most=4.8e6)
    assert spacing[0] == spacing[1] > 0.7
    assert spacing[2] == 5.0


def test_a_plan_survives_json():
    plan = plan_of([case()])
    import json

    again = plan_from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan


def test_normalisation_does_not_depend_on_scanner_units():
    plan = plan_of([case()])
    a = normalise(case().image.data, plan.scaling)
    b = normalise(case(scale=1700.0, shift=-5.0).image.data, plan.scaling)
    np.testing.assert_allclose(a, b, atol=2e-3)
    assert abs(a.mean()) < 1e-3
    assert abs(a.std() - 1) < 1e-2


def test_ct_is_recognised_by_air_and_scaled_by_tissue():
    air = case()
    air.image.data[:, :, 12:] = -1000
    plan = plan_of([air], modality="other")
    assert plan.scaling[0].kind == "ct"
    one, two = normalise(air.image.data, plan.scaling), normalise(air.image.data + 50, plan.scaling)
    assert not np.allclose(one, two)


def test_a_constant_background_does_not_count():
    bright = case()
    bare = normalise(bright.image.data[:, :, 4:], plan_of([bright]).scaling)
    padded = bright.image.data.copy()
    padded[:, :, :10] = 0
    inside = normalise(padded, plan_of([bright]).scaling)[:, :, 12:]
    assert abs(inside.mean() - bare[:, :, 8:].mean()) < 0.3


def test_label_values_become_indices_in_order():
    label = np.array([[[0, 5, 9, IGNORE, 7]]], np.uint16)
    assert to_index(label, {5: "a", 9: "b"}).tolist() == [[[0, 1, 2, -1, 0]]]


def test_no_case_is_said_plainly():
    with pytest.raises(DataError, match="no case to learn from"):
        plan_of([])


def brain(seed, *, names):
    """Two balls on either side of the midline of a symmetric head."""
    shape = (32, 24, 20)
    x, y, z = np.indices(shape)
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint16)
    for value, centre in ((1, 9), (2, 22)):
        label[(x - centre) ** 2 + (y - 12) ** 2 + (z - 10) ** 2 < 20] = value
    head = ((x - 15.5) / 15) ** 2 + ((y - 12) / 11) ** 2 + ((z - 10) / 9) ** 2 < 1
    image = 100.0 * head + 60 * (label > 0) + rng.normal(0, 3, shape)
    geometry = Geometry(shape, np.eye(4))
    return Case(str(seed), Volume(image[None].astype(np.float32), geometry, geometry), Labelmap(label, geometry, names))


def test_symmetric_anatomy_is_mirrored_and_its_sides_are_paired():
    for names in ({1: "left ball", 2: "right ball"}, {1: "one", 2: "other"}):
        plan = plan_of([brain(i, names=names) for i in range(2)], names=names)
        assert plan.mirror
        assert plan.pairs == ((1, 2),)


def test_a_side_without_its_counterpart_is_never_mirrored():
    names = {1: "left ball", 2: "midline"}
    assert not plan_of([brain(0, names=names)], names=names).mirror


def test_asymmetric_anatomy_is_never_mirrored():
    assert not plan_of([case(i) for i in range(2)]).mirror


def test_unlike_images_forbid_mirroring_whatever_the_labels_say():
    unlike = symmetry.Mirrored(0.2, (0, 1))
    assert symmetry.verdict([unlike], ("ball",)) == (False, ())


def test_structures_of_two_names_are_not_exchanged_where_they_are_no_mirror_images():
    """A round chamber on one side and a slab on the other: they overlap a little, which proves nothing."""
    shape = (40, 30, 30)
    x, y, z = np.indices(shape)
    index = np.zeros(shape, np.int16)
    index[(x - 10) ** 2 + (y - 15) ** 2 + (z - 15) ** 2 < 81] = 1
    index[28:37, 20:27, 3:27] = 2
    image = np.ones(shape)
    image[0, 0, 0] = 2
    found = symmetry.examine(image, index, classes=3)
    assert set(found.partner[1:]) == {symmetry.NOWHERE}
    even = dataclasses.replace(found, likeness=0.9)
    for names in (("left ventricle", "right ventricle"), ("liver", "spleen")):
        assert symmetry.verdict([even, even], names) == (False, ())


def test_of_many_sides_a_few_may_miss_their_namesakes():
    names = tuple(f"{side} part {i}" for i in range(6) for side in ("left", "right"))
    pairs = tuple((2 * i + 1, 2 * i + 2) for i in range(6))
    whole = [0, *(k for a, b in pairs for k in (b, a))]
    midline, thin = [*whole[:11], 11, 12], [*whole[:11], 0, 0]
    for partner in (whole, midline, thin):
        assert symmetry.verdict([symmetry.Mirrored(0.9, tuple(partner))], names) == (True, pairs)
    astray = [0, 1, 2, 3, 4, *whole[5:]]
    assert symmetry.verdict([symmetry.Mirrored(0.9, tuple(astray))], names) == (False, ())


@pytest.mark.parametrize(
    ("names", "mirrored"),
    [
        (("vertebrae_L1", "vertebrae_L2"), True),
        (("rib_L1", "rib_R1"), True),
        (("kidney_l", "other"), False),
        (("left kidney", "other"), False),
        (("kidney L", "kidney R"), True),
    ],
)
def test_a_letter_is_a_side_where_it_is_written_as_one(names, mirrored):
    partner = (0, 2, 1) if names[1][-2:].lower() in ("r1", " r") else (0, 1, 2)
    assert symmetry.verdict([symmetry.Mirrored(0.9, partner)], names)[0] is mirrored


def test_pieces_left_out_of_sparse_labels_prove_nothing():
    whole, sparse = case(), case()
    assert plan_of([whole]).sole == (1, 2)
    data = sparse.label.data.copy()
    data[:, :, ::2] = IGNORE
    sparse = dataclasses.replace(sparse, label=Labelmap(data, sparse.label.geometry, NAMES))
    assert plan_of([sparse]).sole == ()


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_a_slab_of_a_few_slices_still_gets_a_deep_network(depth):
    _, kernels, strides = shape_network(np.array([200.0, 200, depth]), np.ones(3), voxels=150_000, levels=5)
    assert len(strides) == 5
    assert kernels[-1][:2] == (3, 3)
    assert all(s[2] == 1 for s in strides) or depth >= 8


def test_many_labels_weigh_by_volume_and_few_do_not():
    assert class_weights(np.array([1000, 10, 10])) == ()
    counts = np.array([100_000, *[1000] * 5, *[10] * 5])
    weights = class_weights(counts)
    assert weights[0] < weights[1] < weights[-1]
    share = counts / counts.sum()
    assert (share * np.array(weights)).sum() == pytest.approx(1, abs=1e-3)


def test_a_large_structure_is_mirrored_about_its_own_middle():
    index = np.zeros((150, 6, 6), np.int16)
    index[10:140, 1:5, 1:5] = 1  # looked at in steps, of which the last is not the edge
    index[30:32, 2:4, 2:4], index[118:120, 2:4, 2:4] = 2, 3
    image = np.arange(150.0)[:, None, None] * np.ones((1, 6, 6))
    assert symmetry.examine(image[None][0], index, classes=4).partner[2:] == (3, 2)
