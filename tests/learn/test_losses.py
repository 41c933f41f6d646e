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


def overlapping(*, seen=None):
    masks = (torch.rand(2, 3, 5, 5, 5) > 0.5).float()
    seen = torch.ones(2, 1, 5, 5, 5) if seen is None else seen
    return torch.cat([seen, masks * seen], 1)


def test_overlapping_labels_are_judged_one_by_one():
    target = overlapping()
    good, bad = sigmoid_terms(target * 40 - 20, target), sigmoid_terms(20 - target * 40, target)
    assert all(good[name] < 0.01 for name in good)
    assert bad["cross_entropy"] > 10
    one = LOGITS.clone()
    one[:, 2] = 5.0
    alone = [sigmoid_terms(z[:, [0, 1]], target[:, [0, 1]])["cross_entropy"] for z in (LOGITS, one)]
    assert alone[0] == alone[1]  # what is said of one label is no matter of another


def test_overlapping_cross_entropy_is_the_sum_of_torchs():
    target = overlapping()
    naive = sum(F.binary_cross_entropy_with_logits(LOGITS[:, k], target[:, k]) for k in (1, 2, 3))
    torch.testing.assert_close(sigmoid_terms(LOGITS, target)["cross_entropy"], naive)


def test_the_first_channel_of_overlapping_labels_means_nothing():
    logits, target = LOGITS.clone().requires_grad_(), overlapping()
    sum(sigmoid_terms(logits, target).values()).backward()
    assert logits.grad[:, 0].abs().max() == 0
    assert logits.grad[:, 1:].abs().min() > 0


def test_overlapping_labels_are_not_seen_where_nobody_looked():
    seen = torch.ones(2, 1, 5, 5, 5)
    seen[..., 3:] = 0
    target, other = overlapping(seen=seen), LOGITS.clone()
    other[..., 3:] += 5
    for name, term in sigmoid_terms(LOGITS, target).items():
        torch.testing.assert_close(term, sigmoid_terms(other, target)[name])


def test_an_overlapping_label_that_was_not_drawn_does_not_count():
    drawn = torch.tensor([[True, True, False, True], [True, True, True, True]])
    target, other = overlapping(), LOGITS.clone()
    other[0, 2] += 5
    for name, term in sigmoid_terms(LOGITS, target, drawn=drawn).items():
        torch.testing.assert_close(term, sigmoid_terms(other, target, drawn=drawn)[name])
    other[1, 2] += 5
    assert sigmoid_terms(other, target, drawn=drawn)["dice"] != sigmoid_terms(LOGITS, target, drawn=drawn)["dice"]


def test_an_overlapping_label_that_is_not_there_has_no_dice():
    target, other = overlapping(), LOGITS.clone()
    target[:, 2] = 0
    other[:, 2] += 5
    ours, theirs = sigmoid_terms(LOGITS, target), sigmoid_terms(other, target)
    torch.testing.assert_close(ours["dice"], theirs["dice"])
    assert theirs["cross_entropy"] > ours["cross_entropy"]


@pytest.mark.parametrize("term", [cross_entropy, lambda a, b: soft_dice(a.exp(), b)])
def test_gradients_agree_with_finite_differences(term):
    logits = torch.randn(1, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    target = F.one_hot(torch.randint(0, 3, (1, 2, 2, 2)), 3).permute(0, 4, 1, 2, 3).double()
    assert torch.autograd.gradcheck(lambda z: term(F.log_softmax(z, 1), target), logits)


def test_weighted_cross_entropy_equals_torchs():
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    ours = cross_entropy(log_probs(LOGITS), TARGET, weights=weights)
    torch.testing.assert_close(ours, F.cross_entropy(LOGITS, INDEX, weight=weights))
