"""Pseudo-labels: who is worth more has more to say, and what nobody looked at stays unknown."""

import numpy as np
import pytest
import torch
from phantom import SMALL, write_dataset

from fewscan import api
from fewscan.learn.registrar import Registrar
from fewscan.methods import pseudo, register, segment
from fewscan.methods.pseudo import ALONE, BEST, FULL, LABELLING, Labeller, Rating, fused, mean_dice
from fewscan.space.volume import IGNORE

TINY = SMALL | {"pair.widths": "8,8,8"}


def test_dice_of_label_maps_counts_what_occurs_in_either():
    a = torch.zeros(4, 4, 4, dtype=torch.int64)
    b = a.clone()
    assert mean_dice(a, b) == 1.0
    a[0], b[1] = 1, 1
    assert mean_dice(a, b) == 0.0
    assert mean_dice(a, a) == 1.0
    assert np.isclose(mean_dice(torch.where(a > 0, 2, 0), a), 0.0)


@pytest.mark.parametrize("worth", [0.3, 0.6, 0.8, 0.93, 1.0])
def test_weights_sum_to_one_and_the_segmenters_grows_with_its_worth(worth):
    weights = [Rating(worth, mine, 0.0, assumed=False).weights for mine in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert all(abs(a + b - 1) < 1e-9 and min(a, b) >= 0 for a, b in weights)
    assert [b for _, b in weights] == sorted(b for _, b in weights)
    assert Rating(0.4, 0.1, 0.0, assumed=False).weights == (0.5, 0.5)  # neither is better than a coin


def test_the_fused_vote_follows_the_weights_and_knows_what_it_does_not():
    label = np.array([1, 1, 2, IGNORE, 1], np.uint16).reshape(5, 1, 1)
    sure = np.array([1.0, 0.9, 0.6, 0.0, 0.4], np.float32).reshape(5, 1, 1)
    belief = torch.tensor([[0.1, 0.9, 0.1], [0.9, 0.1, 0.0], [0.5, 0.4, 0.1], [1, 0, 0], [0.4, 0.3, 0.3]]).T
    belief = belief.reshape(3, 5, 1, 1)
    keep = belief.clone()
    assert fused(label, sure, belief=None, trust=(1.0, 0.0)).ravel().tolist() == [1, 1, 2, -1, -1]
    assert fused(label, sure, belief=belief, trust=(0.9, 0.1)).ravel().tolist() == [1, 1, 2, -1, -1]
    assert fused(label, sure, belief=belief, trust=(0.1, 0.9)).ravel().tolist() == [1, 0, -1, -1, -1]
    assert torch.equal(belief, keep)


@pytest.fixture
def labeller(tmp_path, monkeypatch):
    """Of a run that has two labelled scans and one without, and no training behind it."""
    found = {}

    def run(request):
        from fewscan.learn.session import open_session

        with open_session(request, unlabelled=9) as session:
            registrar = register.build(session)
            cases = register.wholes(session, registrar)
            network = segment.phase(session)
            state = session.fit([network])

            def sceptic(x):
                out = torch.zeros(len(x), session.plan.classes, *x.shape[2:])
                out[:, 0] = 9.0
                return out

            made = Labeller(session, cases, path=lambda name: tmp_path / name)
            made.begin(registrar.eval(), sceptic, count=1)
            found.update(call(made, session))
            return session.finish(state.average_of(network.train))

    def use(function, **limits):
        nonlocal call
        call = function
        monkeypatch.setitem(api.METHODS, "segment", run)
        data = write_dataset(tmp_path / "data", labelled=2, unlabelled=1)
        api.train(data, tmp_path / "model", settings=TINY, device="cpu", method="segment", **(limits or {"steps": 1}))
        return found

    call = None
    return use


def test_a_labelled_scan_is_drafted_from_the_others_only(labeller, monkeypatch):
    seen = []
    real = pseudo.draft.shaped

    def spy(scan, atlases, **kwargs):
        seen.append((scan.id, [atlas.id for atlas in atlases]))
        return real(scan, atlases, **kwargs)

    monkeypatch.setattr(pseudo.draft, "shaped", spy)

    def ask(made, session):
        assert isinstance(made.registrar, Registrar)
        rating = made.rating(session.unlabelled)
        again = made.draft(session.unlabelled[0])
        return {"rating": rating, "vote": again.vote, "nearest": again.nearest}

    found = labeller(ask)
    assert [(one, others) for one, others in seen if one in others] == []
    assert sorted(len(others) for _, others in seen) == [1, 1, 2]  # what was drafted once is read from disk
    rating = found["rating"]
    assert (rating.segmenter, rating.agreement, rating.assumed) == (0.0, 0.0, False)  # a segmenter that sees nothing
    assert 0.3 < rating.atlases <= 1
    assert rating.weights == (1.0, 0.0)
    label, sure = found["vote"]
    assert label.shape == sure.shape == tuple(found["nearest"].image.shape[1:])
    assert set(np.unique(label)) <= {0, 1, 2, IGNORE}


def test_with_one_labelled_scan_the_worth_of_the_atlas_is_assumed_and_said(labeller, monkeypatch):
    def ask(made, session):
        made.session.labelled = made.session.labelled[:1]
        drafted = made.draft(session.unlabelled[0])
        agreeing = torch.nn.functional.one_hot(torch.from_numpy(drafted.vote[0].astype(np.int64)) % 3, 3).movedim(-1, 0)
        monkeypatch.setattr(made, "belief", lambda case: agreeing)
        return {"rating": made.rating(session.unlabelled)}

    rating = labeller(ask)["rating"]
    assert rating.atlases == ALONE
    assert rating.segmenter == BEST
    assert "(assumed)" in str(rating)


def test_atlases_are_deformed_in_earnest_where_the_budget_allows(labeller, monkeypatch):
    efforts = []
    monkeypatch.setattr(pseudo.draft, "shaped", lambda *args, config, **kwargs: efforts.append(config) or [])

    def ask(made, session):
        made.draft(session.unlabelled[0])
        made.draft(session.unlabelled[0])
        monkeypatch.setattr(Labeller, "spent", lambda self: len(efforts) * LABELLING)
        made.measured = False
        made.effort = "quick"
        made.draft(session.unlabelled[0])
        made.draft(session.unlabelled[0])
        return {}

    labeller(ask, budget=5)
    assert efforts == [FULL, FULL, FULL, "quick"]


def test_harmony_is_the_mean_dice_of_pairs_where_both_looked():
    one = np.array([[[0, 1, 1, 2]]], np.int16)
    other = np.array([[[0, 1, 0, 2]]], np.int16)
    assert pseudo.harmony([one, one, one], classes=3) == 1
    assert pseudo.harmony([one, other], classes=3) == pytest.approx((2 / 3 + 1) / 2)
    assert pseudo.harmony([one, np.where(other == 0, -1, other)], classes=3) == 1
    assert pseudo.harmony([np.zeros_like(one)] * 2, classes=3) == 1
    assert np.isnan(pseudo.harmony([one], classes=3))


def test_scans_on_which_the_atlases_contradict_each_other_are_not_believed(labeller):
    def ask(made, session):
        made.rating(session.unlabelled)
        alone = made.least  # one atlas is left for each of two labelled scans: nothing to compare
        drafted = made.draft(session.unlabelled[0])
        made.least = 0.7
        return {"alone": alone, "believed": [made.believed(drafted._replace(harmony=h)) for h in (0.69, 0.71, np.nan)]}

    found = labeller(ask)
    assert np.isnan(found["alone"])
    assert found["believed"] == [False, True, True]
