"""The loop: turns, freezing, names of terms, resumption."""

import pytest
import torch
from torch import nn

from fewscan.errors import ConfigError, ResourceError
from fewscan.learn.batches import Batch
from fewscan.learn.config import TrainConfig
from fewscan.learn.engine import Limits, Phase, fit, learning_rate, only_training, phase_at, step_generator
from fewscan.learn.state import State, restore_state, state_tensors

CONFIG = TrainConfig(warmup_steps=1, lr=0.05)


def batches(rng):
    return Batch(torch.randn(4, 3, generator=rng), torch.zeros(4), torch.ones(4), ("a",) * 4)


def regress(network, target):
    """Learn to answer the sum of the inputs times a constant."""

    def objective(batch):
        error = network(batch.images)[:, 0] - target * batch.images.sum(1)
        return {"error": (error**2).mean()}

    return objective


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 1)


def one_phase(net, **changes):
    given = {"name": "fit", "objective": regress(net, 2.0), "weights": {"error": 1.0}, "batches": batches, "train": net,
             "lr": 0.05}  # fmt: skip
    return Phase(**given | changes)


def test_it_learns_and_the_average_follows():
    net = network()
    state = fit([one_phase(net)], State([net], CONFIG), limits=Limits(steps=300), config=CONFIG, seed=0)
    assert state.step == 300
    torch.testing.assert_close(net.weight, torch.full((1, 3), 2.0), atol=0.05, rtol=0)
    torch.testing.assert_close(state.average_of(net).weight, torch.full((1, 3), 2.0), atol=0.1, rtol=0)


def test_a_run_that_keeps_time_for_judging_is_annealed_when_it_stops():
    net, rates = network(), []
    limits = Limits(steps=100, until=0.6, annealed=0.6)

    def observe(status):
        rates.append(status.lr)

    fit([one_phase(net)], State([net], CONFIG), limits=limits, config=CONFIG, seed=0, observe=observe)
    assert len(rates) == 60
    assert rates[-1] < 0.05 * max(rates)


def test_phases_take_turns_and_freeze_each_other():
    a, b = network(1), network(2)
    seen = []

    def watch(net, other, target):
        inner = regress(net, target)

        def objective(batch):
            seen.append((net is a, all(p.requires_grad for p in net.parameters()),
                         any(p.requires_grad for p in other.parameters()), other.training))  # fmt: skip
            return inner(batch)

        return objective

    phases = [one_phase(a, objective=watch(a, b, 1.0), steps=2), one_phase(b, objective=watch(b, a, -1.0))]
    fit(phases, State([a, b], CONFIG), limits=Limits(steps=6), config=CONFIG, seed=0)
    assert [s[0] for s in seen] == [True, True, False, True, True, False]
    assert all(trained and not frozen and not mode for _, trained, frozen, mode in seen)
    assert all(p.requires_grad for n in (a, b) for p in n.parameters())


def test_a_phase_changes_only_the_weights_it_names():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    phase = one_phase(net, learns=frozenset({"bias"}), objective=regress(net, 5.0))
    fit([phase], State([net], CONFIG), limits=Limits(steps=5), config=CONFIG, seed=0)
    assert torch.equal(net.weight, before["weight"])
    assert not torch.equal(net.bias, before["bias"])
    assert net.weight.requires_grad


def test_freezing_is_undone_when_the_objective_fails():
    a, b = network(1), network(2)
    with pytest.raises(RuntimeError, match="oops"), only_training(a, [a, b]):
        raise RuntimeError("oops")
    assert all(p.requires_grad for p in b.parameters())


def test_a_misspelt_weight_names_both_sides():
    net = network()
    phase = one_phase(net, weights={"mistake": 1.0})
    with pytest.raises(ConfigError, match=r"returned terms \['error'\], weights are given for \['mistake'\]"):
        fit([phase], State([phase.train], CONFIG), limits=Limits(steps=1), config=CONFIG, seed=0)


def test_a_resumed_run_repeats_an_uninterrupted_one_to_the_bit():
    whole, part, again = network(), network(), network()
    kept = {}

    def keep_at_7(state, urgent):
        if state.step == 7:
            tensors, numbers = state_tensors(state)
            kept["at 7"] = {k: v.clone() for k, v in tensors.items()}, dict(numbers)

    for net, save in ((whole, None), (part, keep_at_7)):
        phase = one_phase(net)
        fit([phase], State([phase.train], CONFIG), limits=Limits(steps=20), config=CONFIG, seed=3, save=save)
    phase = one_phase(again)
    state = State([phase.train], CONFIG)
    tensors, numbers = kept["at 7"]
    restore_state(state, tensors, numbers=numbers)
    fit([phase], state, limits=Limits(steps=20), config=CONFIG, seed=3)
    assert torch.equal(whole.weight, again.weight)
    assert torch.equal(whole.weight, part.weight)


def test_a_budget_ends_and_anneals():
    net, rates = network(), []
    phase = one_phase(net)
    fit([phase], State([phase.train], CONFIG), limits=Limits(seconds=0.3), config=CONFIG, seed=0,
        observe=lambda s: rates.append(s.lr))  # fmt: skip
    assert rates[-1] < 0.1 * max(rates)


def test_the_learning_rate_rises_then_falls():
    config = TrainConfig(warmup_steps=10, lr=1.0)
    assert learning_rate(0.0, 0, config=config, peak=1.0) == pytest.approx(0.1)
    assert learning_rate(0.0, 9, config=config, peak=1.0) == 1.0
    assert learning_rate(1.0, 100, config=config, peak=1.0) == pytest.approx(1e-3)


def test_turns_repeat():
    net = network()
    phases = [one_phase(net, name="a", steps=2), one_phase(net, name="b")]
    assert [phase_at(i, phases).name for i in range(6)] == ["a", "a", "b", "a", "a", "b"]


def test_steps_differ_and_repeat():
    first, again, other = (torch.rand(3, generator=step_generator(0, s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("wrong", [{}, {"steps": 1, "seconds": 1.0}, {"steps": 0}, {"seconds": -1.0}])
def test_limits_refuse_nonsense(wrong):
    with pytest.raises(ConfigError):
        Limits(**wrong)


def test_a_loss_that_is_no_longer_finite_is_said():
    net = network()

    def explode(batch):
        return {"error": net(batch.images).sum() * float("nan")}

    phase = one_phase(net, objective=explode)
    with pytest.raises(ResourceError, match=r"no longer finite after 0 steps; .* train\.lr=0\.017"):
        fit([phase], State([net], CONFIG), limits=Limits(steps=1), config=CONFIG, seed=0)
