"""Drafts: several atlases beat one, twins share a voice, atlases that fold are dropped."""

import numpy as np
import pytest
import torch
from phantom import phantom

from fewscan.errors import DataError
from fewscan.judge.metrics import dice
from fewscan.methods import draft as drafts
from fewscan.methods.pairwise import RegisterConfig
from fewscan.space.deformable import DeformConfig
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
    weights = drafts.vote_weights(scan, atlases, fusion=fusion)
    torch.testing.assert_close(weights.sum(0), torch.ones(6, 7, 8))
    assert float(weights.min()) >= 0


def test_the_atlas_that_looks_like_the_scan_counts_most():
    scan = torch.randn(1, 8, 8, 8)
    atlases = torch.cat([scan + 0.1 * torch.randn(1, 8, 8, 8), torch.randn(2, 8, 8, 8)])
    for fusion in ("local", "joint"):
        weights = drafts.vote_weights(scan, atlases, fusion=fusion).mean((1, 2, 3))
        assert float(weights[0]) > 0.8, fusion


def test_twins_share_a_voice_in_joint_fusion():
    torch.manual_seed(0)
    scan = torch.zeros(1, 10, 10, 10)
    one, other = torch.randn(1, 10, 10, 10), torch.randn(1, 10, 10, 10)
    weights = drafts.vote_weights(scan, torch.cat([one, one, other]), fusion="joint").mean((1, 2, 3))
    assert float(weights[2]) > 1.5 * float(weights[0])


def test_atlases_that_fold_are_dropped(monkeypatch):
    monkeypatch.setattr(drafts, "MOST_FOLDING", -1.0)
    with pytest.raises(DataError, match="all 1 atlases fold"):
        drafts.draft(case(0).image, [case(5)], config=QUICK, device=CPU)


def test_no_atlas_is_refused():
    with pytest.raises(DataError, match="no labelled case"):
        drafts.draft(case(0).image, [], config=QUICK, device=CPU)
