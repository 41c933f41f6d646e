"""The loss sees only what was labelled."""

import pytest
import torch
import torch.nn.functional as F

from fewscan.learn.losses import cross_entropy, log_probs, sigmoid_terms, soft_dice

torch.manual_seed(0)
LOGITS = torch.randn(2, 4, 5, 5, 5)
INDEX = torch.randint(0, 4, (2, 5, 5, 5))
TARGET = F.one_hot(INDEX, 4).permute(0, 4, 1, 2, 3).float()


def test_cross_entropy_equals_torchs():
    ours = cross_entropy(log_probs(LOGITS), TARGET)
    torch.testing.assert_close(ours, F.cross_entropy(LOGITS, INDEX))


def test_voxels_nobody_looked_at_do_not_count():
    blind = TARGET.clone()
    blind[..., 3:] = 0
    other = LOGITS.clone()
    other[..., 3:] += torch.randn(2, 4, 5, 5, 2) * 5
    for term in (lambda z: cross_entropy(log_probs(z), blind), lambda z: soft_dice(log_probs(z).exp(), blind)):
        torch.testing.assert_close(term(LOGITS), term(other))


def test_labels_nobody_looked_for_count_as_background():
    drawn = torch.tensor([[True, True, False, True]] * 2)
    log_p = log_probs(LOGITS, drawn)
    probs = LOGITS.softmax(1)
    torch.testing.assert_close(log_p[:, 0].exp(), probs[:, 0] + probs[:, 2])
    torch.testing.assert_close(log_p[:, 1].exp(), probs[:, 1])
    assert torch.isneginf(log_p[:, 2]).all()
    target = TARGET.clone()
    target[:, 0] += target[:, 2]
    target[:, 2] = 0
    logits = LOGITS.clone().requires_grad_()
    merged = log_probs(logits, drawn)
    (cross_entropy(merged, target) + soft_dice(merged.exp(), target)).backward()
    assert torch.isfinite(logits.grad).all()


def test_a_perfect_answer_costs_nothing():
    sure = TARGET * 60 - 30
    assert cross_entropy(log_probs(sure), TARGET).item() == pytest.approx(0, abs=1e-6)
    assert soft_dice(log_probs(sure).exp(), TARGET).item() == pytest.approx(0, abs=1e-6)


def test_a_class_that_is_not_there_has_no_dice():
    empty = torch.zeros_like(TARGET)
    empty[:, 0] = 1
    assert soft_dice(LOGITS.softmax(1), empty).item() == 0


def test_dice_equals_the_naive_loop():
    probs = LOGITS.softmax(1)
    naive = []
    for k in range(1, 4):
        p, t = probs[:, k], TARGET[:, k]
        naive.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    torch.testing.assert_close(soft_dice(probs, TARGET), torch.stack(naive).mean())


def test_overlapping_labels_are_judged_one_by_one():
    seen = torch.ones(2, 1, 5, 5, 5)
    masks = (torch.rand(2, 4, 5, 5, 5) > 0.5).float()
    good = sigmoid_terms(masks * 40 - 20, masks, seen=seen)
    bad = sigmoid_terms(20 - masks * 40, masks, seen=seen)
    assert all(good[name] < 0.01 for name in good)
    assert bad["cross_entropy"] > 10


@pytest.mark.parametrize("term", [cross_entropy, lambda a, b: soft_dice(a.exp(), b)])
def test_gradients_agree_with_finite_differences(term):
    logits = torch.randn(1, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    target = F.one_hot(torch.randint(0, 3, (1, 2, 2, 2)), 3).permute(0, 4, 1, 2, 3).double()
    assert torch.autograd.gradcheck(lambda z: term(F.log_softmax(z, 1), target), logits)


def test_weighted_cross_entropy_equals_torchs():
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    ours = cross_entropy(log_probs(LOGITS), TARGET, weights=weights)
    torch.testing.assert_close(ours, F.cross_entropy(LOGITS, INDEX, weight=weights))
