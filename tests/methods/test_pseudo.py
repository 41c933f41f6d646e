"""Pseudo-labels: who is worth more has more to say, and what nobody looked at stays unknown."""

import numpy as np
import pytest
import torch
from phantom import SMALL, write_dataset

from fewscan import api
from fewscan.learn.registrar import Registrar
from fewscan.methods import pseudo, register, segment
from fewscan.methods.pseudo import FULL, LABELLING, Labeller, fused, mean_dice, vote_weights
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
def test_weights_sum_to_one_and_the_segmenters_grows_with_agreement(worth):
    weights = [vote_weights(worth, agreement) for agreement in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert all(abs(a + b - 1) < 1e-9 and min(a, b) >= 0 for a, b in weights)
    assert [b for _, b in weights] == sorted(b for _, b in weights)


def test_a_segmenter_that_disagrees_with_good_atlases_has_no_say():
    assert vote_weights(0.85, 0.4)[1] == 0.0
    assert vote_weights(0.7, 0.68)[1] > 0.7
    assert vote_weights(0.4, 0.1) == (0.5, 0.5)  # neither is better than a coin


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

            made = Labeller(session, cases, registrar=registrar.eval(), predictor=sceptic, count=1)
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
        trust = made.trust(session.unlabelled)
        again = made.draft(session.unlabelled[0])
        return {"trust": trust, "vote": again.vote, "nearest": again.nearest, "left": dict(made.kept)}

    found = labeller(ask)
    assert [(one, others) for one, others in seen if one in others] == []
    assert sorted(len(others) for _, others in seen) == [1, 1, 2]
    assert found["trust"][1] == 0.0  # a segmenter that sees nothing
    assert found["left"] == {}  # drafts are large, and given away when asked for
    label, sure = found["vote"]
    assert label.shape == sure.shape == tuple(found["nearest"].image.shape[1:])
    assert set(np.unique(label)) <= {0, 1, 2, IGNORE}


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

    labeller(ask, budget=20)
    assert efforts == [FULL, FULL, FULL, "quick"]
