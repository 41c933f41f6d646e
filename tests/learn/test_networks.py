"""What every network and every loss must keep to; a new one in the list inherits all of it."""

import pytest
import torch

from fewscan.errors import ConfigError
from fewscan.learn import losses
from fewscan.learn.networks import NETWORKS, build

SHAPE = {
    "widths": (4, 8, 8),
    "kernels": [(3, 3, 1), (3, 3, 3), (3, 3, 3)],
    "strides": [(1, 1, 1), (2, 2, 1), (2, 2, 2)],
}
LOSSES = {  # the terms a method can name
    "cross_entropy": lambda logits, target: losses.cross_entropy(losses.log_probs(logits), target),
    "soft_dice": lambda logits, target: losses.soft_dice(losses.log_probs(logits).exp(), target),
    "sigmoid": lambda logits, target: sum(losses.sigmoid_terms(logits, target).values()),
}


def made(name, *, seed=0, finest=2):
    return build(name, 2, classes=3, seed=seed, finest=finest, **SHAPE)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_keep_grid_type_and_input_and_have_gradients_everywhere(name):
    network, x = made(name), torch.randn(2, 2, 8, 8, 4)
    before = x.clone()
    y = network(x)
    assert y.shape == (2, 3, 8, 8, 4)
    assert y.dtype == x.dtype
    assert torch.equal(x, before)
    y.square().sum().backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in network.parameters()
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_come_from_the_seed_alone(name):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = made(name)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = made(name), made(name, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_two_weights_share_memory(name):
    tensors = made(name).state_dict().values()
    assert len({t.data_ptr() for t in tensors}) == len(list(tensors))


def test_an_unknown_network_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown network 'resnet'; known are unet"):
        made("resnet")


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_finite_scalars_that_leave_their_input_alone(name):
    torch.manual_seed(0)
    logits = (torch.randn(2, 3, 6, 6, 6) * 50).requires_grad_()
    target = torch.zeros(2, 3, 6, 6, 6)
    target[:, 1] = 1
    before = logits.detach().clone(), target.clone()
    value = LOSSES[name](logits, target)
    assert value.shape == ()
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    assert torch.equal(logits.detach(), before[0])
    assert torch.equal(target, before[1])


@pytest.mark.parametrize("name", ["cross_entropy", "soft_dice"])
def test_a_target_that_nobody_looked_at_costs_nothing(name):
    logits = torch.randn(2, 3, 6, 6, 6)
    assert LOSSES[name](logits, torch.zeros(2, 3, 6, 6, 6)).item() == 0
