"""Drafts: several atlases beat one, twins share a voice, atlases that fold are dropped."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from phantom import phantom

from fewscan.deliver.records import dropped
from fewscan.errors import DataError
from fewscan.judge.metrics import dice
from fewscan.methods import draft as drafts
from fewscan.methods import pairwise
from fewscan.methods.pairwise import RegisterConfig
from fewscan.methods.voting import vote_weights
from fewscan.space.combinations import combine
from fewscan.space.deformable import DeformConfig
from fewscan.space.field import from_matrix
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Case, Labelmap, Volume

QUICK = RegisterConfig(deform=DeformConfig(shrink=(2, 1), steps=(25, 10)))
CPU = torch.device("cpu")


def case(seed):
    image, label, grid = phantom(seed)
    names = {1: "a", 2: "b"}
    return Case(f"c{seed}", Volume(image[None], grid, grid), Labelmap(label.astype(np.uint16), grid, names))


def test_a_draft_names_its_atlases_and_overlaps_with_the_truth():
    target, atlases = case(0), [case(5), case(6)]
    found = drafts.draft(target.image, atlases, config=QUICK, device=CPU)
    truth = target.label.data
    assert np.mean([dice(found.label == v, truth == v) for v in (1, 2)]) > 0.75
    assert set(found.atlases) == {"c5", "c6"}
    assert all(row["voted"] for row in found.atlases.values())
    assert found.sure.min() >= 0
    assert found.sure.max() <= 1 + 1e-5


@pytest.mark.parametrize("fusion", ["local", "joint", "majority"])
def test_weights_sum_to_one(fusion):
    scan, atlases = torch.randn(1, 6, 7, 8), torch.randn(3, 6, 7, 8)
    weights = vote_weights(scan, atlases, fusion=fusion)
    torch.testing.assert_close(weights.sum(0), torch.ones(6, 7, 8))
    assert float(weights.min()) >= 0


def test_the_atlas_that_looks_like_the_scan_counts_most():
    scan = torch.randn(1, 8, 8, 8)
    atlases = torch.cat([scan + 0.1 * torch.randn(1, 8, 8, 8), torch.randn(2, 8, 8, 8)])
    for fusion in ("local", "joint"):
        weights = vote_weights(scan, atlases, fusion=fusion).mean((1, 2, 3))
        assert float(weights[0]) > 0.8, fusion


def test_twins_share_a_voice_in_joint_fusion():
    torch.manual_seed(0)
    scan = torch.zeros(1, 10, 10, 10)
    one, other = torch.randn(1, 10, 10, 10), torch.randn(1, 10, 10, 10)
    weights = vote_weights(scan, torch.cat([one, one, other]), fusion="joint").mean((1, 2, 3))
    assert float(weights[2]) > 1.5 * float(weights[0])


def test_atlases_that_fold_are_dropped(monkeypatch):
    monkeypatch.setattr(drafts, "MOST_FOLDING", -1.0)
    with pytest.raises(DataError, match="all 1 atlases fold"):
        drafts.draft(case(0).image, [case(5)], config=QUICK, device=CPU)


def test_an_atlas_that_cannot_be_registered_costs_nobody_the_draft(monkeypatch):
    flat = case(3)
    flat = replace(flat, id="flat", image=replace(flat.image, data=np.ones_like(flat.image.data)))
    found = drafts.draft(case(0).image, [case(5), flat], config=QUICK, device=CPU)
    assert found.atlases["flat"]["voted"] is False
    assert "constant" in found.atlases["flat"]["reason"]
    assert found.label.any()
    assert dropped({"atlases": found.atlases}) == {"flat": found.atlases["flat"]["reason"]}
    with pytest.raises(DataError, match="moving scan is constant"):
        drafts.draft(case(0).image, [flat], config=QUICK, device=CPU)
    monkeypatch.setattr(drafts, "MOST_FOLDING", -1.0)
    with pytest.raises(DataError, match="1 of 2 atlases fold on this scan, and the others could not be registered"):
        drafts.draft(case(0).image, [case(5), flat], config=QUICK, device=CPU)


@pytest.mark.parametrize("overlapping", [False, True])
def test_beyond_its_field_of_view_an_atlas_has_no_vote(monkeypatch, overlapping):
    whole = case(0)
    grid, names = whole.image.geometry, whole.label.names
    if overlapping:
        data, table = combine((whole.label.data == v for v in names), grid.shape)
        whole = replace(whole, label=Labelmap(data, grid, names, table))

    def unmoved(fixed, moving, **how):
        report = {"folding": 0.0, "similarity": {"after": 1.0}}
        return pairwise.Registration(from_matrix(np.eye(4), fixed.geometry), np.eye(4), report)

    monkeypatch.setattr(drafts.pairwise, "register", unmoved)
    part = Geometry((10, *grid.shape[1:]), grid.affine)
    image = Volume(whole.image.data[:, :10], part, part)
    label = replace(whole.label, data=whole.label.data[:10], geometry=part)
    halves = [Case(name, image, label) for name in ("left", "also left")]
    assert whole.label.data[11:].any()
    found = drafts.draft(whole.image, [whole, *halves], config=QUICK, device=CPU, fusion="majority")
    for i, value in enumerate(names):
        mask = found.label[i] if found.overlapping else found.label == value
        np.testing.assert_array_equal(mask, whole.label.mask(value))
    alone = drafts.draft(whole.image, halves, config=QUICK, device=CPU, fusion="majority")
    assert not alone.sure[11:].any()
    assert alone.sure[:9].min() > 0.9
    moved = pairwise.apply_labels(unmoved(whole.image, part), halves[0].label)
    assert not moved[11:].any()  # as a file it holds background there


def test_no_atlas_is_refused():
    with pytest.raises(DataError, match="no labelled case"):
        drafts.draft(case(0).image, [], config=QUICK, device=CPU)


def test_what_nobody_looked_at_never_wins_and_undrawn_labels_are_no_background():
    target, other = case(0), case(5)
    sparse = other.label.data.copy()
    sparse[..., ::2] = 65535
    blank = Case("sparse", other.image, Labelmap(sparse, other.image.geometry, {1: "a", 2: "b"}))
    found = drafts.draft(target.image, [blank], config=QUICK, device=CPU)
    assert set(np.unique(found.label)) <= {0, 1, 2}
    only_ball = Case("c6", case(6).image, Labelmap(np.where(case(6).label.data == 1, 1, 0).astype(np.uint16),
                     case(6).image.geometry, {1: "a", 2: "b"}), frozenset({1}))  # fmt: skip
    both = drafts.draft(target.image, [other, only_ball], config=QUICK, device=CPU, fusion="majority")
    truth = target.label.data
    assert dice(both.label == 2, truth == 2) > 0.5


def test_across_modalities_votes_do_not_go_by_intensity():
    """The atlas with the right labels looks least like the scan by intensity: its contrast is inverted."""
    target = case(0)
    grid, names = target.image.geometry, target.label.names
    inverted = Case("right", replace(target.image, data=300 - target.image.data), target.label)
    rng = np.random.default_rng(0)
    shift = np.roll(target.label.data, 6, axis=0)
    noisy = target.image.data + rng.normal(0, 3, target.image.data.shape).astype(np.float32)
    wrong = Case("wrong", replace(target.image, data=noisy), Labelmap(shift, grid, names))

    def unmoved(fixed, moving, **how):
        report = {"folding": 0.0, "similarity": {"after": 1.0}}
        return pairwise.Registration(from_matrix(np.eye(4), fixed.geometry), np.eye(4), report)

    def drafted(similarity):
        config = RegisterConfig(deform=DeformConfig(similarity=similarity))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drafts.pairwise, "register", unmoved)
            atlases = [inverted, replace(inverted, id="right too"), wrong]
            return drafts.draft(target.image, atlases, config=config, device=CPU, fusion="local").label

    np.testing.assert_array_equal(drafted("lncc"), shift)
    for similarity in ("mi", "mind"):
        np.testing.assert_array_equal(drafted(similarity), target.label.data)


@pytest.mark.parametrize("similarity", ["mi", "mind"])
def test_the_most_alike_across_modalities_are_told_by_the_similarity_of_the_registration(similarity):
    scan = case(4)
    folded = replace(scan.image, data=np.abs(scan.image.data - 105).astype(np.float32))  # no line maps one to the other
    pool = [case(seed) for seed in (1, 2, 3)] + [replace(scan, id="same", image=folded)]
    assert drafts.nearest(scan.image, pool, most=1, similarity=similarity)[0].id == "same"


def test_many_atlases_are_narrowed_to_the_most_alike():
    pool = [case(seed) for seed in range(1, 12)]
    chosen = drafts.nearest(pool[4].image, pool, most=3)
    assert len(chosen) == 3
    assert chosen[0] is pool[4]
